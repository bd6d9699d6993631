"""Shared fixtures: a tiny image set of drawn shapes, and a tiny vision transformer to learn it with."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from loda.backbone import Backbone
from loda.settings import RunSettings
from loda.timm_models import build_backbone

SHAPES = ("circle", "square", "triangle", "cross", "ring", "stripes")
TRAIN_PER_CLASS, TEST_PER_CLASS, SIDE = 8, 4, 32
TINY_VIT: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "weights": "random",
    "image_size": SIDE,
    "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
ALL_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

SettingsFactory = Callable[..., RunSettings]
BackboneFactory = Callable[..., Backbone]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw_shape(shape: str, draws: np.random.Generator) -> Image.Image:
    """One 32 x 32 picture: the shape in a bright colour, anywhere, on a dark noisy ground."""
    ground = draws.integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    colour = tuple(int(value) for value in draws.integers(120, 256, 3))
    half = int(draws.integers(7, 12))
    x, y = (int(value) for value in draws.integers(half, SIDE - half, 2))
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
    elif shape == "cross":
        pen.line((x - half, y, x + half, y), fill=colour, width=4)
        pen.line((x, y - half, x, y + half), fill=colour, width=4)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=3)
    else:
        for row in range(y - half, y + half, 4):
            pen.line((x - half, row, x + half, row), fill=colour, width=2)
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def shapes_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of drawn shapes, 8 training and 4 test images each, as a Parquet file."""
    draws = np.random.default_rng(7)
    rows: dict[str, list[Any]] = {"image": [], "label": [], "label_name": [], "split": []}
    for label, shape in enumerate(SHAPES):
        for index in range(TRAIN_PER_CLASS + TEST_PER_CLASS):
            rows["image"].append({"bytes": _png(draw_shape(shape, draws)), "path": f"{shape}_{index}.png"})
            rows["label"].append(label)
            rows["label_name"].append(shape)
            rows["split"].append("train" if index < TRAIN_PER_CLASS else "test")
    path = tmp_path_factory.mktemp("shapes") / "shapes.parquet"
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture(scope="session")
def tiny_settings(shapes_parquet: Path) -> SettingsFactory:
    """Settings of a run that takes a fraction of a second; sections given by keyword are merged into them."""

    def build(**sections: Mapping[str, Any]) -> RunSettings:
        values: dict[str, dict[str, Any]] = {
            "stream": {"dataset": f"parquet:{shapes_parquet}", "tasks": 3, "partition": "random", "validation": 0.25},
            "backbone": {**TINY_VIT, "target": ["attn.qkv", "mlp.fc2"]},
            "method": {"name": "loda", "rank_general": 4, "rank_isolated": 4},
            "training": {"epochs": 2, "batch_size": 6, "lr": 0.05},
            "head": {},
            "compute": {"device": "cpu", "threads": 1, "batch_size": 16},
        }
        for name, given in sections.items():
            other_method = name == "method" and given.get("name", "loda") != "loda"
            values[name] = dict(given) if other_method else {**values[name], **given}
        return RunSettings(**values)  # type: ignore[arg-type]

    return build


@pytest.fixture
def tiny_backbone() -> BackboneFactory:
    """A fresh tiny ViT (width 32, two blocks), adapted at the given layers, by default at all four kinds."""

    def build(target: tuple[str, ...] = ALL_TARGETS) -> Backbone:
        return build_backbone(**TINY_VIT, target=target)

    return build
