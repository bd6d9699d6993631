"""``orchestrate run --local`` and what can be asked about a study that was run, through the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import loda
from loda.workbench import open_workbench
from orchestrate.study import load_study
from tests.e2e.studies import TASKS, Done, call, orchestrate, write_study
from tests.orchestrate.test_merged import plain_timm

ORDERS = 2
RUN = ("run", "study.yaml", "--local", "--json")


@dataclass(frozen=True)
class Finished:
    folder: Path
    values: dict[str, Any]

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "tiny"

    def copy(self, target: Path) -> Path:
        return shutil.copytree(self.folder, target)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes_parquet: Path) -> Finished:
    """A run in a new folder, as a first-time user has it: without an MLflow database."""
    folder = tmp_path_factory.mktemp("run")
    write_study(folder, shapes_parquet, mlflow=False)
    return Finished(folder, orchestrate(folder, *RUN).values)


class InProcess:
    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capture = patch, capture

    def __call__(self, folder: Path, *words: str) -> Done:
        return call(folder, *words, patch=self.patch, capture=self.capture)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess(monkeypatch, capsys)


def test_the_document_holds_all_that_a_program_needs(finished: Finished) -> None:
    values = finished.values
    assert values["study"] == "tiny"
    assert len(values["orders"]) == ORDERS
    assert all(sorted(order) == list(range(TASKS)) for order in values["orders"].values())
    for metric in ("a_last", "a_avg"):
        by_order = values[metric]["per_order"]
        assert set(by_order) == set(values["orders"])
        assert values[metric]["mean"] == pytest.approx(sum(by_order.values()) / ORDERS)
    # The two orders may share their first stages: those are asked for twice and run once.
    orders = list(values["orders"].values())
    distinct = {tuple(order[: i + 1]) for order in orders for i in range(TASKS)}
    assert values["stages_requested"] == ORDERS * TASKS
    assert values["stages_run"] == len(distinct)
    assert values["stages_reused"] == ORDERS * TASKS - len(distinct)
    assert set(values["state_digests"]) == set(values["orders"])
    assert len(set(values["state_digests"].values())) == ORDERS
    assert 0 < values["stage_seconds"] < values["wall_seconds"]
    assert json.loads((finished.runs / "summary.json").read_text()) == values


def test_tables_hold_every_accuracy_and_every_step(finished: Finished) -> None:
    results = pd.read_parquet(finished.runs / "results.parquet")
    assert results.groupby("order_name").size().to_dict() == dict.fromkeys(
        finished.values["orders"], TASKS * (TASKS + 1) // 2
    )
    assert set(results["split"]) == {"test"}
    for name, rows in results.groupby("order_name"):
        matrix = finished.values["accuracy_matrix"][name]
        assert {(r.i, r.j): r.accuracy for r in rows.itertuples()} == {
            (i, j): matrix[i][j] for i in range(TASKS) for j in range(i + 1)
        }
        last = rows[rows["i"] == TASKS - 1]
        weighted = (last["accuracy"] * last["images"]).sum() / last["images"].sum()
        assert last["images"].sum() == 24
        assert finished.values["a_last"]["per_order"][name] == pytest.approx(weighted, abs=0.01)
    timings = pd.read_parquet(finished.runs / "timings.parquet")
    assert len(timings) == timings["key"].nunique() == finished.values["steps_run"]
    assert (timings["seconds"] > 0).all()


def test_the_library_alone_gives_the_same_bits(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    for name, order in finished.values["orders"].items():
        result = loda.run_sequence("study.yaml", order)
        assert result.state_digest == finished.values["state_digests"][name]
        assert result.summary.a_last == finished.values["a_last"]["per_order"][name]


def test_a_second_run_computes_nothing(finished: Finished, tmp_path: Path) -> None:
    again = orchestrate(finished.copy(tmp_path / "again"), *RUN).values
    assert again["stages_run"] == again["steps_run"] == 0
    assert again["stages_reused"] == again["stages_requested"] == ORDERS * TASKS
    for key in ("state_digests", "accuracy_matrix", "a_last", "a_avg", "orders", "study_digest"):
        assert again[key] == finished.values[key], key


@pytest.mark.parametrize(("words", "result"), [("run", "summary.json"), ("robustness", "robustness.json")])
def test_resume_goes_on_with_the_command_that_was_interrupted(
    words: str, result: str, tmp_path: Path, shapes_parquet: Path, command: InProcess
) -> None:
    write_study(tmp_path, shapes_parquet, orders={"evaluate": 1})
    before = command(tmp_path, words, "study.yaml", "--local", "--json").values
    (tmp_path / "runs" / "tiny" / result).unlink()
    after = command(tmp_path, "resume", "tiny", "--json").values
    assert after["steps_run"] == 0
    assert after["state_digests"] == before["state_digests"]
    assert ("spread" in after) == (words == "robustness")
    assert (tmp_path / "runs" / "tiny" / result).is_file()


def _flip(folder: Path, step: str, position: int) -> str:
    """Flip one bit in the middle of a stored step's tensors; returns the step's key."""
    timings = pd.read_parquet(folder / "runs" / "tiny" / "timings.parquet")
    chosen = timings[(timings["step"] == step) & (timings["position"] == position)]
    key = str(chosen.iloc[0]["key"])
    file = folder / "stages" / key[:2] / key / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(bytes(content))
    return key


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("step", "position"), [("consolidate", 0), ("consolidate", TASKS - 1), ("evaluate", 0), ("evaluate", TASKS - 1)]
)
def test_a_flipped_bit_is_computed_again_with_a_warning(
    finished: Finished,
    tmp_path: Path,
    step: str,
    position: int,
    command: InProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = finished.copy(tmp_path / "damaged")
    key = _flip(folder, step, position)
    values = command(folder, *RUN).values
    assert f"{key} is damaged" in caplog.text
    for name in ("state_digests", "accuracy_matrix", "a_last", "a_avg"):
        assert values[name] == finished.values[name], name
    assert values["steps_run"] == 1
    assert values["stages_run"] == 1


@pytest.mark.chaos
def test_the_warning_about_a_damaged_stage_reaches_the_user(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "damaged")
    key = _flip(folder, "consolidate", TASKS - 1)
    done = orchestrate(folder, *RUN)
    assert done.values["state_digests"] == finished.values["state_digests"]
    assert key in done.err
    assert "is damaged" in done.err


def test_list_names_the_run_and_what_is_bundled(finished: Finished, command: InProcess) -> None:
    values = command(finished.folder, "list", "--json").values
    assert "alphabets" in values["bundled_studies"]
    assert {"loda", "loda-small", "gao"} <= set(values["search_spaces"])
    assert {"loda", "sequential", "joint", "simplecil"} <= set(values["methods"])
    (row,) = values["runs"]
    assert (row["study"], row["state"]) == ("tiny", "finished")
    assert row["a_last"] == finished.values["a_last"]["mean"]


def test_show_repeats_the_document(finished: Finished, command: InProcess) -> None:
    for name in ("tiny", "study.yaml", "runs/tiny"):
        assert command(finished.folder, "show", name, "--json").values == finished.values


def test_plan_knows_what_is_stored(finished: Finished, command: InProcess, tmp_path: Path) -> None:
    values = command(finished.folder, "plan", "study.yaml", "--json").values
    stages = (2 * 1 + ORDERS) * TASKS  # two trials over one tune order, then the evaluation orders
    assert values["stages_requested"] == stages
    assert values["orders"]["evaluate"] == list(finished.values["orders"].values())
    assert values["stored_steps"] >= finished.values["steps_run"]
    assert 0 < values["steps_to_run"] < values["steps_requested"]
    assert values["expected_worker_seconds"] > 0
    empty = command(finished.folder, "plan", "study.yaml", "-s", f"resources.store={tmp_path}", "--json").values
    assert empty["stored_steps"] == 0
    assert empty["steps_to_run"] > values["steps_to_run"]


def test_methods_list_their_settings(finished: Finished, command: InProcess) -> None:
    rows = {row["name"]: row for row in json.loads(command(finished.folder, "methods", "--json").out)}
    assert {"rank_general", "rank_isolated", "rho_max", "recalibration"} <= set(rows["loda"]["settings"])
    assert rows["joint"]["joint"] is True


def test_doctor_finds_the_study_in_order(finished: Finished, command: InProcess) -> None:
    checks = {c["name"]: c for c in command(finished.folder, "doctor", "study.yaml", "--json").values["checks"]}
    assert all(check["ok"] for check in checks.values()), checks
    assert "3 tasks, 6 classes, 72 images" in checks["study"]["found"]


def test_doctor_reports_a_study_that_can_not_run(finished: Finished, command: InProcess, tmp_path: Path) -> None:
    write_study(tmp_path, finished.folder / "absent.parquet")
    done = command(tmp_path, "doctor", "study.yaml", "--json")
    assert done.code == 2
    checks = {check["name"]: check for check in json.loads(done.out)["checks"]}
    assert not checks["study"]["ok"]
    assert "absent.parquet" in checks["study"]["found"]
    assert checks["packages"]["ok"]


def test_the_export_predicts_the_same_in_plain_timm(
    finished: Finished, command: InProcess, tmp_path: Path, shapes_parquet: Path
) -> None:
    name = list(finished.values["orders"])[1]
    values = command(finished.folder, "export", "tiny", str(tmp_path / "model"), "--order", name, "--json").values
    found = plain_timm(tmp_path / "model", shapes_parquet)
    assert found["foreign"] == []
    assert sorted(values["config"]["label_names"]) == sorted(found["right"])
    bench = open_workbench(load_study(finished.folder / "study.yaml").run_settings())
    right = {
        task.name: sum(found["right"][bench.dataset.class_names[label]] for label in task.classes)
        for task in bench.tasks
    }
    results = pd.read_parquet(finished.runs / "results.parquet")
    last = results[(results["order_name"] == name) & (results["i"] == TASKS - 1)]
    assert {r.task: round(r.accuracy * r.images / 100) for r in last.itertuples()} == right
    assert 100 * sum(right.values()) / 24 == pytest.approx(finished.values["a_last"]["per_order"][name], abs=0.01)


@pytest.mark.parametrize("method", ["gainlora", "mtllora"])
def test_a_method_that_leaves_no_plain_model_runs_and_says_so(
    method: str, command: InProcess, tmp_path: Path, shapes_parquet: Path
) -> None:
    write_study(tmp_path, shapes_parquet)
    done = command(tmp_path, "run", "study.yaml", "--local", "-s", f"method.name={method}", "-s", "method.rank=4")
    assert done.code == 0, done.err
    assert f"none registered: of {method}" in " ".join(done.out.split())
    values = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert values["export_refusal"] and values["model_version"] is None
    # Only a method that is told each image's task has a second figure, and both are named for what they are.
    told = method == "mtllora"
    assert ("a_last_without_task_id" in values) == told
    assert ("A_last, task not told" in done.out) == told
    if told:
        without = values["a_last_without_task_id"]
        assert set(without["per_order"]) == set(values["orders"])
        assert all(0 <= score <= 100 for score in without["per_order"].values())
    assert not (tmp_path / "runs" / "tiny" / "model").exists()
    done = command(tmp_path, "export", "tiny", "model")
    assert done.code == 2
    assert method in done.err and values["export_refusal"] in " ".join(done.err.split())
    assert not (tmp_path / "model").exists()


def test_an_export_of_an_unknown_order_is_refused(finished: Finished, command: InProcess, tmp_path: Path) -> None:
    done = command(finished.folder, "export", "tiny", str(tmp_path / "model"), "--order", "evaluate-9")
    assert done.code == 2
    assert "evaluate-9" in done.err
    assert all(name in done.err for name in finished.values["orders"])
    assert not (tmp_path / "model").exists()


def test_a_changed_study_of_the_same_name_is_refused_with_the_difference(
    finished: Finished, command: InProcess
) -> None:
    before = (finished.runs / "summary.json").read_bytes()
    done = command(finished.folder, *RUN, "-s", "training.lr=0.5", "-s", "orders.evaluate=1")
    assert done.code == 2
    assert "training.lr: 0.004 before, 0.5 now" in done.err
    assert "orders.evaluate: 2 before, 1 now" in done.err
    assert "another name" in done.err
    assert (finished.runs / "summary.json").read_bytes() == before
    assert "lr: 0.004" in (finished.runs / "study.yaml").read_text()


def test_where_it_runs_may_change_under_the_same_name(finished: Finished, command: InProcess, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "moved")
    values = command(folder, *RUN, "-s", "resources.executor=inline", "-s", "tracking.register_model=false").values
    assert values["steps_run"] == 0
    assert values["state_digests"] == finished.values["state_digests"]
