"""A sweep with racing stops settings on the way, says why everywhere, and lanes go on with the next setting."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import TrialState

import loda
from tests.e2e.studies import TASKS, orchestrate, write_study

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TRIALS, TUNE = 6, 4
SPACE = {
    "method": "loda",
    # The study's own rate comes first and is good; at the other, training wrecks the features.
    "parameters": {"training.lr": {"type": "categorical", "choices": [0.004, 4.0]}},
}


def test_beaten_settings_are_pruned_and_the_rest_goes_on(tmp_path: Path, shapes_parquet: Path) -> None:
    write_study(
        tmp_path,
        shapes_parquet,
        training={"epochs": 6},  # stages long enough for a setting to be stopped before it has finished
        orders={"tune": TUNE},
        search={"trials": TRIALS, "sampler": "random", "objective": {"across_orders": "mean"}},
        racing={"orders": True, "tasks": True, "grace_tasks": 1, "reduction_factor": 2},
        resources={"concurrent_trials": 2},
    )
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    values = orchestrate(tmp_path, "sweep", "study.yaml", "--json").values
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'runs/tiny/optuna.db'}")
    trials = study.trials
    assert len(trials) == TRIALS
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert pruned and complete and len(pruned) + len(complete) == TRIALS
    assert values["trials"] == {"complete": len(complete), "pruned": len(pruned)}
    assert values["best"]["settings"] == {"training.lr": 0.004}
    for trial in pruned:
        assert trial.user_attrs["reason"].startswith(("beaten by trial-", "behind after "))
        assert trial.value is not None  # its value so far
        assert len(trial.user_attrs.get("orders", [])) < TUNE
    assert values["stages_requested"] < (TRIALS * TUNE + 2) * TASKS
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}", f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = {run.info.run_name: run for run in client.search_runs([values["mlflow"]["experiment_id"]])}
    for trial in pruned:
        run = runs[f"trial-{trial.number:04d}"]
        assert run.info.status == "KILLED"
        assert run.data.tags["reason"] == trial.user_attrs["reason"]
    for name, order in values["orders"].items():
        assert loda.run_sequence(tmp_path / "study.yaml", order).state_digest == values["state_digests"][name]
    again = orchestrate(tmp_path, "sweep", "study.yaml", "--json").values
    assert again["steps_run"] == 0
    assert again["trials"] == values["trials"]
