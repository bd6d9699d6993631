"""The benchmark scripts run from the command line, at toy size, and print the JSON that their notes promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import SettingsFactory

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"loda", "loda without GAO", "sequential", "simplecil", "simplecil lda", "joint"}


def run_script(name: str, *arguments: object, folder: Path) -> str:
    """Standard output of a script, from another folder, with one thread."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tiny_study(tiny_settings: SettingsFactory, tmp_path: Path) -> Path:
    """A study file over the drawn shapes: three tasks, one epoch."""
    settings = tiny_settings(training={"epochs": 1}, head={"start": "class_means", "classifier": "lda"})
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", **json.loads(settings.model_dump_json())}), encoding="utf-8")
    return path


def compared(study: Path | str | None, folder: Path, *arguments: object) -> dict[str, Any]:
    kept = folder / "kept" / "comparison.json"
    given = [] if study is None else [study]
    printed = run_script("comparison.py", *given, "--json", "--out", kept, *arguments, folder=folder)
    document = json.loads(printed)
    assert json.loads(kept.read_text(encoding="utf-8")) == document
    return document


def test_the_comparison_gives_every_method_the_same_orders_and_the_same_effort(
    tiny_study: Path, tmp_path: Path
) -> None:
    document = compared(tiny_study, tmp_path, "--orders", 3, "--tune-orders", 2, "--grid", 2, "--margins", 0, 0.1)
    rows = document["rows"]
    assert set(rows) == METHODS
    orders = [entry["order"] for entry in rows["loda"]["orders"]]
    assert len(orders) == 3
    assert not [order for order in orders if order in document["tune_orders"]]
    for name, row in rows.items():
        assert [entry["order"] for entry in row["orders"]] == orders, name
        assert all(len(entry["state_digest"]) == 64 and 0 <= entry["a_last"] <= 100 for entry in row["orders"]), name
    for name in ("loda", "sequential", "joint"):
        scores = {(point["lr"], point["margin"]): point["validation_a_avg"] for point in rows[name]["grid"]}
        assert len(scores) == 4, name
        chosen = rows[name]["chosen"]
        assert scores[chosen["lr"], chosen["margin"]] == max(scores.values()), name
    assert rows["loda without GAO"]["chosen"] == rows["loda"]["chosen"]
    assert rows["sequential"]["orders"][0]["state_digest"] != rows["loda"]["orders"][0]["state_digest"]


def test_the_comparisons_differences_are_those_of_its_rows(tiny_study: Path, tmp_path: Path) -> None:
    document = compared(tiny_study, tmp_path, "--orders", 4, "--tune-orders", 1, "--grid", 1, "--margins", 0)
    rows = document["rows"]
    for name, metrics in document["differences"].items():
        for metric, found in metrics.items():
            pairs = zip(rows["loda"]["orders"], rows[name]["orders"], strict=True)
            differences = [ours[metric] - theirs[metric] for ours, theirs in pairs]
            assert found["mean"] == pytest.approx(sum(differences) / 4)
            assert found["won"] == sum(difference > 0 for difference in differences)
            if found["t"] is not None:
                assert found["t"][0] < found["mean"] < found["t"][1]
    assert set(document["differences"]) == METHODS - {"loda"}
    assert "a_avg" not in document["differences"]["joint"], "joint training has no curve to average"


def test_an_order_in_the_comparison_is_the_order_run_alone(tiny_study: Path, tmp_path: Path) -> None:
    import loda

    arguments = ("--orders", 2, "--tune-orders", 1, "--grid", 1, "--margins", 0)
    row = compared(tiny_study, tmp_path, *arguments)["rows"]["loda"]
    for entry in row["orders"]:
        alone = loda.run_sequence(tiny_study, order=entry["order"])
        assert (alone.state_digest, alone.summary.a_last) == (entry["state_digest"], entry["a_last"])


def test_a_setting_that_diverges_is_no_candidate(tiny_study: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_study.read_text(encoding="utf-8"))
    values["training"]["lr"] = 1e30
    tiny_study.write_text(yaml.safe_dump(values), encoding="utf-8")
    arguments = [
        "--orders",
        "2",
        "--tune-orders",
        "1",
        "--grid",
        "1",
        "--margins",
        "0",
        "--out",
        str(tmp_path / "kept"),
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "comparison.py"), str(tiny_study), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "diverged" in done.stderr and "loda: every setting of the grid failed" in done.stderr
    assert not (tmp_path / "kept").exists()


def test_the_comparisons_table_names_every_method(tiny_study: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    arguments = ("--orders", 2, "--tune-orders", 1, "--grid", 1, "--margins", 0)
    printed = run_script("comparison.py", tiny_study, "--out", kept, *arguments, folder=tmp_path)
    for name in METHODS:
        assert f"\n{name} " in printed
    assert "A_last" in printed and "95% BCa" in printed


def test_the_gao_step_reports_its_ratio_to_the_floor(tiny_study: Path, tmp_path: Path) -> None:
    printed = run_script("gao_step.py", tiny_study, "--pairs", 3, "--batches", 2, "--json", folder=tmp_path)
    measured = json.loads(printed)
    assert measured["pairs"] == 3
    assert measured["ratio"] > 0.5, "a step can't take much less than its own passes"
    assert measured["gao_over_plain"] > 1, "four half passes cost more than one whole"


def test_room_is_joint_above_the_higher_floor(tiny_study: Path, tmp_path: Path) -> None:
    measured = json.loads(run_script("room.py", tiny_study, "--rank", 4, "--json", folder=tmp_path))
    means, lda, joint = (row["accuracy"] for row in measured["rows"].values())
    assert measured["room_points"] == pytest.approx(joint - max(means, lda))


def test_the_cost_of_methods_is_measured_for_each(tiny_study: Path, tmp_path: Path) -> None:
    arguments = ("--methods", "loda", "simplecil", "sequential", "--tasks", 2, "--validation", 0.25, "--json")
    measured = json.loads(run_script("methods.py", tiny_study, *arguments, folder=tmp_path))
    rows = measured["rows"]
    assert set(rows) == {"loda", "simplecil", "sequential"}
    assert rows["simplecil"]["trainable_parameters"] == [0, 0] and rows["simplecil"]["stored_bytes"] == [0, 0]
    # Moments of two layers of each width, packed in float64; one pair of rank 16 a layer, in float32.
    assert rows["loda"]["stored_bytes"] == [8 * 2 * (32 * 33 // 2 + 128 * 129 // 2)] * 2
    assert rows["sequential"]["stored_bytes"] == [4 * 16 * 2 * (32 + 96 + 128 + 32)] * 2
    assert rows["sequential"]["trainable_parameters"] == [16 * 2 * (32 + 96 + 128 + 32)] * 2
    assert all(row["seconds_per_image"] > 0 and row["images"] == 24 for row in rows.values())


def test_sharing_runs_each_prefix_once_to_the_same_digests(tiny_study: Path, tmp_path: Path) -> None:
    arguments = ("--roots", 2, "--continuations", 2, "--depth", 1, "--json")
    found = json.loads(run_script("sharing.py", tiny_study, *arguments, folder=tmp_path))
    assert (found["stages_without"], found["stages_with"]) == (12, 2 + 4 + 4)
    assert found["stage_ratio"] == pytest.approx(10 / 12)
    assert found["ratio"] == pytest.approx(found["seconds_with"] / found["seconds_without"])
    assert found["same_digests"] is True
    # One order of each root: a stage and two steps are reused, the rest of three stages is not.
    assert found["gamma_m"] == {"steps_requested": 24, "steps_run": 2 * (2 + 4), "trained": 2, "run_before_it": 0}
    assert found["classifier"] == {"steps_requested": 24, "steps_run": 5, "run_but_evaluate": 0}


@pytest.mark.slow
def test_the_bundled_study_is_compared_without_arguments_naming_it(tmp_path: Path) -> None:
    arguments = ("--orders", 2, "--tune-orders", 1, "--grid", 1, "--margins", 0.1, "--epochs", 1)
    document = compared(None, tmp_path, *arguments)
    assert document["study"] == "alphabets"
    assert len(document["tasks"]) == 5
    rows = document["rows"]
    floor = rows["simplecil lda"]["orders"][0]["a_last"]
    assert all(entry["a_last"] > floor for entry in rows["loda"]["orders"]), "one epoch already beats frozen features"


def test_the_race_replays_a_table_with_the_scheduler_of_sweeps(tmp_path: Path) -> None:
    """Twelve settings two points apart: the race must find the best, and need not run the others to their end."""
    orders = [float(index) for index in range(6)]
    rows = [
        {
            "settings": {},
            "orders": [
                {"validation": [40 + 2 * setting + order + 0.1 * ((setting * order) % 3) - t for t in range(3)]}
                for order in orders
            ],
        }
        for setting in range(12)
    ]
    rows.append({"settings": {}, "orders": [None, *rows[-1]["orders"][1:]]})  # diverged on the first order
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": rows, "orders": [[0]] * 6, "tasks": [0, 1, 2]}))
    arguments = ("--table", table, "--seeds", 5, "--settings", 13, "--tune", 4, "--json")
    document = json.loads(run_script("racing.py", *arguments, folder=tmp_path))
    assert set(document["rules"]) == {"orders", "tasks", "orders and tasks"}
    for name, found in document["rules"].items():
        assert found["race_regret"] == found["full_regret"] == 0, name
        assert 0 < found["ratio"] < 1, name
        assert all(row["full_stages"] <= 12 * 4 * 3 + 4 * 3 for row in found["rows"]), name
    assert document["ratio"] == document["rules"]["orders and tasks"]["ratio"] < document["rules"]["orders"]["ratio"]
