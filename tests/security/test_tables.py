"""Parquet, archives and tables of other formats: what they would come to is known before they are unpacked."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import lzma
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loda.datasets import load_dataset
from loda.errors import ConfigError
from loda.reading import ReadingError, check_mat, open_tar, parquet_schema, read_frame, read_parquet
from loda.reading.pages import _Compact, decoded_bytes

ROWS = 3000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Columns of all kinds that our own files and data sets have, with repeats and missing values."""
    draws = np.random.default_rng(3)
    images = [None if row % 50 == 3 else draws.bytes(int(draws.integers(0, 400))) for row in range(ROWS)]
    return pa.table(
        {
            "image": pa.array([{"bytes": image, "path": f"{row % 7}.png"} for row, image in enumerate(images)]),
            "label": pa.array(draws.integers(0, 9, ROWS)),
            "label_name": pa.array([f"class {row % 9}" for row in range(ROWS)]),
            "large": pa.array([None if row % 3 else "x" * (row % 40) for row in range(ROWS)], pa.large_string()),
            "dictionary": pa.array([f"{row % 5}" for row in range(ROWS)]).dictionary_encode(),
            "order": pa.array([list(range(row % 6)) for row in range(ROWS)]),
            "accuracy": pa.array([None if row % 11 == 0 else row / 7 for row in range(ROWS)]),
            "flag": pa.array([row % 2 == 0 for row in range(ROWS)]),
            "digest": pa.array([bytes([row % 256]) * 16 for row in range(ROWS)], pa.binary(16)),
            "nothing": pa.nulls(ROWS),
        }
    )


CHOICES = list(itertools.product(["snappy", "gzip", "brotli", "zstd", "lz4", "none"], ["1.0", "2.0"], [True, False]))


@pytest.mark.parametrize(("compression", "version", "dictionary"), CHOICES)
def test_sound_files_are_read_as_arrow_reads_them(
    tmp_path: Path, table: pa.Table, compression: str, version: str, dictionary: bool
) -> None:
    file = tmp_path / "table.parquet"
    pq.write_table(
        table, file, compression=compression, data_page_version=version, use_dictionary=dictionary,
        row_group_size=700, data_page_size=5000,
    )  # fmt: skip
    assert read_parquet(file).equals(pq.read_table(file))
    assert read_parquet(file, ["label", "image"]).equals(pq.read_table(file, columns=["label", "image"]))
    assert parquet_schema(file).equals(pq.read_schema(file))


def test_a_frame_is_what_pandas_reads(tmp_path: Path, table: pa.Table) -> None:
    frame = table.select(["label", "label_name", "order", "accuracy"]).to_pandas()
    frame.to_parquet(tmp_path / "frame.parquet", index=False)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "frame.parquet"), pd.read_parquet(tmp_path / "frame.parquet"))


def expected_bytes(file: Path) -> int:
    """What the bound believes the file to come to."""
    with pq.ParquetFile(file) as parquet, file.open("rb") as content:
        metadata = parquet.metadata
        return sum(
            sum(decoded_bytes(content, metadata.row_group(g).column(c), parquet.schema.column(c).length))
            for g in range(metadata.num_row_groups)
            for c in range(metadata.row_group(g).num_columns)
        )


@pytest.mark.parametrize("dictionary", [True, False])
def test_the_estimate_is_neither_less_than_the_truth_nor_far_above_it(
    tmp_path: Path, table: pa.Table, dictionary: bool
) -> None:
    plain = table.drop_columns(["dictionary", "nothing"])
    pq.write_table(plain, tmp_path / "table.parquet", use_dictionary=dictionary)
    assert 0.8 * plain.nbytes < expected_bytes(tmp_path / "table.parquet") < 4 * plain.nbytes


def bomb(kind: str, file: Path) -> None:
    if kind == "compressed":  # 300 MB of zeros
        pq.write_table(
            pa.table({"image": [bytes(300_000_000)]}), file, compression="zstd", use_dictionary=False,
            write_statistics=False,
        )  # fmt: skip
    elif kind == "one long value in every row":  # 1 TB
        value = pa.array([b"x" * 10_000_000])
        rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, dtype=np.int32)), value)
        pq.write_table(pa.table({"image": rows}), file, compression="zstd")
    elif kind == "the same in a struct":
        value = pa.array(["x" * 1_000_000])
        rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, dtype=np.int32)), value)
        pq.write_table(pa.table({"image": pa.StructArray.from_arrays([rows], names=["bytes"])}), file)
    elif kind == "one number in every row":  # 400 MB
        pq.write_table(pa.table({"label": np.zeros(50_000_000, dtype=np.int64)}), file, compression="zstd")
    else:  # texts that share all but their end with the text before: 2 GB
        texts = pa.array(["x" * 1_000_000] * 50)
        pq.write_table(
            pa.table({"text": texts}), file, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
        )


BOMBS = ["compressed", "one long value in every row", "the same in a struct", "one number in every row"]


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "bomb.parquet"
    bomb(kind, file)
    assert file.stat().st_size < 500_000
    allocated = pa.default_memory_pool().max_memory()
    with pytest.raises(ReadingError, match=r"decodes to more than 268,435,456 bytes"):
        read_parquet(file)
    assert pa.default_memory_pool().max_memory() - allocated < 50_000_000
    with pytest.raises(ReadingError, match="decodes to more than"):
        read_frame(file)


def test_an_encoding_whose_size_can_not_be_foreseen(tmp_path: Path) -> None:
    bomb("shared beginnings", tmp_path / "bomb.parquet")
    with pytest.raises(ReadingError, match=r"DELTA_BYTE_ARRAY.*write it plain"):
        read_parquet(tmp_path / "bomb.parquet")


def test_a_data_set_that_is_a_bomb_is_named(tmp_path: Path) -> None:
    value = pa.array([b"x" * 10_000_000])
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, dtype=np.int32)), value)
    columns = {"image": rows, "label": np.zeros(1000, np.int64), "label_name": ["a"] * 1000, "split": ["train"] * 1000}
    # as a writer in another language would: without Arrow's own schema, which would say that it is a dictionary
    pq.write_table(pa.table(columns), tmp_path / "images.parquet", store_schema=False)
    with pytest.raises(ConfigError, match=r"images\.parquet.*decodes to more than.*write it with less compression"):
        load_dataset(f"parquet:{tmp_path / 'images.parquet'}")


def test_a_footer_that_lies_about_the_size_does_not_help(tmp_path: Path) -> None:
    """The footer's total is what Arrow's own reader shows; the pages tell the truth."""
    file = tmp_path / "bomb.parquet"
    bomb("compressed", file)
    size = pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size
    content, honest, lie = file.read_bytes(), varint(2 * size), varint(2 * 1_000_000)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert content[footer:].count(honest) == 2  # of the column, and of the row group
    # the same length, by a number with needless zeros at its end
    file.write_bytes(content[:footer] + content[footer:].replace(honest, pad(lie, len(honest))))
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 1_000_000
    with pytest.raises(ReadingError, match="decodes to more than"):
        read_parquet(file)


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def pad(number: bytes, length: int) -> bytes:
    return number if len(number) == length else pad(number[:-1] + bytes([number[-1] | 128, 0]), length)


@settings(max_examples=150, deadline=2000, derandomize=True)
@given(position=st.integers(4, 10**6), flip=st.integers(1, 255), cut=st.one_of(st.just(0), st.integers(1, 500)))
def test_a_damaged_file_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int, cut: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.parquet"
    sink = io.BytesIO()
    small = pa.table({"image": [b"abc" * row for row in range(40)], "label": list(range(40)), "name": ["n"] * 40})
    pq.write_table(small, sink)
    content = bytearray(sink.getvalue())
    content[position % len(content)] ^= flip
    file.write_bytes(content[: len(content) - cut])
    try:
        assert read_parquet(file).num_rows <= 2**31
    except ReadingError as error:
        assert str(error)


@settings(max_examples=300, deadline=1000, derandomize=True)
@given(content=st.binary(max_size=60))
def test_any_bytes_as_the_header_of_a_page(content: bytes) -> None:
    with contextlib.suppress(ReadingError, IndexError):  # the latter: more is read, up to a bound
        _Compact(content).struct()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 4 + b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "none.parquet").write_bytes(content)
    with pytest.raises(ReadingError, match="not readable as Parquet"):
        read_parquet(tmp_path / "none.parquet")


def test_columns_that_are_missing_or_named_twice(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "one.parquet")
    for name, columns in (("twice", ["a"]), ("one", ["b"])):
        with pytest.raises(ReadingError, match="its columns are a"):
            read_parquet(tmp_path / f"{name}.parquet", columns)


def mat_file(parts: list[bytes]) -> bytes:
    """A MATLAB 5 file with these compressed elements."""
    packed = [zlib.compress(part) for part in parts]
    elements = b"".join(struct.pack("<II", 15, len(part)) + part for part in packed)
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + elements


def test_a_matlab_file_that_unpacks_to_too_much(tmp_path: Path) -> None:
    from scipy.io import savemat

    file = tmp_path / "cars_meta.mat"
    file.write_bytes(mat_file([b"small", bytes(200_000_000), bytes(100_000_000)]))
    assert file.stat().st_size < 400_000
    with pytest.raises(ReadingError, match="unpacks to more than"):
        check_mat(file)
    file.write_bytes(mat_file([b"x"])[:-3] + b"zzz")
    with pytest.raises(ReadingError, match="damaged"):
        check_mat(file)
    savemat(file, {"class_names": np.array(["a", "b"], dtype=object)}, do_compression=True)
    check_mat(file)
    file.write_bytes(b"something else")
    check_mat(file)  # its reader says what it is


@pytest.mark.parametrize("field", ["../../etc/passwd", "/etc/passwd", "a/b.jpg", "..", "a\\b.jpg"])
def test_a_name_in_an_annotation_that_leads_elsewhere(tmp_path: Path, field: str) -> None:
    from scipy.io import savemat

    rows: Any = np.array([(field, 1)], dtype=[("fname", object), ("class", object)])
    for name in ("devkit/cars_train_annos", "cars_test_annos_withlabels"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        savemat(tmp_path / f"{name}.mat", {"annotations": rows})
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.array(["a", "b"], dtype=object)})
    with pytest.raises(ConfigError, match="is no plain file name"):
        load_dataset(f"cars:{tmp_path}")


def test_an_archive_that_unpacks_without_end(tmp_path: Path) -> None:
    for name, opener in (("a.tar.gz", gzip.open), ("a.tar.xz", lzma.open), ("a.tar", open)):
        with opener(tmp_path / name, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:  # type: ignore[operator]
            entry = tarfile.TarInfo("cifar-100-python/filler")
            entry.size = 3_000_000
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
            entry = tarfile.TarInfo("wanted")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"here"))
        with open_tar(tmp_path / name, 4_000_000) as archive:
            member = archive.extractfile("wanted")
            assert member is not None
            assert member.read() == b"here"
        with (
            pytest.raises(ReadingError, match="unpacks to more than 2,000,000"),
            open_tar(tmp_path / name, 2_000_000) as archive,
        ):
            archive.getmember("wanted")


def test_an_archive_whose_hidden_header_is_a_gigabyte(tmp_path: Path) -> None:
    """A pax header is read into memory before anything else is known of the archive."""
    file = tmp_path / "cifar-100-python.tar.gz"
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 5 * 2**30
    file.write_bytes(gzip.compress(entry.tobuf() + bytes(10_000)))
    with pytest.raises(ConfigError, match=r"can't be read as the archive.*unpacks to more than 1,073,741,824"):
        load_dataset(f"cifar100:{file}")
