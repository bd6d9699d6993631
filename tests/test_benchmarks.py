"""The benchmark scripts run from the command line, at toy size, and print the JSON that their notes promise."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TEST_PER_CLASS, SettingsFactory

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    *("loda", "loda without GAO", "sequential", "inflora", "sdlora", "olora", "keeplora", "slao", "coso", "lora_pm"),
    *("gainlora", "expert_pool", "bilora", "ranpac", "simplecil", "simplecil lda", "joint"),
}
SHORT = ("--orders", 2, "--tune-orders", 1, "--grid", 1, "--margins", 0)

Here = Callable[..., tuple[object, str]]


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


@pytest.fixture
def compare_here(tiny_study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The same in this process, which saves the start: exit status or message, and standard error."""

    def run(kept: Path, *arguments: object) -> tuple[object, str]:
        argv = ["comparison.py", str(tiny_study), "--json", "--out", str(kept), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "benchmarks" / "comparison.py"), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def test_the_comparison_gives_every_method_the_same_orders_and_the_same_effort(
    compare_here: Here, tmp_path: Path
) -> None:
    trained, others = ("loda", "sequential", "coso", "joint"), ("loda without GAO", "ranpac", "simplecil")
    arguments = ("--orders", 3, "--tune-orders", 2, "--grid", 2, "--margins", 0, 0.1)
    assert compare_here(tmp_path / "kept", *arguments, "--methods", *trained, *others)[0] == 0
    document = json.loads((tmp_path / "kept").read_text(encoding="utf-8"))
    rows = document["rows"]
    assert set(rows) == {*trained, *others}
    orders = [entry["order"] for entry in rows["loda"]["orders"]]
    assert len(orders) == 3
    assert not [order for order in orders if order in document["tune_orders"]]
    for name, row in rows.items():
        assert [entry["order"] for entry in row["orders"]] == orders, name
        assert all(len(entry["state_digest"]) == 64 and 0 <= entry["a_last"] <= 100 for entry in row["orders"]), name
    for name in trained:
        scores = {(point["lr"], point["margin"]): point["validation_a_avg"] for point in rows[name]["grid"]}
        rates = sorted({lr for lr, _ in scores})
        assert len(scores) == 2 * len(rates) and all(high == 2 * low for low, high in itertools.pairwise(rates)), name
        chosen = rows[name]["chosen"]
        assert scores[chosen["lr"], chosen["margin"]] == max(scores.values()), name
        assert rates[0] < chosen["lr"] < rates[-1] or len(rates) == 2 + 3, name
    assert rows["loda without GAO"]["chosen"] == rows["loda"]["chosen"]
    assert rows["ranpac"]["chosen"] == rows["simplecil"]["chosen"] == {}
    assert rows["sequential"]["orders"][0]["state_digest"] != rows["loda"]["orders"][0]["state_digest"]
    # One pair of the rank of LoDA's two branches together, in float32, on two layers of each width.
    pairs = 2 * (4 + 4) * (32 + 96 + 128 + 32)
    assert (rows["sequential"]["trainable_parameters"], rows["sequential"]["memory_bytes"]) == (pairs, 4 * pairs)
    assert (rows["simplecil"]["trainable_parameters"], rows["simplecil"]["memory_bytes"]) == (0, 0)
    assert all(row["seconds_per_order"] > 0 for row in rows.values())


def test_the_comparisons_differences_are_those_of_its_rows(compare_here: Here, tmp_path: Path) -> None:
    names = ("loda", "sequential", "ranpac", "joint")
    arguments = ("--orders", 4, "--tune-orders", 1, "--grid", 1, "--margins", 0, "--methods", *names)
    assert compare_here(tmp_path / "kept", *arguments)[0] == 0
    document = json.loads((tmp_path / "kept").read_text(encoding="utf-8"))
    rows = document["rows"]
    for name, metrics in document["differences"].items():
        for metric, found in metrics.items():
            pairs = zip(rows["loda"]["orders"], rows[name]["orders"], strict=True)
            differences = [ours[metric] - theirs[metric] for ours, theirs in pairs]
            assert found["mean"] == pytest.approx(sum(differences) / 4)
            assert found["won"] == sum(difference > 0 for difference in differences)
            if found["t"] is not None:
                assert found["t"][0] < found["mean"] < found["t"][1]
    assert set(document["differences"]) == {"sequential", "ranpac", "joint"}
    assert "a_avg" not in document["differences"]["joint"], "joint training has no curve to average"


def test_an_order_in_the_comparison_is_the_order_run_alone(tiny_study: Path, tmp_path: Path) -> None:
    import loda

    row = compared(tiny_study, tmp_path, *SHORT, "--methods", "loda")["rows"]["loda"]
    for entry in row["orders"]:
        alone = loda.run_sequence(tiny_study, order=entry["order"])
        assert (alone.state_digest, alone.summary.a_last) == (entry["state_digest"], entry["a_last"])


def test_a_comparison_in_parts_is_the_comparison_at_once(compare_here: Here, tiny_study: Path, tmp_path: Path) -> None:
    def digests(document: dict[str, Any]) -> dict[str, list[str]]:
        return {name: [entry["state_digest"] for entry in row["orders"]] for name, row in document["rows"].items()}

    names = ("loda without GAO", "simplecil", "joint")
    assert compare_here(tmp_path / "once", *SHORT, "--methods", *names)[0] == 0
    once = json.loads((tmp_path / "once").read_text(encoding="utf-8"))
    assert list(once["rows"]) == ["loda", *names], "a row whose values another one takes over comes along"
    (tmp_path / "kept").mkdir()
    assert compare_here(tmp_path / "kept" / "comparison.json", *SHORT, "--methods", "simplecil")[0] == 0
    parts = compared(tiny_study, tmp_path, *SHORT, "--methods", *names, "--jobs", 2)
    assert digests(parts) == digests(once) and list(parts["rows"]) == list(once["rows"])
    assert parts["differences"] == once["differences"]


def test_a_row_is_computed_again_only_when_it_has_changed_or_on_request(compare_here: Here, tmp_path: Path) -> None:
    kept = tmp_path / "comparison.json"

    def marked(**changes: str) -> None:
        document = json.loads(kept.read_text(encoding="utf-8"))
        document["rows"]["simplecil"] |= {"seconds_per_order": 12345.0, **changes}
        kept.write_text(json.dumps(document), encoding="utf-8")

    def seconds(*arguments: object) -> float:
        assert compare_here(kept, *SHORT, "--methods", "simplecil", *arguments)[0] == 0
        return json.loads(kept.read_text(encoding="utf-8"))["rows"]["simplecil"]["seconds_per_order"]

    first = seconds()
    assert 0 < first < 12345
    marked()
    assert seconds() == 12345
    marked(settings_digest="of other settings")
    assert seconds() < 12345
    marked()
    assert seconds("--fresh") < 12345


def test_a_file_of_another_comparison_is_refused(compare_here: Here, tmp_path: Path) -> None:
    kept = tmp_path / "comparison.json"
    assert compare_here(kept, *SHORT, "--methods", "simplecil")[0] == 0
    before = kept.read_bytes()
    for changed, said in (
        (("--grid", 2), "holds a comparison with other effort"),
        (("--classes", 4), "holds a comparison with other classes"),
        (("--classes", 7), "expected 1 to 6"),
        (("--methods", "lodda"), "no 'lodda' here"),
    ):
        status, printed = compare_here(kept, *SHORT, *changed)
        assert said in f"{status} {printed}"
        assert kept.read_bytes() == before


def test_only_the_first_classes_are_compared_when_asked(compare_here: Here, tmp_path: Path) -> None:
    kept = tmp_path / "comparison.json"
    assert compare_here(kept, *SHORT, "--classes", 3, "--methods", "simplecil")[0] == 0
    document = json.loads(kept.read_text(encoding="utf-8"))
    assert document["classes"] == len(document["tasks"]) == 3
    for entry in document["rows"]["simplecil"]["orders"]:
        right = [accuracy * TEST_PER_CLASS * n / 100 for n, accuracy in enumerate(entry["curve"], 1)]
        assert right == pytest.approx([round(count) for count in right], abs=0.01), "tasks are of one class each"


def test_a_setting_that_diverges_is_no_candidate(compare_here: Here, tiny_study: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_study.read_text(encoding="utf-8"))
    values["training"]["lr"] = 1e30
    tiny_study.write_text(yaml.safe_dump(values), encoding="utf-8")
    status, printed = compare_here(tmp_path / "kept", *SHORT, "--methods", "loda")
    assert "diverged" in printed and "loda: every setting of the grid failed" in str(status)
    assert not (tmp_path / "kept").exists()


def test_the_comparisons_table_names_every_method(tiny_study: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    printed = run_script("comparison.py", tiny_study, "--out", kept, *SHORT, folder=tmp_path)
    again = run_script("comparison_table.py", kept, "--markdown", folder=tmp_path)
    for name in METHODS:
        assert f"\n{name} " in printed and f"\n| {name} | " in again
    assert set(json.loads(kept.read_text(encoding="utf-8"))["rows"]) == METHODS
    assert "A_last" in printed and "95% BCa" in printed


def test_the_page_on_the_comparison_has_the_tables_of_the_results(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    again = tmp_path / "again.md"
    again.write_text(page.replace("| loda |", "| another |", 1), encoding="utf-8")
    run_script("comparison_table.py", "--into", again, folder=tmp_path)
    assert again.read_text(encoding="utf-8") == page


def test_the_step_reports_its_ratios_to_the_floors(tmp_path: Path) -> None:
    arguments = ("--shapes", "alphabet_vit", "--pairs", 3, "--batches", 2, "--json")
    measured = json.loads(run_script("step.py", *arguments, folder=tmp_path))
    row = measured["rows"]["alphabet_vit"]
    assert measured["pairs"] == 3 and measured["device"] == "cpu"
    assert measured["ratio"] == row["ratio"] > 0.5, "a step can't take much less than its own passes"
    assert measured["lora_ratio"] == row["lora_ratio"] > 0.8
    assert row["gao_over_plain"] > 1, "four half passes cost more than one whole"


def test_observing_reports_its_ratio_to_a_forward_pass(tmp_path: Path) -> None:
    arguments = ("--shapes", "alphabet_vit", "--pairs", 3, "--batches", 1)
    measured = json.loads(run_script("observe.py", *arguments, "--json", folder=tmp_path))
    assert measured["ratio"] == measured["rows"]["alphabet_vit"]["ratio"] > 0.8
    assert "observation_milliseconds" in run_script("observe.py", *arguments, folder=tmp_path)


def test_the_decompositions_are_compared_with_the_calls_that_they_make(tmp_path: Path) -> None:
    printed = run_script("decompose.py", "--layers", 2, "--width", 24, "--rank", 4, "--json", folder=tmp_path)
    document = json.loads(printed)
    assert document["ratio"] > document["ratio_calls"] > 0
    assert (document["layers"], document["width"], document["pairs"]) == (2, 24, 5)


def test_a_whole_task_is_compared_with_the_published_structure(tmp_path: Path) -> None:
    small = ("--image-size", 32, "--tasks", 57, "--epochs", 3, "--rank", 4, "--pairs", 1, "--json")
    document = json.loads(run_script("task.py", *small, folder=tmp_path))
    assert document["ratio"] == pytest.approx(document["reference_seconds"] / document["ours_seconds"])
    # Both sides learn the same task: fifteen drawings of four classes, scored with the four before.
    assert document["images"] == 60
    assert all(0 <= document[f"{side}_accuracy"] <= 100 for side in ("ours", "reference"))
    assert 0 < document["share"] < 1


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
    document = compared(None, tmp_path, *arguments, "--methods", "loda", "simplecil lda")
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


def test_opening_a_folder_of_images_is_measured_against_reading_it(tmp_path: Path) -> None:
    found = json.loads(run_script("image_folder.py", "--pairs", 1, "--json", folder=tmp_path))
    assert found["images"] > 1000 and found["bytes"] > found["images"]
    assert found["ratio"] == pytest.approx(found["opening_seconds"] / found["reading_seconds"])
    assert found["ratio"] > 1, "opening reads every byte, too"
