"""Compressed containers that other libraries read: what they unpack to is bounded before those libraries see them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from loda.reading.plain import ReadingError, plain_file_size, read_bytes
from loda.reading.tables import most_decoded

_ENTRIES = 100_000
_MAT_BYTES = 2**26  # of a table of file names and labels; that of Stanford Cars has 0.6 MB
_MAT_HEADER, _MAT_TAG, _MAT_COMPRESSED = 128, 8, 15


def check_archive(path: str | Path) -> None:
    """Whether a zip archive of arrays (``.npz``) or of torch's tensors unpacks to a bounded size.

    Another file than a zip archive passes: its reader says what it is.

    Raises:
        ReadingError: it declares more than 256 MiB and 32 times its size, or an array of Python objects or of more
            values than its entry holds.
        OSError: it can't be opened.
    """
    bound = most_decoded(plain_file_size(path))
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if len(entries) > _ENTRIES or total > bound:
                raise ReadingError(f"{len(entries):,} entries of {total:,} bytes in all, expected at most {bound:,}")
            for entry in entries:
                if entry.filename.endswith(".npy"):
                    _check_array(archive, entry)
    except ReadingError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ReadingError(f"a damaged archive: {error}") from error


def _check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ReadingError(f"{entry.filename!r}: version {version} of NumPy's format, expected 1.0 or 2.0")
        shape, _, kind = readers[version](file)
    if kind.hasobject:
        raise ReadingError(
            f"{entry.filename!r} holds Python objects, which would have to be unpickled; expected numbers"
        )
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > entry.file_size:
        raise ReadingError(f"{entry.filename!r} declares the shape {str(shape)[:80]}, which isn't what it holds")


@contextmanager
def open_tar(path: str | Path, most: int) -> Iterator[tarfile.TarFile]:
    """A tar archive, packed or not, of which no more than ``most`` bytes are ever unpacked; for reading members.

    Raises:
        ReadingError: while it is read, once it comes to more.
        OSError, tarfile.TarError: it can't be opened, or is no archive.
    """
    plain_file_size(path)
    with Path(path).open("rb") as file:
        magic = file.read(6)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    opener = next((one for start, one in openers.items() if magic.startswith(start)), open)
    with opener(path, "rb") as content, tarfile.open(fileobj=_Bounded(content, most), mode="r:") as archive:  # type: ignore[call-overload]
        yield archive


class _Bounded:
    """A file up to a position; reading or seeking beyond it raises."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1) -> bytes:
        if count < 0 or self.tell() + count > self._most:
            raise ReadingError(f"unpacks to more than {self._most:,} bytes")
        return self._file.read(count)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position > self._most:
            raise ReadingError(f"unpacks to more than {self._most:,} bytes")
        return self._file.seek(position)


def check_mat(path: str | Path) -> None:
    """Whether a MATLAB 5 file unpacks to at most 256 MiB; another file passes, its reader says what it is.

    Raises:
        ReadingError: larger than 64 MiB, or it unpacks to too much, or is damaged.
        OSError: it can't be opened.
    """
    content = memoryview(read_bytes(path, _MAT_BYTES))
    if bytes(content[:6]) != b"MATLAB":
        return
    order: Literal["big", "little"] = "big" if bytes(content[126:128]) == b"MI" else "little"
    left, at = most_decoded(len(content)), _MAT_HEADER
    while at + _MAT_TAG <= len(content):
        kind, size = (int.from_bytes(content[at + place : at + place + 4], order) for place in (0, 4))
        at += _MAT_TAG
        if kind == _MAT_COMPRESSED:
            left -= _unpacked(content[at : at + size], left)
        at += size


def _unpacked(packed: memoryview, most: int) -> int:
    """Bytes that a zlib stream unpacks to, a piece at a time."""
    stream, total, rest = zlib.decompressobj(), 0, bytes(packed)
    try:
        while rest and not stream.eof:
            total += len(stream.decompress(rest, 2**20))
            rest = stream.unconsumed_tail
            if total > most:
                raise ReadingError(f"unpacks to more than {most:,} bytes")
    except zlib.error as error:
        raise ReadingError(f"damaged: {error}") from error
    return total
