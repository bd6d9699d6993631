"""Decoded once, shared by all: the same pixels as decoding gives, and never damaged ones."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loda.datasets import ImageDataset
from loda.errors import ConfigError
from loda.pixels import BATCH_ROWS, cache_bytes, cache_path, open_pixels
from loda.settings import RunSettings
from loda.workbench import open_workbench

ROWS, SIZE = BATCH_ROWS + 9, 12


@pytest.fixture(scope="module")
def photos() -> ImageDataset:
    draws = np.random.default_rng(0)
    files = []
    for _ in range(ROWS):
        buffer = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    labels = np.arange(ROWS) % 2
    splits = ["train", "train", "test", "test"] * (ROWS // 4) + ["test"]
    return ImageDataset("photos", files, labels, ["a", "b"], np.array(splits))


def test_pixels_are_those_of_decoding_in_any_order(photos: ImageDataset, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    cache = open_pixels(photos, SIZE, 3, tmp_path, threads=2, on_progress=lambda *step: steps.append(step))
    rows = np.random.default_rng(1).permutation(ROWS)
    assert torch.equal(cache.images(rows), photos.decode(rows, SIZE))
    assert steps == [(BATCH_ROWS, ROWS), (ROWS, ROWS)]
    assert cache.path.stat().st_size == pytest.approx(cache_bytes(photos, SIZE, 3), abs=8192)


def test_it_is_built_once_for_all_that_ask_at_the_same_time(photos: ImageDataset, tmp_path: Path) -> None:
    built: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(open_pixels, photos, SIZE, 3, tmp_path, on_progress=lambda done, _: built.append(done))
            for _ in range(4)
        ]
    assert built == [BATCH_ROWS, ROWS]
    assert len({future.result().path for future in asked}) == 1
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_built_anew(photos: ImageDataset, tmp_path: Path, damage: str) -> None:
    path = open_pixels(photos, SIZE, 3, tmp_path).path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    built: list[int] = []
    cache = open_pixels(photos, SIZE, 3, tmp_path, on_progress=lambda done, _: built.append(done))
    assert built
    assert torch.equal(cache.images(np.arange(ROWS)), photos.decode(np.arange(ROWS), SIZE))


def test_an_undecodable_image_is_named_and_nothing_is_left(photos: ImageDataset, tmp_path: Path) -> None:
    files = photos.images.to_pylist()
    files[BATCH_ROWS + 3] = files[BATCH_ROWS + 3][:300]
    broken = ImageDataset("photos", files, photos.labels, photos.class_names, photos.split)
    with pytest.raises(ConfigError, match=f"row {BATCH_ROWS + 3}"):
        open_pixels(broken, SIZE, 3, tmp_path)
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob("*.partial"))


def test_a_limit_too_low_says_what_is_needed(photos: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"take {cache_bytes(photos, SIZE, 3)} bytes"):
        open_pixels(photos, SIZE, 3, tmp_path, limit_bytes=1000)
    assert not cache_path(photos, SIZE, 3, tmp_path).exists()


def test_a_workbench_reads_the_same_images_under_the_same_key(tmp_path: Path) -> None:
    plain = open_workbench(RunSettings())
    cached = open_workbench(RunSettings.model_validate({"compute": {"pixel_cache": str(tmp_path)}}))
    assert cached.root_key == plain.root_key
    assert not list(tmp_path.glob("*.arrow"))  # opened, as a plan does, and nothing decoded
    rows = plain.splits["test"][::97]
    assert torch.equal(cached.images(rows), plain.images(rows))
    assert len(list(tmp_path.glob("*.arrow"))) == 1
