"""Images as encoded, with labels, split and natural groups: what every source of data hands over."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from loda.datasets.files import FileImages, Scanned, scan, why_unreadable
from loda.errors import ConfigError

SPLITS = ("train", "test")
_SHOWN = 5  # problems of one kind that are spelled out; the rest is counted


def shown(items: Sequence[object], limit: int = _SHOWN) -> str:
    """The first few items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(str(item) for item in items[:limit]) + more


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images of a stream, kept encoded (a few MB where the pixels would be a few hundred) or in their files.

    Checked when it is built; undecodable images are found by :meth:`verify` or, at the latest, by :meth:`decode`.

    Attributes:
        name: how messages call it.
        images: the encoded files (PNG, JPEG, ...), an Arrow array of binary, (N,); a sequence of ``bytes`` becomes one.
            Or files that are read when they are needed.
        labels: (N,) int64, 0-based and contiguous.
        class_names: a name for each label.
        split: (N,) of "train" | "test".
        groups: the natural task of each *class* (an alphabet, a super-class), or None.
        paths: where each image came from, (N,), for messages only; None if unknown.
        licence: of the images, as their source states it.

    Raises:
        ConfigError: everything that is wrong with lengths, labels, names or splits.
    """

    name: str
    images: pa.Array | FileImages
    labels: np.ndarray
    class_names: list[str]
    split: np.ndarray
    groups: list[str] | None = None
    paths: Sequence[str | None] | None = field(default=None, repr=False)
    licence: str = "not stated"

    def __post_init__(self) -> None:
        images = self.images
        if not isinstance(images, pa.Array | FileImages):
            images = pa.array(list(images), type=pa.large_binary())
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", np.asarray(self.labels))
        object.__setattr__(self, "split", np.asarray(self.split, dtype=str))
        problems = self._problems()
        if problems:
            raise ConfigError([f"dataset {self.name!r}: {problem}" for problem in problems])
        object.__setattr__(self, "labels", self.labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def _problems(self) -> list[str]:
        rows = len(self.images)
        if rows == 0:
            return ["no images"]
        lengths = {"labels": len(self.labels), "split": len(self.split)}
        if self.paths is not None:
            lengths["paths"] = len(self.paths)
        problems = [f"{rows} images, but {n} {key}" for key, n in lengths.items() if n != rows]
        if not np.issubdtype(self.labels.dtype, np.integer):
            problems.append(f"labels must be integers, but got {self.labels.dtype}")
        if problems:
            return problems
        if isinstance(self.images, pa.Array) and self.images.null_count:
            empty = np.flatnonzero(self.images.is_null().to_numpy(zero_copy_only=False))
            problems.append(f"image without bytes: {shown([self.describe(row) for row in empty.tolist()])}")
        problems += self._label_problems()
        return problems + self._split_problems()

    def _label_problems(self) -> list[str]:
        problems = []
        present = set(np.unique(self.labels).tolist())
        expected = set(range(len(present)))
        if present != expected:
            problems.append(
                f"labels must run from 0 to {len(present) - 1} without a gap ({len(present)} classes); "
                f"missing: {shown(sorted(expected - present))}; too many: {shown(sorted(present - expected))}. "
                "Renumber the classes"
            )
        elif len(self.class_names) != len(present):
            problems.append(f"{len(present)} classes, but {len(self.class_names)} class names")
        if self.groups is not None and len(self.groups) != len(self.class_names):
            problems.append(f"{len(self.class_names)} class names, but {len(self.groups)} groups: one a class expected")
        return problems

    def _split_problems(self) -> list[str]:
        problems = []
        other = np.flatnonzero(~np.isin(self.split, SPLITS))
        if len(other):
            rows = [f"row {row} has {str(self.split[row])!r}" for row in other]
            problems.append(f"split must be 'train' or 'test', but {shown(rows)}")
        present = np.unique(self.labels)
        for split, word in (("train", "training"), ("test", "test")):
            missing = np.setdiff1d(present, self.labels[self.split == split])
            if len(missing):
                problems.append(f"class without {word} images: {shown([self.class_label(int(c)) for c in missing])}")
        return problems

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def class_label(self, label: int) -> str:
        """A class as messages name it: label and name."""
        known = 0 <= label < len(self.class_names)
        return f"{label} ({self.class_names[label]})" if known else str(label)

    def describe(self, row: int) -> str:
        """A row as messages name it: number and path."""
        path = self.paths[row] if self.paths is not None else None
        return f"row {row} ({path})" if path else f"row {row}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over labels, splits, names, groups and image bytes in row order; it identifies the data in keys.

        Names and paths of files are left out: the same data elsewhere is the same data.
        """
        total = hashlib.sha256(b"loda-dataset-1")
        for text in (*self.class_names, "\x00groups", *(self.groups or ())):
            total.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        total.update(self.labels.astype("<i8").tobytes())
        total.update((self.split == "train").tobytes())
        for image in self.scanned:
            total.update(image.sha256)
        return total.hexdigest()

    def encoded(self, row: int) -> Any:
        """The bytes of an encoded image: ``bytes`` or an Arrow buffer."""
        image = self.images[row]
        return image if isinstance(image, bytes) else image.as_buffer()

    @cached_property
    def scanned(self) -> list[Scanned]:
        """Hash and header check of each image, (N,), from one reading of all of them."""
        found = scan(self.encoded, len(self))
        if isinstance(self.images, FileImages):
            self.images.expect([image.sha256 for image in found])
        return found

    def verify(self, sample: int | None = None) -> None:
        """Read the headers of all images (with checksums where the format has them), without decoding pixels.

        Args:
            sample: look at this many rows only, evenly spread.

        Raises:
            ConfigError: every unreadable image, by row and path.
        """
        if sample is None or sample >= len(self):
            found = dict(enumerate(self.scanned))
        else:
            rows = np.linspace(0, len(self) - 1, sample).astype(int).tolist()
            found = dict(zip(rows, scan(lambda number: self.encoded(rows[number]), sample)))
        problems = [self._unreadable(row, image.problem) for row, image in found.items() if image.problem]
        if problems:
            more = len(problems) - 4 * _SHOWN
            hidden = [f"dataset {self.name!r}: and {more} more images that can't be read"] if more > 0 else []
            raise ConfigError(problems[: 4 * _SHOWN] + hidden)

    def _unreadable(self, row: int, reason: str) -> str:
        return (
            f"dataset {self.name!r}: the image in {self.describe(row)} can't be decoded "
            f"({reason}); replace it or leave the row out"
        )

    def decode(
        self, indices: Sequence[int] | np.ndarray, image_size: int, channels: int = 3, resize: int | None = None
    ) -> torch.Tensor:
        """Pixels of the asked rows.

        The short side is resized to ``resize``, by default ``image_size`` (bicubic, antialiased), and the centre is cut
        out; square images of that size are just resized. 1-bit images become grey first, or resizing would leave jagged
        black and white. Transparency is dropped; 16-bit grey keeps its upper 8 bits; the orientation tag of photographs
        is not applied, as is usual in published data pipelines. Ink stays dark or light as the file has it.

        Returns:
            uint8 (n, channels, image_size, image_size), in the order asked; ``channels`` is 3 (RGB) or 1 (grey).

        Raises:
            ConfigError: an image can't be decoded; the message names row and path.
        """
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, but got {channels}")
        rows = np.asarray(indices, dtype=np.int64)
        pixels_NCHW = torch.empty(len(rows), channels, image_size, image_size, dtype=torch.uint8)
        for position, row in enumerate(rows.tolist()):
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of {len(self)}")
            try:
                with Image.open(io.BytesIO(self.encoded(row))) as image:
                    array = np.array(_resize(_to_bytes(image, channels), resize or image_size, image_size))
            except Exception as error:  # as in scan
                raise ConfigError(self._unreadable(row, why_unreadable(error))) from error
            pixels = torch.from_numpy(array)
            pixels_NCHW[position] = pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return pixels_NCHW


def _to_bytes(image: Image.Image, channels: int) -> Image.Image:
    """8 bits a channel: "L" for grey images (copied to three channels only after resizing), else "RGB"."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"pixel mode {image.mode} is not supported; save it with 8 bits a channel")
        return Image.fromarray((values >> 8).astype(np.uint8))
    grey = channels == 1 or image.mode in ("1", "L", "LA")
    return image.convert("L" if grey else "RGB")


def _resize(image: Image.Image, short_side: int, size: int) -> Image.Image:
    """Short side to ``short_side``, then the centre ``size`` x ``size``."""
    width, height = image.size
    short = min(width, height)
    if short != short_side:
        width, height = (short_side * width // short, short_side * height // short)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image if (width, height) == (size, size) else image.crop((left, top, left + size, top + size))
