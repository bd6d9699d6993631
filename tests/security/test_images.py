"""Data sets that mean harm: pipes among images, pictures of a billion pixels, pickles that grow."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from loda.datasets import load_dataset
from loda.datasets.plain_pickle import read_plain_pickle
from loda.errors import ConfigError


def png_of(width: int, height: int) -> bytes:
    """A sound PNG file of a picture that has no pixels yet."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of two pictures each, for training and for the test."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.timeout(30)
def test_a_pipe_among_the_images_does_not_block(images: Path) -> None:
    os.mkfifo(images / "train/a/pipe.jpg")
    with pytest.raises(ConfigError, match=r"train/a/pipe\.jpg.*a pipe, a socket or a device"):
        load_dataset(f"folder:{images}")


@pytest.mark.timeout(30)
def test_a_device_among_the_images_is_not_read_without_end(images: Path) -> None:
    (images / "train/a/zero.jpg").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"train/a/zero\.jpg.*a pipe, a socket or a device"):
        load_dataset(f"folder:{images}")


def test_a_picture_of_ten_billion_pixels_is_refused_unpacked(images: Path) -> None:
    (images / "train/a/bomb.png").write_bytes(png_of(100_000, 100_000))
    with pytest.raises(ConfigError, match=r"train/a/bomb\.png.*DecompressionBombError"):
        load_dataset(f"folder:{images}")


def test_a_link_to_data_elsewhere_is_the_users_own_and_is_taken(images: Path, tmp_path: Path) -> None:
    digest = load_dataset(f"folder:{images}").digest
    (images / "train/a").rename(tmp_path / "elsewhere")
    (images / "train/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "door").symlink_to(images)
    assert load_dataset(f"folder:{tmp_path / 'door'}").digest == digest


@pytest.mark.parametrize("line", ["../../etc/passwd 0", "/etc/passwd 0", "a/../../x.png 0"])
def test_a_list_whose_paths_lead_out(images: Path, line: str) -> None:
    for split in ("train", "test"):
        (images / f"{split}.txt").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"expected 'path/from/the/root\.jpg label'"):
        load_dataset(f"lists:{images}")


def test_a_pickle_that_makes_one_long_text_again_and_again(tmp_path: Path) -> None:
    """Each call is ten bytes of the file and would take a megabyte."""
    text = pickle.dumps("x" * 10**6, protocol=2)
    assert text[2:3] == b"X"
    text = text[2 : text.index(b"q", 7 + 10**6)] + b"q\0"  # BINUNICODE, into memo 0
    call = b"c_codecs\nencode\n" + b"h\0" + b"X\x06\0\0\0latin1" + b"\x86R"
    content = b"\x80\x02}(U\x04text" + text
    for number in range(1000):
        content += b"U\x03" + f"{number:03}".encode() + call
    content += b"u."
    with pytest.raises(ConfigError, match="more bytes than the file has"):
        read_plain_pickle(content, "batch")
