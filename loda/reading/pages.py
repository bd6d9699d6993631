"""What the pages of a Parquet file decode to, from their headers alone.

A file's footer says how large its columns are, but it is the header of each page that a decoder allocates by, and a few
bytes of it can stand for any number of values: repeats of one long value in a dictionary, runs, compression. The
headers (Thrift's compact protocol, ``parquet.thrift`` of the format's specification) are walked here without
decompressing anything but dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from loda.reading.plain import ReadingError

_HEADER_BYTES, _FIRST_LOOK = 2**24, 2**10  # the longest header that Arrow takes; what holds nearly every one
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages; indexes (1) have no values
_PLAIN_DICTIONARY, _DELTA_BYTES, _RLE_DICTIONARY = 2, 7, 8  # encodings
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd", "LZ4": "lz4_raw"}
_FEW = 2**21  # values of a dictionary that is looked into; writers end one at about a megabyte
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}

Struct = dict[int, Any]  # Thrift's field numbers to values


@dataclass(frozen=True)
class _Page:
    kind: int
    plain_bytes: int  # once decompressed
    packed_bytes: int  # in the file, without the header
    values: int  # of a data page; of a dictionary how many it holds
    encoding: int
    at: int  # where its content begins


def decoded_bytes(file: BinaryIO, column: Any, fixed_bytes: int) -> Iterator[int]:
    """Bytes that each page of a column chunk comes to at most, one after another, so that the caller can stop.

    Args:
        file: the Parquet file.
        column: its metadata of the chunk, ``pyarrow.parquet.ColumnChunkMetaData``.
        fixed_bytes: of a value, where the type has a fixed length; else 0.

    Raises:
        ReadingError: a page's header can't be read or doesn't fit the chunk.
    """
    width = fixed_bytes or _WIDTHS.get(column.physical_type, 0)
    longest = 0  # value of the dictionary
    start = column.data_page_offset
    if column.dictionary_page_offset and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    for page in _pages(file, start, start + column.total_compressed_size):
        if page.kind == _DICTIONARY:
            yield page.plain_bytes  # first, so that one that is too large is not decompressed
            longest = width or _longest_value(file, page, column.compression)
        elif width:
            yield page.values * width
        elif page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
            yield page.values * (longest + 4)
        elif page.encoding == _DELTA_BYTES:
            raise ReadingError(
                "a column in the encoding DELTA_BYTE_ARRAY, whose size can't be foreseen; write it plain"
            )
        else:
            yield page.plain_bytes + 4 * page.values


def _pages(file: BinaryIO, start: int, end: int) -> Iterator[_Page]:
    while start < end:
        fields, length = _header(file, start, end)
        page = _page(fields, start + length)
        start = page.at + page.packed_bytes
        if start > end:
            raise ReadingError("a page reaches beyond its column")
        yield page


def _header(file: BinaryIO, start: int, end: int) -> tuple[Struct, int]:
    """A page's header as Thrift's fields by number, and its length in bytes."""
    look = _FIRST_LOOK
    while True:
        file.seek(start)
        content = file.read(min(look, end - start))
        reader = _Compact(content)
        try:
            return reader.struct(), reader.at
        except IndexError:
            if look >= min(_HEADER_BYTES, end - start):
                raise ReadingError("a page's header is cut off or longer than 16 MiB") from None
            look *= 8


def _page(fields: Struct, at: int) -> _Page:
    kind = fields.get(1)
    own = fields.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, 6))  # type: ignore[arg-type]
    own = own if isinstance(own, dict) else {}
    encoding = own.get(4 if kind == _DATA_2 else 2, 0)
    numbers = (kind, fields.get(2), fields.get(3), own.get(1, 0), encoding)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ReadingError("a page's header has no sizes, or negative ones")
    return _Page(*numbers, at)  # type: ignore[arg-type]


def _longest_value(file: BinaryIO, page: _Page, compression: str) -> int:
    """Bytes of the longest text in a dictionary page; the page's own size where that isn't worth a look."""
    if page.values > _FEW or not (compression == "UNCOMPRESSED" or compression in _CODECS):
        return page.plain_bytes
    file.seek(page.at)
    content = file.read(page.packed_bytes)
    if compression != "UNCOMPRESSED":
        try:
            content = pa.Codec(_CODECS[compression]).decompress(content, page.plain_bytes, asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            if compression == "LZ4":  # Hadoop's older form of it goes by the same name
                return page.plain_bytes
            raise ReadingError(f"a page can't be decompressed: {error}") from error
    longest = at = 0
    for _value in range(page.values):
        length = int.from_bytes(content[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return longest


class _Compact:
    """Thrift's compact protocol, as much as page headers need. IndexError: the content ends too early."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def struct(self, depth: int = 0) -> Struct:
        if depth > 8:
            raise ReadingError("a page's header is nested too deeply")
        fields: Struct = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            fields[number] = self._value(byte & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            for _item in range(min(count, len(self.content) + 1)):  # each takes a byte at least
                self._value(3 if head & 15 in (1, 2) else head & 15, depth + 1)
            return None
        if kind == 12:
            return self.struct(depth + 1)
        raise ReadingError(f"a page's header has a field of the unknown type {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.content):
            raise IndexError

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ReadingError("a page's header has a number of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
