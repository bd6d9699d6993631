"""Images that stay in their files: listed once, read when they are needed."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from loda.errors import ConfigError
from loda.reading import read_bytes

# Those of torchvision's ImageFolder, so that a folder gives the same images here and there.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

MOST_BYTES = 2**28  # of an encoded image


class Scanned(NamedTuple):
    """What one reading of an encoded image tells.

    Attributes:
        sha256: of its bytes.
        problem: why it can't be opened, or None.
        size: width and height in pixels, or None.
        mode: Pillow's name of the pixel format (``RGB``, ``L``), or None.
    """

    sha256: bytes
    problem: str | None = None
    size: tuple[int, int] | None = None
    mode: str | None = None


class FileImages:
    """Encoded images in files of one folder; each is read when it is asked for.

    Args:
        root: the folder.
        files: paths from it, one an image.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root
        self.files = list(files)
        self._expected: Sequence[bytes] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: it can't be read.
            ValueError: its content isn't what :meth:`expect` was told, or it is no plain file or too large.
        """
        data = read_bytes(self.root / self.files[row], MOST_BYTES)
        # Keys of stages hold the content as it was when the data set was opened; other content must not go under them.
        if self._expected is not None and hashlib.sha256(data).digest() != self._expected[row]:
            raise ValueError("the file changed after the data set was opened")
        return data

    def expect(self, hashes: Sequence[bytes]) -> None:
        """From now on, refuse a file whose SHA-256 differs from the one given here, (N,)."""
        self._expected = hashes

    def take(self, rows: Sequence[int] | np.ndarray) -> FileImages:
        """Some of the images, in the order asked."""
        return FileImages(self.root, [self.files[int(row)] for row in rows])


def why_unreadable(error: Exception) -> str:
    """What went wrong with an image, for messages."""
    if isinstance(error, UnidentifiedImageError):  # its own text has the address of a buffer in it
        return "UnidentifiedImageError: no image format that Pillow knows"
    return f"{type(error).__name__}: {error}"


def scan(
    read: Callable[[int], Any], rows: int, pixels: bool = False, done: Callable[[int], None] | None = None
) -> list[Scanned]:
    """Read each image once, in threads: hash its bytes and check its header (checksums where the format has them).

    Args:
        read: bytes or a buffer of a row.
        rows: how many there are.
        pixels: decode it too, which finds files that were cut off.
        done: told after each image how many have been read.

    Returns:
        (rows,), in row order; a file that can't be read has the hash of nothing.
    """

    def one(row: int) -> Scanned:
        data: Any = b""
        try:
            data = read(row)
            with Image.open(io.BytesIO(data)) as image:
                size, mode = image.size, image.mode
                image.verify()
            if pixels:
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
        except Exception as error:  # damaged files raise almost anything: OSError, SyntaxError, struct.error, ...
            return Scanned(hashlib.sha256(data).digest(), why_unreadable(error))
        return Scanned(hashlib.sha256(data).digest(), None, size, mode)

    # Reading and hashing release Python's lock; more threads than that only wait for each other.
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as threads:
        found = []
        for image in threads.map(one, range(rows)):
            found.append(image)
            if done is not None:
                done(len(found))
        return found


@dataclass(frozen=True)
class Listing:
    """Which files a data set has, before any of them is opened.

    Attributes:
        name: how messages call it.
        root: the folder that paths start from.
        files: paths from the root with ``/``, (N,).
        labels: of each file, (N,).
        split: "train" | "test" of each file, (N,).
        class_names: one a label.
        groups: one a class, or None.
        ignored: files that are no images, by suffix.
        problems: found on the way (files of a list that aren't there).
        licence: as its source states it.
    """

    name: str
    root: Path
    files: list[str]
    labels: list[int]
    split: list[str]
    class_names: list[str]
    groups: list[str] | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    licence: str = "not stated"


def image_files(folder: Path, ignored: Counter[str]) -> list[str]:
    """Image files anywhere below a folder, as paths from it, sorted; others are counted by suffix in ``ignored``.

    Raises:
        ConfigError: a folder can't be listed, or a link leads back to a folder that it lies in.
    """

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise ConfigError(f"stream.dataset: {str(error.filename)!r} can't be listed ({error.strerror})")

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place).resolve()
        for name in folders:
            link = Path(place) / name
            if link.is_symlink() and here.is_relative_to(link.resolve()):
                raise ConfigError(f"stream.dataset: {str(link)!r} is a link to a folder that it lies in; remove it")
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                found.append((Path(place) / name).relative_to(folder).as_posix())
            else:
                ignored[suffix or name] += 1
    return sorted(found)


def class_folders(folder: Path, source: str) -> list[str]:
    """Names of the folders in a folder, sorted as torchvision's ImageFolder does; hidden ones are left out.

    Raises:
        ConfigError: no such folder, or no folders in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"stream.dataset: {source}: no folder {str(folder)!r}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ConfigError(
            f"stream.dataset: {source}: no folders in {str(folder)!r}; expected one for each class, with its images"
        )
    return names
