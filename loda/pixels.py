"""Decoded images of a data set in one memory-mapped Arrow file that all workers of a machine share."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor

from loda.datasets.base import ImageDataset
from loda.errors import ConfigError

LAYOUT = 1  # raise it when decoding or the file's layout changes
BATCH_ROWS = 256  # images a record batch: what one checksum covers and one thread decodes at a time

Progress = Callable[[int, int], None]


def cache_bytes(dataset: ImageDataset, size: int, channels: int) -> int:
    """Bytes of the pixels of all images at ``size`` x ``size``; the file is a few kB larger."""
    return len(dataset) * channels * size * size


def cache_path(dataset: ImageDataset, size: int, channels: int, directory: Path, resize: int | None = None) -> Path:
    """Where these pixels lie: named by the data's digest, so that other data never meets this file."""
    name = f"loda-pixels-{LAYOUT} {dataset.digest} {size} {channels}" + (f" {resize}" if resize else "")
    return directory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.arrow"


class PixelCache:
    """Pixels of every row of a data set, read through a memory map.

    Args:
        path: a file that :func:`open_pixels` wrote.
        rows: images that it must have.
        size: side of the images.
        channels: 3 or 1.

    Raises:
        ValueError: the file is damaged or not of this shape.
    """

    def __init__(self, path: Path, rows: int, size: int, channels: int) -> None:
        self.path = path
        self._shape = (channels, size, size)
        width = channels * size * size
        self._batches: list[np.ndarray] = []
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            for index in range(reader.num_record_batches):
                batch, metadata = reader.get_batch_with_custom_metadata(index)
                pixels = batch.column(0)
                if pixels.type != pa.binary(width):
                    raise ValueError(f"record batch {index} has {pixels.type}, expected {width} bytes an image")
                values = np.frombuffer(pixels.buffers()[1], dtype=np.uint8, count=len(pixels) * width)
                if metadata is None or metadata.get(b"crc32") != str(zlib.crc32(values.data)).encode():
                    raise ValueError(f"the checksum of record batch {index} is wrong")
                self._batches.append(values.reshape(len(pixels), width))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(str(error)) from error
        lengths = [len(batch) for batch in self._batches]
        if sum(lengths) != rows or any(length != BATCH_ROWS for length in lengths[:-1]):
            raise ValueError(f"{sum(lengths)} images, expected {rows}")

    def images(self, rows: np.ndarray) -> Tensor:
        """Pixels of these rows, uint8 (n, C, S, S), copied out of the map."""
        pixels_NP = np.empty((len(rows), int(np.prod(self._shape))), dtype=np.uint8)
        for position, row in enumerate(rows.tolist()):
            pixels_NP[position] = self._batches[row // BATCH_ROWS][row % BATCH_ROWS]
        return torch.from_numpy(pixels_NP).reshape(len(rows), *self._shape)


def check_limit(dataset: ImageDataset, size: int, channels: int, limit_bytes: int | None) -> None:
    """Whether the pixels may be kept, before anything is decoded.

    Raises:
        ConfigError: they take more than ``limit_bytes``.
    """
    needed = cache_bytes(dataset, size, channels)
    if limit_bytes is not None and needed > limit_bytes:
        raise ConfigError(
            f"compute.pixel_cache_gb: the decoded images of {dataset.name!r} take {needed} bytes, but the limit is "
            f"{limit_bytes}; raise it, or leave compute.pixel_cache out to keep them in each worker's memory"
        )


def open_pixels(
    dataset: ImageDataset,
    size: int,
    channels: int,
    directory: str | Path,
    *,
    resize: int | None = None,
    limit_bytes: int | None = None,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> PixelCache:
    """The data set's pixels, decoded now if nobody on this machine has yet.

    One process builds and the others wait for it. A file whose checksums are wrong is built anew.

    Args:
        directory: where such files are kept; made if missing.
        resize: as of :meth:`ImageDataset.decode`.
        limit_bytes: most that the file may take; None: no limit.
        threads: that decode (Pillow lets others run meanwhile); None: one a core that this process may use.
        on_progress: called with (images done, images in all).

    Raises:
        ConfigError: the pixels take more than ``limit_bytes``, the directory can't be written, or an image can't be
            decoded; the message names it.
    """
    check_limit(dataset, size, channels, limit_bytes)
    directory = Path(directory).expanduser()
    path = cache_path(dataset, size, channels, directory, resize)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            try:
                return PixelCache(path, len(dataset), size, channels)
            except ValueError:  # not there yet, or damaged
                cores = threads or len(os.sched_getaffinity(0))
                _build(dataset, size, channels, resize, path, cores, on_progress)
            return PixelCache(path, len(dataset), size, channels)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"compute.pixel_cache: {str(path)!r} can't be written or read back ({error}); give another directory"
        ) from error


def _build(
    dataset: ImageDataset,
    size: int,
    channels: int,
    resize: int | None,
    path: Path,
    threads: int,
    on_progress: Progress | None,
) -> None:
    partial = path.with_suffix(".partial")  # under the lock there is one writer
    width = channels * size * size
    parts = [np.arange(start, min(start + BATCH_ROWS, len(dataset))) for start in range(0, len(dataset), BATCH_ROWS)]
    schema = pa.schema([pa.field("pixels", pa.binary(width), nullable=False)])
    try:
        with (
            ThreadPoolExecutor(threads) as pool,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            # A few parts at a time: decoded pixels that wait to be written take memory.
            for start in range(0, len(parts), 2 * threads):
                group = parts[start : start + 2 * threads]
                for rows, images in zip(
                    group, pool.map(lambda rows: dataset.decode(rows, size, channels, resize), group), strict=True
                ):
                    values = images.numpy().reshape(-1)
                    column = pa.Array.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(values)])
                    batch = pa.record_batch([column], schema=schema)
                    writer.write_batch(batch, custom_metadata={"crc32": str(zlib.crc32(values.data))})
                    if on_progress is not None:
                        on_progress(int(rows[-1]) + 1, len(dataset))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
