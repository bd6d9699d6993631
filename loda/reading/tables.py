"""Parquet files: what they come to is bounded before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from loda.reading.pages import decoded_bytes
from loda.reading.plain import ReadingError, plain_file_size

SMALLEST_BOUND = 2**28  # bytes that any file may decode to
EXPANSION = 32  # times a file's size that it may decode to
_FOOTER_BYTES, _FOOTER_ITEMS = 2**24, 10**6  # texts and lists in what a file says about itself


def most_decoded(file_bytes: int) -> int:
    """Bytes that a compressed file of this size may come to: images and figures don't shrink to a thirtieth."""
    return max(SMALLEST_BOUND, EXPANSION * file_bytes)


def parquet_schema(path: str | Path) -> pa.Schema:
    """Columns and their types; raises as :func:`read_parquet`."""
    with _open(path)[0] as file:
        return file.schema_arrow


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A table from a Parquet file.

    A small file may stand for any number of bytes, by compression or by one long value that all rows point to
    ("zip bomb"). What its pages come to is bounded first, see :mod:`loda.reading.pages`: by 256 MiB, or 32 times the
    file's size if that is more.

    Args:
        path: the file.
        columns: those wanted; None: all.

    Raises:
        ReadingError: no Parquet file, or damaged, or it decodes to too much.
        OSError: it can't be opened.
    """
    file, bound = _open(path)
    with file, Path(path).open("rb") as content:
        own = file.schema_arrow.names
        wanted = list(own if columns is None else columns)
        if len(set(own)) < len(own) or not set(wanted) <= set(own):
            raise ReadingError(f"its columns are {', '.join(own)[:200]}; expected {', '.join(wanted)[:200]}, once")
        _check_size(file, content, set(wanted), bound)
        try:
            return file.read(columns=wanted)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise ReadingError(f"damaged: {error}") from error


def read_frame(path: str | Path) -> pd.DataFrame:
    """A table as pandas has it; raises as :func:`read_parquet`."""
    return read_parquet(path).to_pandas()


def _open(path: str | Path) -> tuple[pq.ParquetFile, int]:
    bound = most_decoded(plain_file_size(path))
    try:
        limits = {"thrift_string_size_limit": _FOOTER_BYTES, "thrift_container_size_limit": _FOOTER_ITEMS}
        return pq.ParquetFile(path, **limits), bound
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ReadingError(f"not readable as Parquet: {error}") from error


def _check_size(file: pq.ParquetFile, content: BinaryIO, wanted: Set[str], bound: int) -> None:
    """Bounds on what the file declares, before a page is decompressed."""
    metadata, total = file.metadata, 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for position in range(row_group.num_columns):
            column = row_group.column(position)
            if column.path_in_schema.split(".")[0] not in wanted:
                continue
            for size in decoded_bytes(content, column, file.schema.column(position).length):
                total += size
                if total > bound:
                    raise ReadingError(
                        f"decodes to more than {bound:,} bytes: at most {EXPANSION} times the file's size, or "
                        f"{SMALLEST_BOUND // 2**20} MiB, are taken; if it is yours, write it with less compression "
                        "(images as PNG or JPEG)"
                    )
