from __future__ import annotations

import json
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.trial import TrialState
from ray import tune

from loda.errors import ConfigError
from orchestrate.space import load_space
from tests.orchestrate.searching import end, searcher_of, stored, study_of, take, walk


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "optuna" / "optuna.db"


def test_a_new_driver_goes_on_as_the_first_would_have(tmp_path: Path) -> None:
    undisturbed = walk(searcher_of(tmp_path / "a.db", seed=1), 8)
    storage = tmp_path / "b.db"
    before = searcher_of(storage, seed=1)
    configs = walk(before, 4)
    lost = before.suggest("lost")  # the driver dies while this trial runs
    after = searcher_of(storage, seed=1)
    assert after.ended == 4
    resumed = walk(after, 4, first=10)
    assert resumed[0] == lost
    assert configs + resumed == undisturbed
    trials = stored(storage)
    assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: 8}
    assert trials[4].user_attrs["trial_id"] == "t10"


def test_the_first_point_survives_a_driver_that_dies_at_once(storage: Path) -> None:
    searcher_of(storage).suggest("lost")
    searcher = searcher_of(storage)
    own = study_of()
    assert own.with_values(take(searcher, "new")["settings"]) == own
    assert len(stored(storage)) == 1


def test_tunes_restore_keeps_trials_and_configs(storage: Path, tmp_path: Path) -> None:
    before = searcher_of(storage)
    config = before.suggest("kept")
    before.save_to_dir(str(tmp_path))
    orphan = before.suggest("after the checkpoint")
    end(before, "kept", 10.0)  # Tune hadn't recorded this end: it runs the trial once more

    restored = pickle.loads(pickle.dumps(before))  # as Tune's own state does
    restored.restore_from_dir(str(tmp_path))
    assert restored.suggest("kept") == config
    end(restored, "kept", 10.0)
    assert restored.suggest("new") == orphan
    end(restored, "new", 20.0)
    assert [(trial.state.name, trial.value) for trial in stored(storage)] == [("COMPLETE", 10.0), ("COMPLETE", 20.0)]
    (checkpoint,) = tmp_path.glob("searcher-state-*")
    assert json.loads(checkpoint.read_text()) == {"numbers": {"kept": 0}}


def test_a_failed_trial_that_succeeds_when_run_again_counts(storage: Path) -> None:
    searcher = searcher_of(storage)
    searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    end(searcher, "a", 7.0)
    failed, again = stored(storage)
    assert failed.state == TrialState.FAIL
    assert (again.state, again.value, again.params) == (TrialState.COMPLETE, 7.0, failed.params)
    assert again.user_attrs["repeats_trial"] == 0
    assert "reason" not in again.user_attrs


def test_a_stored_study_with_other_objectives_or_ranges_is_refused(storage: Path) -> None:
    searcher_of(storage)
    with pytest.raises(ConfigError, match="'tiny' with other objectives"):
        searcher_of(storage, objective={"across_orders": "worst"})
    with pytest.raises(ConfigError, match="other space"):
        searcher_of(storage, load_space("loda-small"))


def test_a_storage_that_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be opened"):
        searcher_of(tmp_path / "file" / "optuna.db")
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="can't be opened"):
        searcher_of(damaged)


def make_trainable() -> Callable[[dict[str, Any]], None]:
    # A local function travels to Ray's workers by value: they can't import this module.
    def trainable(config: dict[str, Any]) -> None:
        settings = config["settings"]
        number = int(Path(config["counter"]).stat().st_size)
        with Path(config["counter"]).open("ab") as file:
            file.write(b"x")
        tune.report({"objective": 10.0, "finished": False})
        if number == 1:
            raise RuntimeError("this setting fails on an order")
        time.sleep(0.05)
        value = math.nan if number == 2 else 100 * settings["training.lr"]
        tune.report({"objective": value, "finished": True, "mlflow_run_id": f"run{number}"})

    return trainable


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
def test_a_real_search_through_tune(local_ray: None, storage: Path, tmp_path: Path) -> None:
    searcher = searcher_of(storage, seed=2)
    counter = tmp_path / "counter"
    counter.write_bytes(b"")
    trainable = make_trainable()
    tuner = tune.Tuner(
        trainable,
        param_space={"counter": str(counter)},
        tune_config=tune.TuneConfig(
            search_alg=searcher, num_samples=5, max_concurrent_trials=1, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(tmp_path / "tune"), verbose=0),
    )  # fmt: skip
    results = tuner.fit()

    trials = stored(storage)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert [trial.user_attrs.get("mlflow_run_id") for trial in trials] == ["run0", None, "run2", "run3", "run4"]
    own = study_of()
    assert own.with_values(trials[0].user_attrs["settings"]) == own
    by_id = {trial.user_attrs["trial_id"]: trial for trial in trials}
    for result in (results[index] for index in range(len(results))):
        assert result.config is not None
        assert set(result.config) == {"counter", "settings"}
        if result.error is None:
            assert result.metrics is not None
            trial = by_id[result.metrics["trial_id"]]
            assert result.config["settings"] == trial.user_attrs["settings"]

    # Taken up from Tune's own state: the failed trial runs again under its id, and counts.
    restored = tune.Tuner.restore(
        str(tmp_path / "tune" / "search"), trainable, resume_errored=True,
        param_space={"counter": str(counter)},
    )  # fmt: skip
    restored.fit()
    again = stored(storage)
    assert [trial.state.name for trial in again] == [*(trial.state.name for trial in trials), "COMPLETE"]
    assert again[5].params == trials[1].params
    assert again[5].user_attrs["trial_id"] == trials[1].user_attrs["trial_id"]
