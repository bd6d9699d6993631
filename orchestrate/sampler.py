"""Optuna's samplers, seeded trial by trial, and its storage."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial

from loda.errors import ConfigError
from orchestrate.redaction import redact
from orchestrate.study import SearchSettings


class ReplayedCmaEsSampler(optuna.samplers.CmaEsSampler):
    """CMA-ES from the trials themselves, without Optuna's pickles.

    Optuna keeps the state of this sampler as a pickle in the storage and loads it for the next trial: whoever can write
    the storage could have any program run. The state is a function of the generations told so far, so it is computed
    anew from them, in microseconds; nothing is pickled and a pickle that lies there already is ignored. Trials that end
    in their own order draw what Optuna's own sampler draws, up to rounding.
    """

    _completed: list[FrozenTrial]

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        self._completed = completed_trials  # Optuna then asks for a new one, below

    def _init_optimizer(self, trans: Any, direction: optuna.study.StudyDirection) -> Any:
        state = self._cma_rng.rng.get_state()
        optimizer = super()._init_optimizer(trans, direction)
        sign = 1 if direction == optuna.study.StudyDirection.MINIMIZE else -1
        generation = self._generation(optimizer)
        while len(generation) >= optimizer.population_size:
            told = generation[: optimizer.population_size]
            optimizer.tell([(trans.transform(trial.params), sign * trial.values[0]) for trial in told])
            generation = self._generation(optimizer)
        if self._get_solution_trials(self._completed, 1):
            self._cma_rng.rng.set_state(state)  # Optuna's own draws a seed only while it has no state to go on from
        return optimizer

    def _generation(self, optimizer: Any) -> list[FrozenTrial]:
        return self._get_solution_trials(self._completed, optimizer.generation)


def search_problems(search: SearchSettings) -> list[str]:
    """What the chosen sampler can't do."""
    if search.sampler == "cmaes" and search.objective.multi:
        return ["search.sampler: cmaes has one objective only; use tpe, nsga2, gp or random with objective.multi"]
    return []


def build_sampler(search: SearchSettings, conditional: bool, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial, seeded by the search's seed and the trial's number.

    A fresh one for each trial makes a suggestion a function of seed, number and results so far: a search that was
    interrupted and taken up again draws as it would have without, and never the same numbers twice.
    """
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    # Optuna's ten random trials before a model is used would be most of a small search.
    startup = min(10, max(3, search.trials // 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if search.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        if search.sampler == "cmaes":
            return ReplayedCmaEsSampler(seed=seed, warn_independent_sampling=False)
        if search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(4, search.trials // 4)))
        # group: parameters that are active together are modelled together; without it a conditional space falls
        # back to one parameter at a time. constant_liar: concurrent trials don't all go to the same place.
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, group=conditional, constant_liar=True
        )


def open_storage(storage: str | Path) -> optuna.storages.RDBStorage:
    """Optuna's storage: a database URL, or the path of a SQLite file.

    Raises:
        ConfigError: it can't be opened or written.
    """
    url = str(storage) if "://" in str(storage) else f"sqlite:///{Path(storage).resolve()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            # A dashboard that reads at the same time must not make a write fail.
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        return optuna.storages.RDBStorage(url)
    except (OSError, RuntimeError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Optuna's storage {redact(url)} can't be opened: {redact(reason)}; give a writable folder or URL"
        ) from error
