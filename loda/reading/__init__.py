"""The one door for files that somebody else may have written: bounded, checked before anything is made of them.

A stage store, a run folder, a search space or a data set may come from another person or another machine. Everything
here either gives a plain value or raises :class:`ReadingError`, in time and memory that the file's size bounds; nothing
is ever unpickled, no name leads out of its folder, and sizes that a file declares are checked before they are believed.
"""

from loda.reading.archives import check_archive, check_mat, open_tar
from loda.reading.plain import (
    DOCUMENT_BYTES,
    RECORD_BYTES,
    ReadingError,
    inside,
    memory_bytes,
    parse_json,
    plain_name,
    read_bytes,
    read_json,
    read_stream,
    relative_name,
)
from loda.reading.tables import parquet_schema, read_frame, read_parquet
from loda.reading.tensors import load_safetensors, parse_safetensors
from loda.reading.yaml_documents import parse_yaml, read_yaml

__all__ = [
    "DOCUMENT_BYTES",
    "RECORD_BYTES",
    "ReadingError",
    "check_archive",
    "check_mat",
    "inside",
    "load_safetensors",
    "memory_bytes",
    "open_tar",
    "parquet_schema",
    "parse_json",
    "parse_safetensors",
    "parse_yaml",
    "plain_name",
    "read_bytes",
    "read_frame",
    "read_json",
    "read_parquet",
    "read_stream",
    "read_yaml",
    "relative_name",
]
