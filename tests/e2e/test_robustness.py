"""``orchestrate robustness`` and ``orchestrate compare`` through the command line, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

import loda
from loda.errors import StageError
from orchestrate.robustness import running
from orchestrate.study import load_study
from tests.e2e.studies import TASKS, Done, call, write_study

FROZEN = {"method": {"name": "simplecil"}}
SECTIONS: dict[str, Any] = {
    "orders": {"tune": 1, "evaluate": 3},
    "robustness": {"variants": {"loda": {}, "frozen": FROZEN}, "seeds": [0, 3], "resamples": 999},
    "tracking": {"register_model": False},
}
RUN = ("robustness", "study.yaml", "--local", "--json")
ORDERS, SEEDS, VARIANTS = 3, 2, 2


@dataclass
class Command:
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def __call__(self, folder: Path, *words: str) -> Done:
        return call(folder, *words, patch=self.patch, capture=self.capture)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes_parquet: Path) -> Iterator[Path]:
    """A finished study of two variants, three orders and two seeds."""
    made = tmp_path_factory.mktemp("robustness")
    write_study(made, shapes_parquet, **SECTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        running.run_robustness(load_study("study.yaml"), local=True, quiet=True)
        yield made


@pytest.fixture(scope="module")
def values(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "tiny" / "robustness.json").read_text())


def test_every_variant_order_and_seed_is_in_the_table_and_in_the_document(folder: Path, values: dict[str, Any]) -> None:
    table = pd.read_parquet(folder / "runs" / "tiny" / "robustness.parquet")
    sizes = table.groupby(["setting", "order_name", "seed"]).size()
    assert len(sizes) == VARIANTS * ORDERS * SEEDS
    assert set(sizes) == {TASKS * (TASKS + 1) // 2}
    assert set(table["split"]) == {"test"}
    assert set(table["order_name"]) == set(values["orders"])
    assert values["completeness"]["present"] == VARIANTS * ORDERS * SEEDS
    last = table[table["i"] == TASKS - 1].assign(right=lambda rows: rows["accuracy"] * rows["images"])
    sums = last.groupby(["setting", "order_name", "seed"])[["right", "images"]].sum()
    a_last = (sums["right"] / sums["images"]).groupby(["setting", "order_name"]).mean()
    for (setting, order), value in a_last.items():
        assert values["per_order"][setting]["a_last"][order] == pytest.approx(value, abs=0.006)
    assert values["baseline"] == "loda"
    assert set(values["paired"]["a_last"]["differences"]) == {"frozen"}
    assert "fwt" in values["per_order"]["loda"]


def test_the_library_alone_gives_the_same_bits(folder: Path, values: dict[str, Any]) -> None:
    name, order = next(iter(values["orders"].items()))
    (cell,) = (cell for cell in values["state_digests"] if cell.startswith("loda-seed-3"))
    study = load_study("study.yaml").with_values({"training.seed": 3})
    result = loda.run_sequence(study.run_settings(), order)
    assert result.state_digest == values["state_digests"][cell][name]
    table = pd.read_parquet(folder / "runs" / "tiny" / "robustness.parquet")
    rows = table[(table["setting"] == "loda") & (table["order_name"] == name) & (table["seed"] == 3)]
    for row in rows.itertuples():
        assert row.accuracy == result.accuracy_matrix[row.i, row.j]
        assert row.task == f"task-{order[row.j] + 1:02d}"
    before, frozen = (
        [e.meta[key][j] if isinstance(e.meta[key], list) else e.meta[key] for j, e in enumerate(result.evaluations)]
        for key in ("probe_before", "probe_frozen")
    )
    probes = rows[(rows["i"] == rows["j"]) & (rows["i"] > 0)]
    assert probes["zero_shot"].tolist() == before[1:]
    assert probes["baseline"].tolist() == frozen[1:]
    assert rows[rows["i"] != rows["j"]]["zero_shot"].isna().all()


def test_the_same_command_computes_nothing_and_repeats_the_numbers(
    folder: Path, values: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    again = shutil.copytree(folder, tmp_path / "again")
    found = command(again, *RUN).values
    assert found["stages_run"] == 0
    assert found["stages_reused"] == found["stages_requested"] == VARIANTS * ORDERS * SEEDS * TASKS
    assert values["stages_run"] + values["stages_reused"] == found["stages_requested"]
    assert values["stages_reused"] > 0  # orders begin alike, and the frozen variant has no use for a seed
    for key in ("spread", "paired", "variance", "ranks", "state_digests", "completeness"):
        assert found[key] == values[key], key
    shown = command(again, "robustness", "study.yaml", "--local").out
    mean = values["spread"]["loda"]["a_last"]["mean"]
    (row,) = command(again, "list", "--json").values["runs"]
    assert (row["state"], row["a_last"]) == ("finished (robustness)", mean)
    assert "loda minus" in command(again, "show", "tiny").out
    assert f"experiments/{found['mlflow']['experiment_id']}" in command(again, "ui", "--dry-run").err
    assert all(text in shown for text in ("loda minus", "frozen", f"{mean:.2f}", "computed, 36 reused"))


def test_mlflow_has_study_variant_and_order_runs(folder: Path, values: dict[str, Any]) -> None:
    uri = values["mlflow"]["uri"]
    runs = MlflowClient(uri, uri).search_runs([values["mlflow"]["experiment_id"]])
    levels = [run.data.tags["level"] for run in runs]
    assert (levels.count("study"), levels.count("trial"), levels.count("order")) == (1, 4, 12)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_id = {run.info.run_id: run for run in runs}
    for run in runs:
        if run.data.tags["level"] == "order":
            trial = by_id[run.data.tags["mlflow.parentRunId"]]
            assert trial.data.tags["phase"] == "robustness"
            variant, seed = trial.data.tags["variant"], int(trial.data.tags["seed"])
            assert trial.data.params["training.seed"] == str(seed)
            assert variant in values["variants"]


def test_a_variant_is_added_without_computing_the_others_again(
    folder: Path, values: dict[str, Any], command: Command, tmp_path: Path, shapes_parquet: Path
) -> None:
    more = shutil.copytree(folder, tmp_path / "more")
    variants = SECTIONS["robustness"]["variants"] | {"lda": FROZEN | {"head.shrinkage": 0.3}}
    write_study(more, shapes_parquet, **SECTIONS | {"robustness": SECTIONS["robustness"] | {"variants": variants}})
    found = command(more, *RUN).values
    assert set(found["spread"]) == {"loda", "frozen", "lda"}
    assert found["spread"]["loda"] == values["spread"]["loda"]
    assert found["by_step"].get("adapt", 0) <= ORDERS * TASKS * SEEDS
    assert found["stages_requested"] - found["stages_run"] >= values["stages_requested"]


def test_orders_that_are_not_stored_are_missing_not_averaged_over(
    folder: Path, values: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    half = shutil.copytree(folder, tmp_path / "half")
    frozen = running.make_cells(running.open_session(load_study(half / "study.yaml"), search=False))[-1]
    session = running.open_session(load_study(half / "study.yaml"), search=False)
    work = session.evaluate_orders[1]
    key = session.nodes(frozen.settings, work)[-1].key
    shutil.rmtree(half / "stages" / key[:2] / key)
    found = command(half, "robustness", "study.yaml", "--stored", "--json").values
    missing = found["completeness"]["variants"]["frozen"]["missing"]
    assert {entry["order"] for entry in missing} == {work.name}
    assert set(found["spread"]) == {"loda"}
    assert work.name in found["paired"]["a_last"]["left_out"]["frozen"]
    shown = command(half, "robustness", "study.yaml", "--stored").out
    assert "incomplete" in shown and work.name in shown


def test_a_failing_variant_leaves_the_others_and_a_document(
    folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(broken / "stages")
    walk = running.walk_here

    def failing(session: Any, settings: Any, watcher: Any, name: str) -> None:
        if name.startswith("loda-seed-3"):
            raise StageError("adapt of task-02 diverged")
        walk(session, settings, watcher, name)

    monkeypatch.setattr(running, "walk_here", failing)
    done = command(broken, *RUN)
    assert done.code == 1
    assert done.out == ""
    assert "3 of 12" in done.err and "adapt of task-02 diverged" in done.err
    found = json.loads((broken / "runs" / "tiny" / "robustness.json").read_text())
    assert set(found["spread"]) == {"frozen"}
    assert found["completeness"]["present"] == 9
    assert "3 of 6" in found["paired"]["a_last"]["reasons"]["differences"]


def test_compare_pairs_a_run_with_a_robustness_study(
    folder: Path, values: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    alone = command(
        both, "run", "study.yaml", "--local", "--json", "-s", "name=alone", "-s", "orders.evaluate=2"
    ).values
    assert alone["stages_run"] == 0  # shared through the store
    found = command(both, "compare", "alone", "tiny", "--json").values
    assert (found["orders"], found["only_first"]) == (sorted(alone["orders"]), [])
    assert len(found["only_second"]) == 1
    differences = found["paired"]["a_last"]["differences"]
    assert set(differences) == {"tiny: loda", "tiny: frozen"}
    for order, value in differences["tiny: frozen"]["per_order"].items():
        expected = alone["a_last"]["per_order"][order] - values["per_order"]["frozen"]["a_last"][order]
        assert value == pytest.approx(expected)
    assert "alone minus" in command(both, "compare", "alone", "tiny").out
    table = both / "runs" / "tiny" / "robustness.parquet"
    pd.read_parquet(table).assign(root="all").to_parquet(table)  # as a tree of one root would have them
    tree = command(both, "compare", "alone", "tiny", "--json").values
    assert set(tree["roots"].values()) == {"all"}
    block = tree["paired"]["a_last"]["differences"]["tiny: frozen"]
    assert block["interval_t"] is None and "one tree root" in block["reasons"]["interval_t"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["stream.partition_seed=1"], ["no common orders", "stream.partition_seed"]),
        (["stream.dataset=parquet:other.parquet"], ["different images", "other.parquet"]),
    ],
)
def test_compare_refuses_studies_that_can_not_be_paired(
    folder: Path, command: Command, tmp_path: Path, changes: list[str], parts: list[str]
) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    table = pd.read_parquet(load_study(both / "study.yaml").stream.dataset.removeprefix("parquet:"))
    table.iloc[::-1].to_parquet(both / "other.parquet")
    words = [word for change in (*changes, "name=other", "method={name: simplecil}") for word in ("-s", change)]
    assert command(both, "run", "study.yaml", "--local", "--json", *words).code == 0
    done = command(both, "compare", "tiny", "other")
    assert done.code == 2
    assert all(part in done.err for part in parts), done.err


def test_compare_refuses_a_study_without_results_and_itself(folder: Path, command: Command, tmp_path: Path) -> None:
    both = shutil.copytree(folder, tmp_path / "both")
    shutil.copytree(both / "runs" / "tiny", both / "runs" / "unfinished")
    (both / "runs" / "unfinished" / "robustness.json").unlink()
    for words, part in (
        (("tiny", "unfinished"), "no result yet"),
        (("tiny", "tiny"), "itself"),
        (("tiny", "x"), "'x'"),
    ):
        done = command(both, "compare", *words)
        assert done.code == 2
        assert part in done.err


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"variants": {"a": {"stream.tasks": 2}}}, ["variants.a", "stream.tasks", "method, training, head"]),
        ({"variants": {"a": {"training.seed": 2}}}, ["variants.a", "robustness.seeds"]),
        ({"variants": {"a": {"method.rank_generl": 2}}}, ["variants.a", "rank_generl", "rank_general"]),
        ({"variants": {"a": {"method.rank_general": 33}}}, ["variants.a", "33", "32"]),
        ({"variants": {"a": {"method": {"name": "lora"}}, "b": {"training.lr": -1}}}, ["'lora'", "variants.b", "-1"]),
        ({"variants": {"a": {}, "b": {"training.lr": 0.004}}}, ["variants.b", "same settings as a"]),
        ({"variants": {"a": {}}, "baseline": "b"}, ["baseline", "'b'", "a"]),
        ({"seeds": [1, 1]}, ["seeds", "once"]),
        ({"seeds": []}, ["robustness.seeds"]),
        ({"confidence": 95}, ["robustness.confidence", "95"]),
        ({"variant": {}}, ["robustness.variant", "did you mean 'variants'"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_bad_section_is_named_before_any_work(
    command: Command, tmp_path: Path, shapes_parquet: Path, section: dict[str, Any], parts: list[str]
) -> None:
    write_study(tmp_path, shapes_parquet, robustness=section)
    done = command(tmp_path, *RUN)
    assert done.code == 2, done.err
    assert all(part in done.err for part in parts), done.err
    assert done.out == "" and not (tmp_path / "runs").exists() and not (tmp_path / "stages").exists()


def test_plan_knows_exactly_what_the_variants_need(
    folder: Path, values: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    done = command(folder, "plan", "study.yaml", "--json").values["robustness"]
    assert done["variants"] == ["loda", "frozen"]
    assert done["stages_requested"] == values["stages_requested"]
    assert done["stages_to_run"] == done["steps_to_run"] == 0
    new = command(folder, "plan", "study.yaml", "-s", f"resources.store={tmp_path}", "--json").values["robustness"]
    assert (new["stages_stored"], new["expected_worker_hours"]) == (0, None)
    assert new["stages_to_run"] == values["stages_run"]
    assert new["steps_to_run"] == values["steps_run"]
    alone = command(folder, "plan", "study.yaml", "-s", "robustness.variants={}", "--json").values
    assert alone["robustness"] is None
