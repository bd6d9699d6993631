"""What people read in MLflow: descriptions, which edits of theirs survive, and the tags that runs are filtered by."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrate import tracking_delivery
from orchestrate.notes import experiment_note, study_note
from orchestrate.study import load_study
from orchestrate.tracking import TrackedRun, Tracker
from orchestrate.tracking_store import NOTE_TAG, MlflowException

VALUES = {
    "a_last": {"per_order": {"evaluate-0-1": 50.0, "evaluate-1-0": 60.5}, "mean": 55.25, "interval_95": [51.25, 59.25]},
    "a_avg": {"per_order": {"evaluate-0-1": 70.0, "evaluate-1-0": 72.0}, "mean": 71.0, "interval_95": None},
    "best": {"trial": 3, "settings": {"training.lr": 0.123456}, "objectives": {"a_avg (cvar 0.34)": 68.5}},
    "trials": {"complete": 5, "failed": 1},
    "stages_requested": 20,
    "stages_run": 13,
    "stages_reused": 7,
    "wall_seconds": 12.0,
    "stage_seconds": 9.0,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("tracking")
    Tracker.open(None, "warm-up", cwd).close()
    return cwd


@pytest.fixture
def tracker(store: Path, request: pytest.FixtureRequest) -> Tracker:
    return Tracker.open(None, str(request.node.name), store)


def client_of(tracker: Tracker) -> MlflowClient:
    return MlflowClient(tracker.uri, tracker.uri)


def get(tracker: Tracker, run: TrackedRun) -> Run:
    run_id = tracker.run_id(run)
    assert run_id is not None
    return client_of(tracker).get_run(run_id)


def found(tracker: Tracker, search: str) -> list[str]:
    runs = client_of(tracker).search_runs([tracker.experiment_id], search)
    return sorted(run.info.run_name for run in runs)


def test_a_description_is_replaced_by_the_next_one(tracker: Tracker) -> None:
    run = tracker.study_run("shapes", "d1", {})
    for text in ("running", "done"):
        tracker.describe(run, text)
        tracker.describe(None, f"experiment {text}")
    assert get(tracker, run).data.tags[NOTE_TAG] == "done"
    experiment = client_of(tracker).get_experiment(tracker.experiment_id)
    assert experiment.tags[NOTE_TAG] == "experiment done"


def test_a_description_that_a_person_edited_stays(tracker: Tracker) -> None:
    run = tracker.study_run("shapes", "d1", {})
    tracker.describe(run, "ours")
    tracker.describe(None, "ours, too")
    client, run_id = client_of(tracker), get(tracker, run).info.run_id
    client.set_tag(run_id, NOTE_TAG, "my remarks")
    client.set_experiment_tag(tracker.experiment_id, NOTE_TAG, "my experiment")
    tracker.describe(run, "newer")
    tracker.describe(None, "newer")
    assert client.get_run(run_id).data.tags[NOTE_TAG] == "my remarks"
    assert client.get_experiment(tracker.experiment_id).tags[NOTE_TAG] == "my experiment"


def test_one_trial_is_the_best_also_after_a_longer_search(tracker: Tracker) -> None:
    study = tracker.study_run("shapes", "d1", {})
    for number in range(3):
        tracker.end(tracker.trial_run(f"trial-000{number}", {}))
    tracker.mark_best("trial-0000")
    tracker.mark_best("trial-0002")
    tracker.mark_best("trial-0002")
    assert found(tracker, "tags.best = 'true'") == ["trial-0002"]
    other = tracker.study_run("others", "d2", {})
    tracker.end(tracker.trial_run("trial-0001", {}))
    tracker.mark_best("trial-0001")
    assert found(tracker, "tags.best = 'true'") == ["trial-0001", "trial-0002"], "each study has its own best"
    assert study.key != other.key


def test_state_says_how_a_run_ended(tracker: Tracker) -> None:
    tracker.study_run("shapes", "d1", {})
    runs = {name: tracker.trial_run(name, {}) for name in ("good", "bad", "slow", "stopped", "open")}
    tracker.end(runs["good"], "FINISHED")
    tracker.end(runs["bad"], "FAILED")
    tracker.end(runs["slow"], "FINISHED", tags={"state": "pruned"})
    tracker.end(runs["stopped"], "KILLED")
    states = {name: get(tracker, run).data.tags["state"] for name, run in runs.items()}
    assert states == {"good": "finished", "bad": "failed", "slow": "pruned", "stopped": "stopped", "open": "running"}
    assert found(tracker, "tags.level = 'trial' AND tags.state = 'failed'") == ["bad"]


def test_orders_of_all_trials_are_told_apart_by_their_names(tracker: Tracker) -> None:
    tracker.study_run("shapes", "d1", {})
    for trial in ("trial-0000", "chosen"):
        run = tracker.trial_run(trial, {})
        tracker.order_run(run, "tune-0-1", (0, 1), title=f"tune-0-1 ({trial})", tags={"trial": trial})
    assert found(tracker, "tags.order = 'tune-0-1'") == ["tune-0-1 (chosen)", "tune-0-1 (trial-0000)"]
    assert found(tracker, "tags.level = 'order' AND tags.trial = 'chosen'") == ["tune-0-1 (chosen)"]


def test_descriptions_and_the_best_tag_wait_while_mlflow_is_away(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker.study_run("shapes", "d1", {})
    tracker.trial_run("trial-0000", {})

    def away(*_: object, **__: object) -> None:
        raise MlflowException("no answer")  # INTERNAL_ERROR: may work later

    monkeypatch.setattr(tracking_delivery, "RETRY_SECONDS", 0.0)
    with monkeypatch.context() as outage:
        outage.setattr(tracker._store, "perform", away)
        tracker.describe(run, "done")
        tracker.describe(None, "all done")
        tracker.mark_best("trial-0000")
    assert NOTE_TAG not in get(tracker, run).data.tags
    tracker.close()
    assert get(tracker, run).data.tags[NOTE_TAG] == "done"
    assert client_of(tracker).get_experiment(tracker.experiment_id).tags[NOTE_TAG] == "all done"
    assert found(tracker, "tags.best = 'true'") == ["trial-0000"]


def test_the_study_note_holds_the_result_and_the_commands() -> None:
    text = study_note(load_study("alphabets"), VALUES)
    assert text.splitlines()[0] == "### alphabets: loda, A_last 55.25 %, 95% interval 51.25 to 59.25"
    for part in (
        "| **A_last** | **55.25 %**, 95% interval 51.25 to 59.25 |",
        "| A_avg | 71.00 % (no interval: one order, or one tree root) |",
        "| worst order | 50.00 % (evaluate-0-1) |",
        "| best setting | `training.lr` 0.1235 |",
        "trial-0003: a_avg (cvar 0.34) 68.50 on validation images (5 complete, 1 failed)",
        "| stages | 20 asked for, 13 computed, 7 shared or reused |",
        "orchestrate export alphabets DIR",
    ):
        assert part in text
    assert "running" in study_note(load_study("alphabets"), None)


def test_a_shared_experiment_names_no_single_study_s_result() -> None:
    own = load_study("alphabets")
    shared = own.with_values({"tracking.experiment": "everything"})
    assert experiment_note(own, "7", VALUES).startswith("### alphabets: loda, A_last 55.25 %")
    assert "55.25" not in experiment_note(shared, "7", VALUES)
    for study in (own, shared):
        assert "(#/experiments/7/runs?workflowType=machine_learning&" in experiment_note(study, "7", VALUES)


def test_several_objectives_sort_the_settings_by_the_first() -> None:
    study = load_study("alphabets").with_values({"search.objective.multi": ["worst", "cost"]})
    assert "orderByKey=metrics.%60worst%60" in experiment_note(study, "7", None)
