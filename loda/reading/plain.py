"""Bytes, JSON and names of files."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from loda.errors import short

DOCUMENT_BYTES = 2**20  # what a person writes: studies, search spaces, lists of orders
RECORD_BYTES = 2**26  # what a study writes about itself: summaries, plans, facts of a stage
DEPTH = 64  # brackets inside brackets; our own records have six
_DIGITS = 39  # of a whole number: 128 bits, more than any seed
_PART_BYTES = 2**26
_LONGEST_NAME = 255  # bytes, of nearly every filesystem


class ReadingError(ValueError):
    """What a file holds can't be taken; says what was found and what was expected, without the file's name."""


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a plain file.

    Args:
        path: a file, or a link to one.
        limit: bytes; a larger file is refused without being read.

    Raises:
        ReadingError: larger, or no plain file (a pipe or a device would block, or never end).
        OSError: it can't be opened or read.
    """
    with _open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ReadingError(f"{size:,} bytes, expected at most {limit:,}")
        content = file.read(size + 1)  # not limit + 1: that much would be allocated
    if len(content) > size:
        raise ReadingError("it grows while it is read")
    return content


def read_stream(stream: Any, limit: int) -> bytes:
    """What is left in an open stream, at most ``limit`` bytes.

    Raises:
        ReadingError: there are more.
    """
    parts, left = [b""], limit
    while part := stream.read(_PART_BYTES):  # a read allocates what it asks for, so not limit + 1
        parts.append(part)
        left -= len(part)
        if left < 0:
            raise ReadingError(f"more than {limit:,} bytes")
    return b"".join(parts)


def plain_file_size(path: str | Path) -> int:
    """Bytes of a plain file; raises as :func:`read_bytes`."""
    with _open_plain(path) as file:
        return os.fstat(file.fileno()).st_size


def memory_bytes() -> int:
    """Of this machine: more than that is never read at once."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _open_plain(path: str | Path) -> BinaryIO:
    # Not blocking: opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise ReadingError("no plain file, but a pipe, a socket or a device")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def parse_json(content: bytes | str, *, constants: bool = True) -> Any:
    """A JSON value; of repeated keys the last one counts, as in Python.

    Args:
        content: the document; its size is the caller's to bound.
        constants: whether NaN and infinities, which Python writes and JSON doesn't have, are read.

    Raises:
        ReadingError: not JSON, nested deeper than 64 levels, or a whole number of more than 39 digits.
    """
    try:
        value = json.loads(content, parse_int=_whole_number, parse_constant=None if constants else _refused)
    except ReadingError:
        raise
    except (ValueError, RecursionError) as error:
        raise ReadingError(f"not valid JSON: {error}") from error
    _check_depth(value)
    return value


def read_json(path: str | Path, limit: int = RECORD_BYTES) -> Any:
    """The JSON value in a file; raises as :func:`read_bytes` and :func:`parse_json`."""
    return parse_json(read_bytes(path, limit))


def _whole_number(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ReadingError(f"a whole number of {len(text)} digits, expected at most {_DIGITS}")
    return int(text)


def _refused(constant: str) -> None:
    raise ReadingError(f"not valid JSON: {constant} isn't JSON")


def _check_depth(value: Any) -> None:
    layer = [value]
    for _level in range(DEPTH):
        inner: list[Any] = []
        for item in layer:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return
        layer = inner
    raise ReadingError(f"nested deeper than {DEPTH} levels")


def plain_name(name: Any) -> str:
    """A name that stays in its folder: one part of a path, without separators.

    Raises:
        ReadingError: anything else.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or any(character in "/\\" or ord(character) < 32 for character in name)
        or len(name.encode("utf-8", "replace")) > _LONGEST_NAME
    ):
        raise ReadingError(f"{short(repr(name), 80)} is no plain file name (one part of a path, no separators)")
    return name


def relative_name(name: Any) -> str:
    """A path that stays in its folder: relative, ``/`` between plain names.

    Raises:
        ReadingError: absolute, with ``..``, or no path at all.
    """
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute():
        raise ReadingError(f"{short(repr(name), 80)} is no path inside its folder")
    for part in PurePosixPath(name).parts:
        try:
            plain_name(part)
        except ReadingError:
            raise ReadingError(f"{short(repr(name), 80)} is no path inside its folder") from None
    return name


def inside(root: str | Path, path: str | Path) -> Path:
    """The path, if it lies in ``root`` once all links in both are followed; the root itself counts.

    Raises:
        ReadingError: it leads elsewhere.
    """
    real = os.path.realpath(path)
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise ReadingError(f"{str(path)!r} leads out of {str(root)!r}, to {real!r}")
    return Path(path)
