"""CMA-ES without pickles: the draws of Optuna's own sampler from the trials alone, whatever the storage holds."""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from orchestrate.sampler import ReplayedCmaEsSampler, build_sampler, open_storage
from orchestrate.study import SearchSettings

SEARCH = SearchSettings(sampler="cmaes", trials=30)
Make = Callable[[int], optuna.samplers.BaseSampler]


class Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def ours(number: int) -> optuna.samplers.BaseSampler:
    return build_sampler(SEARCH, False, number)


def optunas(number: int) -> optuna.samplers.BaseSampler:
    replayed = build_sampler(SEARCH, False, number)
    assert isinstance(replayed, ReplayedCmaEsSampler)
    sampler = optuna.samplers.CmaEsSampler(seed=0, warn_independent_sampling=False)
    sampler._cma_rng, sampler._independent_sampler = replayed._cma_rng, replayed._independent_sampler
    return sampler


def search(storage: Path, make: Make, trials: range, direction: str = "minimize") -> list[dict[str, float]]:
    """A sampler of its own for every trial, as in a study that goes on after an interruption."""
    study = optuna.create_study(storage=open_storage(storage), study_name="s", load_if_exists=True, direction=direction)
    drawn = []
    for number in trials:
        study.sampler = make(number)
        trial = study.ask()
        x, y = trial.suggest_float("x", -5, 5), trial.suggest_int("y", 1, 100, log=True)
        value = (x - 1) ** 2 + abs(y - 30) / 10
        study.tell(trial, value if direction == "minimize" else -value)
        drawn.append(trial.params)
    return drawn


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_draws_are_those_of_optunas_own_sampler(tmp_path: Path, direction: str) -> None:
    expected = search(tmp_path / "optuna.db", optunas, range(30), direction)
    for found, wanted in zip(search(tmp_path / "ours.db", ours, range(30), direction), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)  # a pickle rounds the covariance to a symmetric one
    # five generations of six: the later draws have learned something
    assert abs(sum(point["x"] for point in expected[-6:]) / 6 - 1) < 2


def pickled_states(storage: Path) -> int:
    with sqlite3.connect(storage) as database:
        query = "select count(*) from trial_system_attributes where key like 'cma:optimizer%'"
        return int(database.execute(query).fetchone()[0])


def test_nothing_is_pickled_into_the_storage(tmp_path: Path) -> None:
    search(tmp_path / "ours.db", ours, range(14))
    search(tmp_path / "optuna.db", optunas, range(14))
    assert (pickled_states(tmp_path / "ours.db"), pickled_states(tmp_path / "optuna.db") > 0) == (0, True)


def test_a_pickle_in_the_storage_is_never_loaded(tmp_path: Path) -> None:
    storage, mark = tmp_path / "optuna.db", tmp_path / "mark"
    search(storage, ours, range(14))
    opened = open_storage(storage)
    trial = opened.get_all_trials(opened.get_study_id_from_name("s"))[5]
    with sqlite3.connect(storage) as database:  # Optuna itself refuses to change a trial that has ended
        row = (trial._trial_id, "cma:optimizer:0", f'"{pickle.dumps(Payload(mark)).hex()}"')
        database.execute("insert into trial_system_attributes (trial_id, key, value_json) values (?, ?, ?)", row)
    undisturbed = search(tmp_path / "other.db", ours, range(20))
    assert search(storage, ours, range(14, 20)) == undisturbed[14:]
    assert not mark.exists()
    search(storage, optunas, range(20, 21))
    assert mark.exists()  # Optuna's own loads it: the payload is a real one
