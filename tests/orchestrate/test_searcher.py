from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import optuna
import pytest

from loda.errors import ConfigError
from orchestrate.sampler import build_sampler
from orchestrate.searcher import StudySearcher
from orchestrate.study import parse_study
from tests.orchestrate.searching import end, score, searcher_of, space_of, stored, study_of, take, walk


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "optuna" / "optuna.db"


def test_trials_end_as_promised_and_none_is_left_running(storage: Path) -> None:
    searcher = searcher_of(storage, sampler="random")
    for trial_id in ("done", "nan", "inf", "absent", "silent", "error", "stopped", "stopped_nan", "paused", "unborn"):
        searcher.suggest(trial_id)
    searcher.on_trial_result("done", {"objective": 40.0, "training_iteration": 1})
    end(searcher, "done", 50.0)
    end(searcher, "nan", math.nan)
    end(searcher, "inf", math.inf)
    searcher.on_trial_complete("absent", {"finished": True, "training_iteration": 1})
    searcher.on_trial_complete("silent", {"done": True})
    searcher.on_trial_complete("error", error=True)
    searcher.on_trial_result("stopped", {"objective": 20.0, "training_iteration": 1})
    end(searcher, "stopped", 30.0, finished=False)
    end(searcher, "stopped_nan", math.nan, finished=False)
    searcher.on_trial_result("paused", {"objective": 25.0, "training_iteration": 1})
    searcher.on_trial_complete("paused")
    searcher.on_trial_complete("unborn")

    found = {trial.user_attrs["trial_id"]: trial for trial in stored(storage)}
    assert {name: trial.state.name for name, trial in found.items()} == {
        "done": "COMPLETE", "nan": "FAIL", "inf": "FAIL", "absent": "FAIL", "silent": "FAIL", "error": "FAIL",
        "stopped": "PRUNED", "stopped_nan": "FAIL", "paused": "PRUNED", "unborn": "FAIL",
    }  # fmt: skip
    assert found["done"].value == 50.0
    assert found["stopped"].value == 30.0
    assert found["paused"].value == 25.0
    assert found["nan"].value is None
    assert "nan" in found["nan"].user_attrs["reason"]
    assert "error" in found["error"].user_attrs["reason"]


def test_a_second_end_and_unknown_trials_change_nothing(storage: Path) -> None:
    searcher = searcher_of(storage)
    searcher.suggest("a")
    end(searcher, "a", 1.0)
    end(searcher, "a", 2.0)
    searcher.on_trial_result("a", {"objective": 3.0, "training_iteration": 9})
    searcher.on_trial_result("nobody", {"objective": 3.0, "training_iteration": 9})
    end(searcher, "nobody", 4.0)
    assert [(trial.state.name, trial.value) for trial in stored(storage)] == [("COMPLETE", 1.0)]


def test_results_that_are_not_finite_are_not_reported(storage: Path) -> None:
    searcher = searcher_of(storage)
    searcher.suggest("a")
    for step, value in enumerate([None, math.nan, 5.0, "x"], start=1):
        searcher.on_trial_result("a", {"objective": value, "training_iteration": step})
    searcher.on_trial_result("a", {"training_iteration": 9})
    assert stored(storage)[0].intermediate_values == {3: 5.0}


def test_configs_hold_settings_only_and_no_inactive_parameters(storage: Path) -> None:
    searcher = searcher_of(storage, sampler="random", include_defaults=False)
    configs = walk(searcher, 12)
    for config, trial in zip(configs, stored(storage), strict=True):
        assert list(config) == ["settings"]
        settings = config["settings"]
        assert "rank_by" not in settings
        assert ("method.rho_max" in settings) == settings["method.gao"] == ("method.rho_max" in trial.params)
        assert (settings["method.energy_general"] is None) == (trial.params["rank_by"] == "rank")
        assert ("method.energy_general" in trial.params) == (trial.params["rank_by"] == "energy")
        assert study_of().with_values(settings).method.name == "loda"
        assert trial.user_attrs["settings"] == settings
    assert {trial.params["rank_by"] for trial in stored(storage)} == {"rank", "energy"}


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes", "nsga2"])
def test_seeded_suggestions_repeat(tmp_path: Path, sampler: str) -> None:
    first = walk(searcher_of(tmp_path / "a.db", sampler=sampler, seed=5), 7)
    again = walk(searcher_of(tmp_path / "b.db", sampler=sampler, seed=5), 7)
    other = walk(searcher_of(tmp_path / "c.db", sampler=sampler, seed=6), 7)
    assert first == again
    assert first[1:] != other[1:]
    assert len({json.dumps(config) for config in first}) == 7


def test_own_setting_comes_first_then_the_points(storage: Path) -> None:
    points = [{"training.lr": 0.05, "method.gao": False}]
    searcher = searcher_of(storage, space_of(points=points))
    first, second, _ = walk(searcher, 3)
    own = study_of()
    assert own.with_values(first["settings"]) == own
    assert second["settings"]["training.lr"] == 0.05
    assert second["settings"]["method.gao"] is False
    assert "method.rho_max" not in second["settings"]


def test_own_setting_outside_the_space_is_left_out_with_the_reason(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = parse_study({"name": "tiny", "training": {"lr": 5.0}}, "study")
    searcher = StudySearcher(study, space_of(), storage)
    assert searcher.first_points == []
    assert "training.lr: expected a number from 0.001 to 0.1, but the study has 5.0" in caplog.text


def test_concurrency_is_limited_to_trials_that_run(storage: Path) -> None:
    searcher_of(storage).suggest("lost")
    searcher = searcher_of(storage)
    assert searcher.set_max_concurrency(2)
    assert [searcher.suggest(name) is None for name in "abc"] == [False, False, True]
    end(searcher, "a", 1.0)
    assert [searcher.suggest(name) is None for name in "cd"] == [False, True]
    assert len(stored(storage)) == 3


def test_trials_carry_their_ids(storage: Path) -> None:
    searcher = searcher_of(storage)
    searcher.suggest("a")
    searcher.suggest("b")
    assert searcher.annotate("a", {"mlflow_run_id": "r1"})
    end(searcher, "a", 1.0)
    searcher.on_trial_complete("b", {"objective": 2.0, "finished": True, "mlflow_run_id": "r2"})
    assert not searcher.annotate("a", {"late": 1})
    assert not searcher.annotate("nobody", {"x": 1})
    attributes = [trial.user_attrs for trial in stored(storage)]
    assert [(one["trial_id"], one["mlflow_run_id"]) for one in attributes] == [("a", "r1"), ("b", "r2")]


def test_several_objectives(storage: Path) -> None:
    searcher = searcher_of(storage, objective={"multi": ["accuracy", "worst", "cost"]})
    assert (searcher.metric, searcher.mode) == (["accuracy", "worst", "cost"], ["max", "max", "min"])
    values = {"accuracy": 80.0, "worst": 70.0, "cost": 5.0}
    for trial_id in ("a", "b", "c"):
        searcher.suggest(trial_id)
        searcher.on_trial_result(trial_id, {**values, "training_iteration": 1})
    searcher.on_trial_complete("a", {**values, "finished": True})
    searcher.on_trial_complete("b", {**values, "worst": math.nan, "finished": True})
    searcher.on_trial_complete("c", {**values, "training_iteration": 1})
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{storage}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "PRUNED"]
    assert study.trials[0].values == [80.0, 70.0, 5.0]
    assert study.trials[2].user_attrs["values_so_far"] == values
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["mean a_avg", "worst a_avg", "seconds"]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_every_other_sampler_takes_several_objectives(storage: Path, sampler: str) -> None:
    searcher = searcher_of(storage, sampler=sampler, trials=9, objective={"multi": ["accuracy", "cost"]})
    for index in range(6):
        config = take(searcher, str(index))
        searcher.on_trial_complete(str(index), {"accuracy": score(config), "cost": float(index), "finished": True})
    assert Counter(trial.state.name for trial in stored(storage)) == {"COMPLETE": 6}


def test_one_objective_samplers_refuse_several(storage: Path) -> None:
    with pytest.raises(ConfigError, match="cmaes has one objective only"):
        searcher_of(storage, sampler="cmaes", objective={"multi": ["accuracy", "cost"]})


def test_tpe_finds_more_than_random_search(tmp_path: Path) -> None:
    def best(sampler: str, seed: int) -> float:
        storage = tmp_path / f"{sampler}{seed}.db"
        searcher = searcher_of(storage, sampler=sampler, seed=seed, trials=20, include_defaults=False)
        return max(score(config) for config in walk(searcher, 20))

    assert sum(best("tpe", seed) for seed in range(4)) > sum(best("random", seed) for seed in range(4))


def test_samplers_model_conditional_spaces_in_groups() -> None:
    study = study_of()
    assert build_sampler(study.search, True, 0)._group  # type: ignore[attr-defined]
    assert not build_sampler(study.search, False, 0)._group  # type: ignore[attr-defined]
