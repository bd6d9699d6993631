"""``orchestrate data check``: what is there, what is wrong, and the line for a study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.studies import call, study_values, write_study
from tests.loda.test_image_sources import layout


class Check:
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.capture = folder, patch, capture

    def __call__(self, *words: str):  # type: ignore[no-untyped-def]
        return call(self.folder, "data", "check", *words, patch=self.patch, capture=self.capture)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    layout(tmp_path / "birds")
    return Check(tmp_path, monkeypatch, capsys)


def test_a_sound_folder_is_counted_and_gives_the_line_for_a_study(check: Check) -> None:
    done = check("birds", "--json")
    assert done.code == 0, done.err
    values = json.loads(done.out)
    assert values["wrong"] == [] and values["classes"] == 3
    assert values["images"] == {"train": 9, "test": 6}
    text = check("birds").out
    assert "folder:" in text and "birds" in text


def test_what_is_wrong_is_named_and_is_the_exit_code(check: Check) -> None:
    root = check.folder / "birds"
    (root / "train/cat/cat-1.png").write_bytes(b"not an image")
    shutil.copy(root / "train/dog/dog-0.png", root / "test/dog/dog-9.png")
    (root / "train/notes.txt").write_text("-")
    done = check("birds")
    assert done.code == 1
    assert "train/cat/cat-1.png" in done.out and "dog-9.png" in done.out


def test_a_known_set_of_another_size_is_told_and_not_taken_for_wrong(check: Check) -> None:
    (check.folder / "birds").rename(check.folder / "imagenet-r")
    done = check("imagenet-r")
    assert done.code == 0  # a part of it may be what is wanted
    assert "24000" in done.out.replace(",", "") and "ImageNet-R" in done.out


@pytest.mark.parametrize("word", ["absent", "birds/train/cat/cat-0.png"])
def test_what_is_no_data_set_is_bad_input(check: Check, word: str) -> None:
    done = check(word)
    assert done.code == 2 and word.split("/")[-1] in done.err and "Traceback" not in done.err


def test_a_study_on_a_folder_equals_the_same_images_in_a_parquet_file(check: Check, shapes_parquet: Path) -> None:
    import pyarrow.parquet as pq

    root = check.folder / "shapes"
    for index, row in enumerate(pq.read_table(shapes_parquet).to_pylist()):
        file = root / row["split"] / f"{row['label']:02d} {row['label_name']}" / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"]["bytes"])
    found = []
    for name, dataset in (("a", f"folder:{root}"), ("b", f"parquet:{shapes_parquet}")):
        stream = study_values(shapes_parquet)["stream"] | {"dataset": dataset, "validation": 0}
        write_study(check.folder / name, shapes_parquet, mlflow=False, stream=stream)
        done = call(
            check.folder / name, "run", "study.yaml", "--local", "--json", patch=check.patch, capture=check.capture
        )
        assert done.code == 0, done.err
        found.append(done.values["a_last"]["per_order"])
    assert found[0] == found[1]
