"""Bad input: a clear message before any work, exit code 2, no traceback, nothing written to the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.e2e.studies import Done, call, write_study

Refused = Callable[..., str]
Change = Callable[[list[dict[str, Any]]], object]


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """A copy of the image table with its rows changed in place, or columns renamed."""
    rows = pq.read_table(source).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target


@pytest.fixture
def refused(
    tmp_path: Path,
    shapes_parquet: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Run a command over a study with the given sections; its message, once it was refused as it should be."""

    def run(
        *,
        words: tuple[str, ...] = ("run", "study.yaml", "--local", "--json"),
        parquet: Path | None = None,
        **sections: Any,
    ) -> str:
        write_study(tmp_path, parquet or shapes_parquet, **sections)
        done: Done = call(tmp_path, *words, patch=monkeypatch, capture=capsys)
        assert done.code == 2, (done.code, done.out, done.err)
        assert done.out == ""
        assert "Traceback" not in done.err
        store = tmp_path / "stages"
        assert not store.is_dir() or not any(path.is_file() for path in store.rglob("*"))
        return done.err

    return run


def assert_says(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in:\n{message}"


def test_a_missing_study_file_is_named_with_what_there_is(refused: Refused) -> None:
    assert_says(refused(words=("run", "absent.yaml")), "no study file 'absent.yaml'", "alphabets")


def test_a_study_file_that_is_not_yaml(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: [unclosed")
    assert_says(refused(words=("plan", "broken.yaml")), "broken.yaml", "not valid YAML")


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"training": {"epoch": 3}}, ["training.epoch", "did you mean 'epochs'"]),
        ({"trainin": {"epochs": 3}}, ["trainin", "did you mean 'training'"]),
        ({"stream": {"tasks": 7}}, ["7", "6 classes"]),
        ({"method": {"rank_general": 33}}, ["method.rank_general", "33", "32"]),
        ({"method": {"name": "lora"}}, ["method", "'lora'", "loda"]),
        ({"search": {"objective": {"metric": "accuracy"}}}, ["search.objective.metric", "a_avg", "'accuracy'"]),
        ({"training": {"seed": -1}}, ["training.seed", "-1"]),
        ({"orders": {"evaluate": 7}}, ["orders", "6"]),
        ({"stream": {"dataset": "parquet:absent.parquet"}}, ["absent.parquet", "no file"]),
        ({"stream": {"dataset": "alphabet"}}, ["no dataset 'alphabet'", "did you mean 'alphabets'"]),
        ({"backbone": {"name": "vit_tiny_patch16_225"}}, ["backbone.name", "vit_tiny_patch16_22"]),
        ({"backbone": {"weights": "absent.safetensors"}}, ["backbone.weights", "absent.safetensors"]),
        ({"backbone": {"target": ["attn.kqv"]}}, ["backbone.target", "attn.kqv"]),
        ({"tracking": {"uri": "http://127.0.0.1:1"}}, ["tracking.uri", "http://127.0.0.1:1"]),
        ({"resources": {"executor": "inline", "workers": 2}}, ["resources.executor", "workers"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_named(refused: Refused, sections: dict[str, Any], parts: list[str]) -> None:
    assert_says(refused(**sections), *parts)


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_an_unknown_search_space(refused: Refused, command: str) -> None:
    message = refused(words=(command, "study.yaml"), search={"space": "loda-smal"})
    assert_says(message, "search.space", "'loda-smal'", "did you mean 'loda-small'")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("method.rank_isolate", ["method.rank_isolate", "no such setting", "method.rank_isolated"]), ("method.depth", [])],
)
def test_a_search_space_that_names_a_setting_the_method_has_not(
    refused: Refused, tmp_path: Path, name: str, parts: list[str]
) -> None:
    space = {"method": "loda", "parameters": {name: {"type": "categorical", "choices": [2, 4]}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(space))
    message = refused(words=("sweep", "study.yaml"), search={"space": "other.yaml"})
    assert_says(message, name, "no such setting", *parts)


def test_a_search_space_whose_ranks_exceed_the_width(refused: Refused, tmp_path: Path) -> None:
    space = {"method": "loda", "parameters": {"method.rank_isolated": {"type": "categorical", "choices": [4, 64]}}}
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(space))
    message = refused(words=("plan", "study.yaml"), search={"space": "wide.yaml"})
    assert_says(message, "method.rank_isolated", "64", "width 32")


def test_a_wrong_column(refused: Refused, shapes_parquet: Path, tmp_path: Path) -> None:
    def rename(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["class_name"] = row.pop("label_name")

    message = refused(parquet=rewritten(shapes_parquet, tmp_path / "renamed.parquet", rename))
    assert_says(message, "renamed.parquet", "no column 'label_name'", "class_name")


def test_an_undecodable_image_is_named_with_its_row(refused: Refused, shapes_parquet: Path, tmp_path: Path) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[17]["image"]["bytes"] = rows[17]["image"]["bytes"][:60]

    path = pq.read_table(shapes_parquet).to_pylist()[17]["image"]["path"]
    message = refused(parquet=rewritten(shapes_parquet, tmp_path / "damaged.parquet", damage))
    assert_says(message, "row 17", path, "can't be decoded")


def test_damaged_pixels_behind_a_good_header_are_found_before_training(
    refused: Refused, shapes_parquet: Path, tmp_path: Path
) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        content = bytearray(rows[17]["image"]["bytes"])
        content[len(content) // 2] ^= 0xFF
        rows[17]["image"]["bytes"] = bytes(content)

    message = refused(parquet=rewritten(shapes_parquet, tmp_path / "damaged.parquet", damage))
    assert_says(message, "row 17", "can't be decoded")


def test_a_class_without_training_images(refused: Refused, shapes_parquet: Path, tmp_path: Path) -> None:
    def untrain(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["label_name"] == "ring":
                row["split"] = "test"

    message = refused(parquet=rewritten(shapes_parquet, tmp_path / "untrained.parquet", untrain))
    assert_says(message, "class without training images", "ring")


def test_weights_that_do_not_fit_the_backbone(refused: Refused, tmp_path: Path) -> None:
    save_file({"cls_token": torch.zeros(1, 1, 16)}, tmp_path / "other.safetensors")
    message = refused(backbone={"weights": str(tmp_path / "other.safetensors")})
    assert_says(message, "backbone.weights", "other.safetensors", "doesn't fit", "cls_token")


def test_a_store_that_can_not_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert_says(refused(resources={"store": "taken"}), "taken")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_run_folder_that_can_not_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    assert_says(refused(resources={"runs": "occupied"}), "resources.runs", "occupied")


def test_several_problems_come_in_one_message(refused: Refused) -> None:
    message = refused(training={"seed": -1, "epochs": 0, "rate": 1}, orders={"tune": 0}, stream={"validation": 1.5})
    assert_says(message, "training.seed", "training.epochs", "training.rate", "orders.tune", "stream.validation")


def test_problems_of_data_backbone_and_method_come_in_one_message(refused: Refused, tmp_path: Path) -> None:
    message = refused(
        words=("sweep", "study.yaml"),
        stream={"dataset": "parquet:absent.parquet"},
        method={"rank_isolated": 33},
        search={"space": "absent.yaml"},
    )
    assert_says(message, "absent.parquet", "method.rank_isolated", "search.space")


@pytest.mark.parametrize(
    ("change", "part"),
    [("training.lr", "KEY=VALUE"), ("training.lrr=0.1", "did you mean 'lr'"), ("trainin.lr=0.1", "'training.lr'")],
)
def test_a_bad_replacement_on_the_command_line(refused: Refused, change: str, part: str) -> None:
    assert_says(refused(words=("run", "study.yaml", "--local", "-s", change)), part)


@pytest.mark.parametrize("command", [("show", "nothing"), ("resume", "nothing"), ("export", "nothing", "model")])
def test_a_study_that_was_never_run(refused: Refused, command: tuple[str, ...]) -> None:
    assert_says(refused(words=command), "no study 'nothing'")
