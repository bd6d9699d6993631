"""Data sources of other packages."""

from __future__ import annotations

import io
import logging
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

import loda.datasets
from loda.datasets import ImageDataset, dataset_names, load_dataset
from loda.errors import ConfigError


def problem_of(spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_dataset(spec)
    (problem,) = caught.value.problems
    return problem


def make_plug_in(label: str = "one") -> ImageDataset:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(buffer, "PNG")
    image = buffer.getvalue()
    return ImageDataset("plug", [image, image], np.zeros(2, dtype=np.int64), [label], np.array(["train", "test"]))


def not_a_dataset() -> int:
    return 3


def raises() -> ImageDataset:
    raise RuntimeError("disk on fire")


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {
        "mine": f"{__name__}:make_plug_in",
        "broken": "no_such_module:make",
        "wrong": f"{__name__}:not_a_dataset",
        "burns": f"{__name__}:raises",
        "parquet": f"{__name__}:make_plug_in",
    }
    entries = [metadata.EntryPoint(name, value, loda.datasets.ENTRY_POINTS) for name, value in targets.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)


def test_registered_sources_load_with_and_without_argument(plug_ins: None) -> None:
    assert load_dataset("mine").class_names == ["one"]
    assert load_dataset("mine:two").class_names == ["two"]
    assert {"alphabets", "parquet", "mine", "broken"} <= set(dataset_names())


def test_broken_plug_ins_are_logged_and_do_not_hinder_others(plug_ins: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        problem = problem_of("broken")
    assert "doesn't load: ModuleNotFoundError" in problem and "'broken'" in caplog.text
    with pytest.raises(ConfigError, match="no file"):
        load_dataset("parquet:none.parquet")  # the built-in name isn't taken over
    assert load_dataset("mine").name == "plug"


def test_plug_ins_that_misbehave_are_bad_input(plug_ins: None) -> None:
    problem = problem_of("wrong")
    assert "returned int" in problem
    problem = problem_of("burns")
    assert "disk on fire" in problem
