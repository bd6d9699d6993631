"""Anyone's images from one Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from loda.datasets.base import ImageDataset, shown
from loda.errors import ConfigError
from loda.reading import ReadingError, parquet_schema, read_parquet


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    names = [kind.field(i).name for i in range(kind.num_fields)]
    return "bytes" in names and _is_binary(kind.field("bytes").type)


_COLUMNS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "image": (_is_image, "a struct {bytes: binary, path: string}, or binary"),
    "label": (pa.types.is_integer, "an integer from 0"),
    "label_name": (_is_text, "text, one name a label"),
    "split": (_is_text, "text, 'train' or 'test'"),
}


def load_parquet(path: str | Path, *, task_column: str | None = None, name: str | None = None) -> ImageDataset:
    """Read ``image``, ``label``, ``label_name``, ``split`` and, if there is one, ``task`` (the class's natural group).

    Args:
        path: one Parquet file; ``~`` is expanded.
        task_column: where natural groups are, if not in ``task``; it must then exist.
        name: for messages; default: the file's name.

    Raises:
        ConfigError: missing or damaged file, missing or wrong columns, bad labels, names or splits: all at once.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"dataset: no file {str(path)!r}; give an existing Parquet file as parquet:PATH")
    try:
        schema = parquet_schema(path)
    except (ReadingError, OSError) as error:
        raise ConfigError(f"dataset: {str(path)!r} can't be read as Parquet ({error})") from error
    wanted = dict(_COLUMNS)
    if task_column is not None or "task" in schema.names:
        wanted[task_column or "task"] = (_is_text, "text, one task a class")
    _check_schema(path, schema, wanted)
    try:
        table = read_parquet(path, list(wanted))
    except (ReadingError, OSError) as error:
        raise ConfigError(f"dataset: {str(path)!r} can't be read ({error}); damaged? Then copy it anew") from error
    return _dataset_of(table, name or path.name, [c for c in wanted if c not in _COLUMNS])


def _check_schema(path: Path, schema: pa.Schema, wanted: dict[str, tuple[Callable[[pa.DataType], bool], str]]) -> None:
    problems = []
    for column, (fits, expected) in wanted.items():
        if column not in schema.names:
            problems.append(
                f"dataset: {str(path)!r} has no column {column!r} ({expected}); its columns: {shown(schema.names, 20)}"
            )
        elif not fits(schema.field(column).type):
            problems.append(
                f"dataset: column {column!r} of {str(path)!r} must be {expected}, but is {schema.field(column).type}"
            )
    if problems:
        raise ConfigError(problems)


def _dataset_of(table: pa.Table, name: str, task_columns: Sequence[str]) -> ImageDataset:
    problems = []
    for column in table.column_names:
        if column != "image" and table[column].null_count:
            rows = np.flatnonzero(table[column].is_null().to_numpy())
            problems.append(f"dataset {name!r}: column {column!r} is empty in row {shown(rows.tolist())}")
    if problems:
        raise ConfigError(problems)
    image = table["image"].combine_chunks()
    if isinstance(image, pa.ChunkedArray):  # more than 2 GB doesn't fit one array of 32-bit offsets
        image = pa.concat_arrays([_with_large_bytes(chunk) for chunk in image.chunks])
    paths = None
    if pa.types.is_struct(image.type):
        fields = dict(zip([field.name for field in image.type], image.flatten()))  # flatten keeps missing rows missing
        image = fields["bytes"]
        paths = fields["path"].to_pylist() if "path" in fields else None
    labels = table["label"].to_numpy()
    class_names, name_problems = _one_per_class(labels, table["label_name"], "names")
    groups = None
    for column in task_columns:
        groups, group_problems = _one_per_class(labels, table[column], "tasks")
        name_problems += group_problems
    try:
        dataset = ImageDataset(name, image, labels, class_names, table["split"].to_pylist(), groups, paths)
    except ConfigError as error:
        problems = error.problems
    problems = [f"dataset {name!r}: {problem}" for problem in name_problems] + problems
    if problems:
        raise ConfigError(problems)
    return dataset


def _with_large_bytes(chunk: pa.Array) -> pa.Array:
    if not pa.types.is_struct(chunk.type):
        return chunk.cast(pa.large_binary())
    fields = [f.with_type(pa.large_binary()) if f.name == "bytes" else f for f in chunk.type]
    return chunk.cast(pa.struct(fields))


def _one_per_class(labels: np.ndarray, column: pa.ChunkedArray, what: str) -> tuple[list[str], list[str]]:
    """The value that all rows of a class share, by ascending label; problems where they differ."""
    values: dict[int, dict[str, None]] = {}
    for label, value in zip(labels.tolist(), column.to_pylist()):
        values.setdefault(label, {})[value] = None
    mixed = [f"label {label} has {what} {shown([repr(v) for v in values[label]])}" for label in sorted(values)
             if len(values[label]) > 1]  # fmt: skip
    problems = [f"all rows of a label must agree, but {shown(mixed)}"] if mixed else []
    return [next(iter(values[label])) for label in sorted(values)], problems
