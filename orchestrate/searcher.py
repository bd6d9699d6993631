"""Optuna through Ray Tune: suggestions, their ends, and a storage that optuna-dashboard opens."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search.optuna import OptunaSearch

from loda.errors import ConfigError
from loda.reading import read_json
from orchestrate.objective import objective_directions, objective_labels
from orchestrate.sampler import build_sampler, open_storage, search_problems
from orchestrate.space import SearchSpace
from orchestrate.study import Study

logger = logging.getLogger(__name__)

FINISHED = "finished"  # a trial's last report holds it as true; what ends without it was stopped on the way
RUN_ID = "mlflow_run_id"
ORDERS = "orders"  # a report's figures of each order; kept, so that a race can go on
STOPPED = "stopped"  # why a trial was stopped
TRIAL_ID = "trial_id"


class StudySearcher(OptunaSearch):
    """Ray's Optuna searcher with honest ends.

    Ray's own stores a trial that was stopped early as complete and leaves one that reported NaN running for ever.
    Here a trial ends as COMPLETE (its last report is ``finished`` and finite), PRUNED (stopped before that, with its
    value so far) or FAIL (an error, or an objective that is missing or not finite).

    The config of a Tune trial is ``{"settings": {key path: value}}`` for :meth:`Study.with_values`, without switches.

    Everything that it knows is in Optuna's storage. Built again over the same storage and study name, it goes on
    where the former one ended: trials that were running are handed out first, with the same values, and points to
    try first are not tried twice. One driver at a time may use a study.

    Args:
        study: for its search section, and its own setting, which is tried first.
        space: what to sample.
        storage: path of a SQLite file, or a database URL.
        study_name: Optuna's name of the study; None: the study's name.

    Raises:
        ConfigError: the storage can't be opened, or holds a study of that name with other objectives or ranges.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    _storage: optuna.storages.RDBStorage
    _ot_study: optuna.Study  # type: ignore[assignment]

    def __init__(self, study: Study, space: SearchSpace, storage: str | Path, study_name: str | None = None) -> None:
        problems = search_problems(study.search)
        if problems:
            raise ConfigError(problems)
        self.search, self.space = study.search, space
        self.first_points = self._points(study, space)
        self._numbers: dict[str, int] = {}
        self._interrupted: list[int] = []
        self._max_concurrent: int | None = None
        directions = objective_directions(study.search.objective)
        single = len(directions) == 1
        super().__init__(
            space.suggest,
            metric=directions[0][0] if single else [name for name, _ in directions],
            mode=directions[0][1] if single else [mode for _, mode in directions],
            study_name=study_name or study.name,
            storage=open_storage(storage),
        )

    @staticmethod
    def _points(study: Study, space: SearchSpace) -> list[dict[str, Any]]:
        points = list(space.points)
        if study.search.include_defaults:
            own = space.from_settings(study)
            if own is not None:
                points.insert(0, own)
            else:
                reasons = "; ".join(space.outside(study))
                logger.warning("the study's own setting is not tried: it lies outside %r: %s", space.name, reasons)
        return points

    @property
    def optuna_study(self) -> optuna.Study:
        """The Optuna study, for reading."""
        return self._ot_study

    @property
    def ended(self) -> int:
        """How many trials have ended, in whatever way, in this and former runs."""
        return sum(trial.state.is_finished() for trial in self._trials())

    def _trials(self) -> list[FrozenTrial]:
        return self._ot_study.get_trials(deepcopy=False)

    def _setup_study(self, mode: str | list[str]) -> None:
        wanted = [optuna.study.StudyDirection.MAXIMIZE if one == "max" else optuna.study.StudyDirection.MINIMIZE
                  for one in ([mode] if isinstance(mode, str) else mode)]  # fmt: skip
        self._ot_study = optuna.create_study(
            storage=self._storage,
            sampler=build_sampler(self.search, self.space.conditional, 0),
            pruner=optuna.pruners.NopPruner(),
            study_name=self._study_name,
            directions=wanted,
            load_if_exists=True,
        )
        ranges = json.dumps(self.space.model_dump(mode="json", include={"method", "parameters"}), sort_keys=True)
        labels = objective_labels(self.search.objective)
        expected = {"objectives": labels, "space": ranges}
        kept = self._ot_study.user_attrs
        changed = [key for key, value in expected.items() if key in kept and kept[key] != value]
        if changed or self._ot_study.directions != wanted:
            what = " and ".join(changed or ["objectives"])
            raise ConfigError(
                f"Optuna's storage has a study {self._study_name!r} with other {what}; give this study another name"
            )
        for key, value in expected.items():
            self._ot_study.set_user_attr(key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._ot_study.set_metric_names(labels)
        for point in self.first_points:
            self._ot_study.enqueue_trial(point, skip_if_exists=True)
        self._adopt({})

    def _adopt(self, numbers: Mapping[str, int]) -> None:
        """Take up the trials of a former driver: those that Tune still knows by id, the rest to be handed out again."""
        self._numbers = dict(numbers)
        running = [trial.number for trial in self._trials() if trial.state == TrialState.RUNNING]
        self._interrupted = [number for number in running if number not in self._numbers.values()]

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        # Ray's own limit would keep the end of a failed trial that was run again from the searcher.
        self._max_concurrent = max_concurrent
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if trial_id not in self._numbers:
            trials = self._trials()
            running = sum(trial.state == TrialState.RUNNING for trial in trials) - len(self._interrupted)
            if self._max_concurrent is not None and running >= self._max_concurrent:
                return None
            started = sum(trial.state != TrialState.WAITING for trial in trials)
            number = self._interrupted.pop(0) if self._interrupted else None
            self._ot_study.sampler = build_sampler(
                self.search, self.space.conditional, started if number is None else number
            )
            trial = self._ot_study.ask() if number is None else self._running(number)
            settings = self.space.suggest(trial)
            trial.set_user_attr(TRIAL_ID, trial_id)
            trial.set_user_attr("settings", settings)
            self._numbers[trial_id] = trial.number
        return {"settings": self._frozen(self._numbers[trial_id]).user_attrs["settings"]}

    def trial_name(self, trial_id: str) -> str:
        """What a Tune trial is called everywhere."""
        return f"trial-{self._numbers[trial_id]:04d}"

    def finished_orders(self, metric: str) -> dict[str, dict[str, float]]:
        """The metric of each order of the settings that finished all of theirs, by trial name."""
        return {
            f"trial-{trial.number:04d}": {row["name"]: row[metric] for row in trial.user_attrs.get(ORDERS, [])}
            for trial in self._trials()
            if trial.state == TrialState.COMPLETE
        }

    def _frozen(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._storage_id(number))

    def _storage_id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self._study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _running(self, number: int) -> optuna.Trial:
        return optuna.Trial(self._ot_study, self._storage_id(number))

    def annotate(self, trial_id: str, attributes: Mapping[str, Any]) -> bool:
        """Add user attributes (JSON values) to a running trial; False if it is unknown or has ended already."""
        number = self._numbers.get(trial_id)
        if number is None or self._frozen(number).state.is_finished():
            return False
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(self._storage_id(number), key, value)
        return True

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        number = self._numbers.get(trial_id)
        if number is None or isinstance(self.metric, list):  # Optuna keeps no intermediate values of several objectives
            return
        self._report(number, result)

    def _report(self, number: int, result: Mapping[str, Any]) -> None:
        value: Any = result.get(self.metric)
        if value is None:  # no order is through yet
            value = result.get("first_order_so_far")
        trial = self._frozen(number)
        step = int(result.get("stages_done", result.get(TRAINING_ITERATION, len(trial.intermediate_values))))
        if _finite(value) and not trial.state.is_finished():
            self._storage.set_trial_intermediate_value(trial._trial_id, step, float(value))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.get(trial_id)
        if number is None:
            logger.warning("trial %s ended, but Optuna's study %r doesn't know it", trial_id, self._study_name)
            return
        result, trial = dict(result or {}), self._frozen(number)
        names = self.metric if isinstance(self.metric, list) else [self.metric]
        values: list[Any] = [result.get(name) for name in names]
        if not result and not error and trial.intermediate_values:  # stopped while it was paused
            values = [trial.intermediate_values[max(trial.intermediate_values)]]
        bad = [f"{name}: {value}" for name, value in zip(names, values, strict=True) if not _finite(value)]
        attributes = {key: result[key] for key in (RUN_ID, ORDERS) if result.get(key)}
        stopped = trial.user_attrs.get(STOPPED)
        if error:
            state, attributes["reason"] = TrialState.FAIL, "the trial raised an error"
        elif bad and not stopped:
            state, attributes["reason"] = TrialState.FAIL, f"no finite objective ({', '.join(bad)})"
        elif result.get(FINISHED):
            state = TrialState.COMPLETE
        else:
            state, attributes["reason"] = TrialState.PRUNED, stopped or "stopped before the end"
            attributes["values_so_far"] = dict(zip(names, values, strict=True))
        if trial.state.is_finished():
            self._end_again(trial, state, values, attributes)
            return
        self.annotate(trial_id, attributes)
        if state == TrialState.PRUNED and not isinstance(self.metric, list):
            self._report(number, result)  # Optuna takes the last intermediate value of a pruned trial as its value
        self._ot_study.tell(number, values if state == TrialState.COMPLETE else None, state=state)

    def _end_again(
        self, trial: FrozenTrial, state: TrialState, values: list[Any], attributes: Mapping[str, Any]
    ) -> None:
        """A trial that has ended in the storage ran once more, after a restore: a first success counts."""
        if trial.state == TrialState.COMPLETE or state != TrialState.COMPLETE:
            return
        user_attrs = {key: value for key, value in trial.user_attrs.items() if key not in ("reason", "values_so_far")}
        again = optuna.create_trial(
            state=state,
            values=[float(value) for value in values],
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**user_attrs, **attributes, "repeats_trial": trial.number},
        )
        self._ot_study.add_trial(again)

    def save(self, checkpoint_path: str) -> None:
        """Which Tune trial is which Optuna trial, as JSON; all else is in Optuna's storage."""
        Path(checkpoint_path).write_text(json.dumps({"numbers": self._numbers}), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        self._adopt(read_json(checkpoint_path)["numbers"])

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles the searcher with its own state; connections and samplers are opened anew.
        return {**self.__dict__, "_storage": self._storage.url, "_ot_study": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._storage = open_storage(state["_storage"])
        self._ot_study = optuna.load_study(study_name=self._study_name, storage=self._storage)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
