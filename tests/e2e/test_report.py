"""``orchestrate report``: what it says of a finished study, of one that lacks orders, and of one that hasn't ended."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from orchestrate.report import make_report
from orchestrate.report_data import OrderAccuracy, complete_order, read_report_data
from orchestrate.report_sections import headline, sections, status
from tests.e2e.conftest import Searched
from tests.e2e.studies import Done, call


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(folder: Path, *words: str) -> Done:
        return call(folder, *words, patch=monkeypatch, capture=capsys)

    return run


def without(runs: Path, order: str, cells: int | None = None) -> None:
    """Take an evaluation order's rows, all or the last few, out of the tables."""
    rows = pd.read_parquet(runs / "results.parquet")
    own = rows.index[(rows["order_name"] == order) & (rows["trial"] == "chosen")]
    rows.drop(own if cells is None else own[-cells:]).to_parquet(runs / "results.parquet", index=False)


def test_json_names_what_was_written(searched: Searched, command: Callable[..., Done], tmp_path: Path) -> None:
    searched.copy(tmp_path)
    done = command(tmp_path, "report", "tiny", "--output", "elsewhere/page.html", "--json").values
    assert done["report"] == "elsewhere/page.html"
    page = (tmp_path / "elsewhere" / "page.html").read_bytes()
    assert len(page) == done["bytes"] < 1_500_000
    assert done["complete"] is True
    assert done["orders"] == {"complete": 5, "planned": 5}
    assert all((tmp_path / path).stat().st_size > 1000 for path in done["figures"])
    assert {Path(path).suffix for path in done["figures"]} == {".svg", ".png"}


def test_the_page_asks_nobody_for_anything(searched: Searched) -> None:
    page = (searched.runs / "report.html").read_text()
    assert "<script" not in page
    named = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert named <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#|data:)[^\s\"'>)]+", page)


def test_the_same_study_gives_the_same_bytes(searched: Searched, tmp_path: Path) -> None:
    make_report(searched.runs, tmp_path / "one.html")
    make_report(searched.runs, tmp_path / "two.html")
    one, two = ((tmp_path / f"{name}.html").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("cells", [None, 1], ids=["an-order", "one-accuracy"])
def test_nothing_is_averaged_while_an_order_is_missing(searched: Searched, tmp_path: Path, cells: int | None) -> None:
    runs = searched.copy(tmp_path)
    lost, *kept = searched.values["orders"]
    without(runs, lost, cells)
    data = read_report_data(runs)
    assert not data.complete
    assert "4 of 5 evaluation orders are complete" in status(data)
    assert [label for label, _, _ in headline(data).rows] == kept
    means = [np.mean([one.summary.a_last for one in data.evaluated]), searched.values["a_last"]["mean"]]
    page = (tmp_path / "page.html", make_report(runs, tmp_path / "page.html"))[0].read_text()
    assert not [mean for mean in means if f"{mean:.2f} %" in page]
    assert "mean over orders" not in page
    assert {path.stem for path in (runs / "figures").glob("*.svg")}.isdisjoint(
        {"order-effects", "disparity", "accuracy-matrix", "position-and-predecessor"}
    )


def test_a_study_that_has_not_ended_says_how_much_is_there(
    searched: Searched, command: Callable[..., Done], tmp_path: Path
) -> None:
    """Its search has ended and some stages of its evaluation are stored, but the process was killed before the end."""
    runs = searched.copy(tmp_path)
    for name in ("summary.json", "results.parquet", "timings.parquet", "facts.parquet"):
        (runs / name).unlink()
    stages = shutil.copytree(searched.folder / "stages", tmp_path / "stages")
    study = yaml.safe_load((runs / "study.yaml").read_text())
    study["resources"]["store"] = str(stages)
    (runs / "study.yaml").write_text(yaml.safe_dump(study))
    lost = _last_evaluation(searched)
    shutil.rmtree(next(stages.glob(f"*/{lost}")))

    assert command(tmp_path, "report", "tiny", "--json").values["orders"] == {"complete": 4, "planned": 5}
    page = (runs / "report.html").read_text()
    assert "4 of 5 evaluation orders are complete, 6 of 6 trials of the search have ended" in page
    assert "2 of 3 stages stored" in page
    assert "orchestrate resume tiny" in page
    assert f"{searched.values['a_last']['mean']:.2f} %" not in page
    for name, score in list(searched.values["a_last"]["per_order"].items())[:-1]:
        assert re.search(rf"{name}</th><td>{score:.2f} %", page), name


def _last_evaluation(searched: Searched) -> str:
    timings = pd.read_parquet(searched.runs / "timings.parquet")
    order = list(searched.values["orders"].values())[-1]
    own = timings[(timings["step"] == "evaluate") & (timings["trial"] == "chosen")]
    (key,) = own.loc[own["prefix"].map(list).map(lambda prefix: prefix == order), "key"]
    return str(key)


def test_report_of_nothing_is_bad_input(command: Callable[..., Done], tmp_path: Path) -> None:
    done = command(tmp_path, "report", "nowhere")
    assert done.code == 2
    assert "no study 'nowhere'" in done.err


def test_output_that_cannot_be_written_is_bad_input(
    searched: Searched, command: Callable[..., Done], tmp_path: Path
) -> None:
    searched.copy(tmp_path)
    (tmp_path / "file").write_text("")
    done = command(tmp_path, "report", "tiny", "--output", "file/page.html")
    assert done.code == 2
    assert "--output: can't write" in done.err


def test_a_damaged_table_is_named(searched: Searched, command: Callable[..., Done], tmp_path: Path) -> None:
    runs = searched.copy(tmp_path)
    (runs / "results.parquet").write_bytes(b"PAR1 and nothing else")
    done = command(tmp_path, "report", "tiny")
    assert done.code == 2
    assert "results.parquet can't be read" in done.err


def test_a_name_with_markup_stays_text(searched: Searched, tmp_path: Path) -> None:
    runs = searched.copy(tmp_path)
    summary = json.loads((runs / "summary.json").read_text())
    summary["tasks"][0] = "<b>&task</b>"
    (runs / "summary.json").write_text(json.dumps(summary))
    make_report(runs)
    page = (runs / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;task&lt;/b&gt;" in page


def test_class_orders_are_not_compared_task_by_task(searched: Searched, tmp_path: Path) -> None:
    runs = searched.copy(tmp_path)
    plan = json.loads((runs / "orders.json").read_text())
    (runs / "orders.json").write_text(json.dumps(plan | {"kind": "class"}))
    (part,) = (section for section in sections(read_report_data(runs)) if section.name == "orders")
    assert part.charts == ()
    assert "tasks of its own" in part.missing


def test_an_order_without_all_its_accuracies_is_none() -> None:
    full = pd.DataFrame({"i": [0, 1, 1], "j": [0, 0, 1], "accuracy": [50.0, 40.0, 75.0], "images": [10, 10, 30]})
    one = complete_order("evaluate-1-0", (1, 0), full)
    assert isinstance(one, OrderAccuracy)
    assert one.summary.a_last == pytest.approx((0.4 * 10 + 0.75 * 30) / 40 * 100, abs=0.005)
    assert one.by_task() == {1: 40.0, 0: 75.0}
    for row in range(3):
        assert complete_order("evaluate-1-0", (1, 0), full.drop(row)) is None


def test_a_joint_method_has_one_row_in_task_order() -> None:
    rows = pd.DataFrame({"i": [0, 0], "j": [0, 1], "accuracy": [50.0, 80.0], "images": [10, 30]})
    one = complete_order("evaluate-1-0", (1, 0), rows)
    assert one is not None
    assert one.joint
    assert one.by_task() == {0: 50.0, 1: 80.0}
    assert one.summary.a_last == pytest.approx(72.5)
