"""A small search to test searchers with: a study, a space with conditions, and trials that end at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from orchestrate.searcher import StudySearcher
from orchestrate.space import SearchSpace, parse_space
from orchestrate.study import Study, parse_study

PARAMETERS = {
    "training.lr": {"type": "float", "low": 0.001, "high": 0.1, "log": True},
    "rank_by": {"type": "categorical", "choices": ["rank", "energy"]},
    "method.energy_general": {
        "type": "float", "low": 0.5, "high": 0.9, "when": {"rank_by": "energy"}, "otherwise": None
    },
    "method.gao": {"type": "categorical", "choices": [True, False]},
    "method.rho_max": {"type": "float", "low": 0.1, "high": 0.5, "when": {"method.gao": True}},
}  # fmt: skip


def study_of(**search: Any) -> Study:
    return parse_study({"name": "tiny", "search": {"trials": 12, **search}}, "study")


def space_of(**more: Any) -> SearchSpace:
    return parse_space({"method": "loda", "parameters": PARAMETERS, **more}, "tiny")


def searcher_of(storage: Path, space: SearchSpace | None = None, **search: Any) -> StudySearcher:
    return StudySearcher(study_of(**search), space or space_of(), storage)


def stored(storage: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="tiny", storage=f"sqlite:///{storage}").get_trials()


def score(config: dict[str, Any]) -> float:
    return 100 - 10 * abs(math.log10(config["settings"]["training.lr"]) + 2)


def take(searcher: StudySearcher, trial_id: str) -> dict[str, Any]:
    config = searcher.suggest(trial_id)
    assert config is not None
    return config


def walk(searcher: StudySearcher, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Run trials one after another to their end; returns their configs."""
    configs = []
    for index in range(first, first + count):
        config = take(searcher, f"t{index}")
        configs.append(config)
        end(searcher, f"t{index}", score(config))
    return configs


def end(searcher: StudySearcher, trial_id: str, objective: Any, finished: bool = True) -> None:
    result = {"objective": objective, "finished": finished, "training_iteration": 3}
    searcher.on_trial_complete(trial_id, result)
