"""Tensors from safetensors files, whose header is checked before a byte is allocated for what it declares."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from loda.errors import short
from loda.reading.plain import ReadingError, plain_file_size

HEADER_BYTES = 2**24  # a hundred thousand tensors take half of it
DIMENSIONS = 32
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LENGTH = 8  # bytes before the header that say how long it is
_PICKLES = (b"\x80", b"PK\x03\x04")  # a pickle's first instruction, and the archive that torch.save writes


def parse_safetensors(content: bytes) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ReadingError: not safetensors (a pickle is named as such), or a header that doesn't fit the content.
    """
    first = content[:_LENGTH]
    _check_header(first, content[_LENGTH : _LENGTH + _header_bytes(first)], len(content))
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ReadingError(f"not readable as safetensors: {error}") from error


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file by name.

    Raises:
        ReadingError: as :func:`parse_safetensors`.
        OSError: it can't be opened.
    """
    size = plain_file_size(path)
    with Path(path).open("rb") as file:
        first = file.read(_LENGTH)
        _check_header(first, file.read(_header_bytes(first)), size)
    try:
        return safetensors.torch.load_file(os.fspath(path))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ReadingError(f"not readable as safetensors: {error}") from error


def _header_bytes(first: bytes) -> int:
    """How much to read for the header: what it declares, within bounds; one byte tells safetensors from other files."""
    return min(max(int.from_bytes(first, "little"), 1), HEADER_BYTES)


def _check_header(first: bytes, rest: bytes, size: int) -> None:
    """Whether a file of ``size`` bytes that begins so is safetensors.

    Args:
        first: its first 8 bytes.
        rest: what follows, as far as :func:`_header_bytes` says.
        size: of the file.
    """
    length = int.from_bytes(first, "little")
    if len(first) < _LENGTH or rest[:1] != b"{" or length > size - _LENGTH:
        if first.startswith(_PICKLES):
            raise ReadingError(
                "a pickle (or an archive of torch.save), not safetensors: refused, and nothing in it was executed; "
                "save the tensors with safetensors.torch.save_file"
            )
        raise ReadingError(f"not safetensors: no header of {length:,} bytes in a file of {size:,}")
    if length > HEADER_BYTES:
        raise ReadingError(f"its header declares {length:,} bytes, expected at most {HEADER_BYTES:,}")
    try:
        header = json.loads(rest[:length], object_pairs_hook=_no_name_twice)
    except RecursionError as error:
        raise ReadingError("its header is nested too deeply") from error
    except ValueError as error:
        raise ReadingError(f"its header can't be read: {error}") from error
    if not isinstance(header, dict):
        raise ReadingError(f"its header must be a mapping, but is a {type(header).__name__}")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            spans.append(_span(entry))
        except ReadingError as error:
            raise ReadingError(f"tensor {short(name, 80)!r}: {error}") from error
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ReadingError(f"its tensors don't lie one after another: one ends at byte {end}, the next at {start}")
        end = stop
    if end != size - _LENGTH - length:
        raise ReadingError(f"its header declares {end:,} bytes of tensors, but it holds {size - _LENGTH - length:,}")


def _span(entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, if that fits its type and shape."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ReadingError("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ReadingError(f"dtype {str(dtype)[:40]!r}, expected one of {', '.join(_BITS)}")
    if not _counts(shape) or len(shape) > DIMENSIONS:
        found = f"{len(shape):,} dimensions" if isinstance(shape, list) else str(shape)[:40]
        raise ReadingError(f"a shape of {found}, expected at most {DIMENSIONS} whole numbers from 0")
    if not _counts(offsets) or len(offsets) != 2:
        raise ReadingError("data_offsets must be two whole numbers from 0")
    # A zero takes all others with it; they must be possible all the same.
    if math.prod(max(side, 1) for side in shape) >= 2**60:
        raise ReadingError(f"a shape of {str(shape)[:80]}: more values than any machine holds")
    needed = math.prod(shape) * _BITS[dtype] // 8
    start, stop = offsets
    if stop - start != needed:
        raise ReadingError(
            f"{dtype} of shape {str(shape)[:80]} takes {needed:,} bytes, but {stop - start:,} are its own"
        )
    return start, stop


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ReadingError("a name is given twice")
    return found
