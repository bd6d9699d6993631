"""What a report is made of: a run folder read back, and for a study that hasn't ended its finished orders in the "
"store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pandas as pd

from loda.errors import ConfigError
from loda.metrics import AccuracySummary, accuracy_matrix_summary
from orchestrate.records import read_record, read_table
from orchestrate.session import Session, read_run_study
from orchestrate.study import Study


@dataclass(frozen=True)
class OrderAccuracy:
    """One complete evaluation order, from the rows of ``results.parquet``.

    Attributes:
        name: of the order.
        order: the tasks' indices, in the order learned.
        matrix: (T, T) percent, NaN above the diagonal; (1, T) of a joint method, whose columns are the tasks by index.
        counts: (T,) images of each column.
    """

    name: str
    order: tuple[int, ...]
    matrix: np.ndarray
    counts: np.ndarray

    @property
    def joint(self) -> bool:
        return self.matrix.shape[0] == 1 and self.matrix.shape[1] > 1

    @cached_property
    def summary(self) -> AccuracySummary:
        """The figures of this order; of a joint method those of one task that holds all images."""
        if self.joint:
            total = self.counts.sum()
            together = [[float(self.matrix[0] @ self.counts / total)]]
            return accuracy_matrix_summary(together, [total])
        return accuracy_matrix_summary(self.matrix, self.counts)

    def by_task(self) -> dict[int, float]:
        """Final accuracy of each task, by its index."""
        tasks = range(self.matrix.shape[1]) if self.joint else self.order
        return dict(zip(tasks, self.matrix[-1].tolist(), strict=True))


@dataclass
class ReportData:
    """A study as far as it is there.

    Attributes:
        study: as resolved when it ran.
        plan: ``orders.json``.
        summary: ``summary.json``; None: the study hasn't ended, or only ``orchestrate robustness`` ran.
        search: Optuna's study; None: nothing was searched.
        provenance: versions and digests, as recorded when the study was last started.
        robustness: ``robustness.json``; None: not computed.
        tasks: names by index.
        planned: evaluation orders: tasks in the order learned, by name.
        results, timings, facts: tidy tables; empty where nothing is there.
        stages_done: of a study that hasn't ended: by evaluation order, how many of its stages are stored, if known.
    """

    folder: Path
    study: Study
    plan: dict[str, Any]
    summary: dict[str, Any] | None
    search: optuna.Study | None
    provenance: dict[str, Any]
    robustness: dict[str, Any] | None
    tasks: list[str] = field(default_factory=list)
    planned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    results: pd.DataFrame = field(default_factory=pd.DataFrame)
    timings: pd.DataFrame = field(default_factory=pd.DataFrame)
    facts: pd.DataFrame = field(default_factory=pd.DataFrame)
    stages_done: dict[str, int] = field(default_factory=dict)

    @property
    def wanted(self) -> int:
        """How many evaluation orders the study has, there or not."""
        return max(len(self.plan["evaluate"]), len(self.planned))

    @cached_property
    def evaluated(self) -> list[OrderAccuracy]:
        """Evaluation orders of which every accuracy is there, in the order planned."""
        found = []
        for name, order in self.planned.items():
            rows = self.results
            if len(rows):
                rows = rows[(rows["trial"] == "chosen") & (rows["order_name"] == name)]
            one = complete_order(name, order, rows)
            if one is not None:
                found.append(one)
        return found

    @property
    def complete(self) -> bool:
        """Whether every planned evaluation order is there: only then is anything averaged over orders."""
        return len(self.evaluated) == self.wanted

    @property
    def compared(self) -> bool:
        """Whether only methods were compared, with neither a run nor a sweep."""
        return self.summary is None and self.robustness is not None

    @property
    def class_orders(self) -> bool:
        """Whether each order has tasks of its own, cut from its order of classes."""
        return self.plan.get("kind") == "class"

    @property
    def roots(self) -> dict[tuple[int, ...], str] | None:
        """By order, the root of the tree that it grows from; None outside trees."""
        labels = self.plan.get("roots", {}).get("evaluate", [])
        if self.plan.get("design") != "tree" or len(labels) != len(self.planned):
            return None
        return dict(zip(self.planned.values(), labels, strict=True))

    @cached_property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials of the search, by number."""
        return [] if self.search is None else self.search.get_trials(deepcopy=False)


def complete_order(name: str, order: Sequence[int], rows: pd.DataFrame) -> OrderAccuracy | None:
    """An order from its rows (i, j, accuracy, images); None unless every accuracy of it is there."""
    size = len(order)
    if len(rows) == 0:
        return None
    height = 1 if rows["i"].max() == 0 and len(rows) == size and size > 1 else size
    matrix, counts = np.full((height, size), np.nan), np.zeros(size)
    matrix[rows["i"], rows["j"]] = rows["accuracy"]
    counts[rows["j"]] = rows["images"]
    needed = matrix[np.tril_indices(size)] if height == size else matrix
    if not np.isfinite(needed).all():
        return None
    return OrderAccuracy(name, tuple(order), matrix, counts)


def read_report_data(folder: Path, summary: Mapping[str, Any] | None = None) -> ReportData:
    """Everything in a run folder; ``summary`` stands in for a ``summary.json`` that isn't written yet.

    Raises:
        ConfigError: no such study, or a file of it can't be read.
    """
    study = read_run_study(folder)
    plan = _json(folder / "orders.json")
    if plan is None:
        raise ConfigError(f"{folder / 'orders.json'} is missing; `orchestrate resume {folder.name}` writes it again")
    data = ReportData(
        folder,
        study,
        plan,
        summary=dict(summary) if summary is not None else _json(folder / "summary.json"),
        search=_search(folder, study.name),
        provenance=_json(folder / "provenance.json") or {},
        robustness=_json(folder / "robustness.json"),
    )
    if data.summary is not None:
        data.tasks = list(data.summary["tasks"])
        data.planned = {name: tuple(order) for name, order in data.summary["orders"].items()}
        data.results, data.timings = _table(folder / "results.parquet"), _table(folder / "timings.parquet")
        data.facts = _table(folder / "facts.parquet")
    elif data.robustness is not None:
        _read_comparison(data, data.robustness)
    else:
        _read_from_store(data)
    return data


def _read_comparison(data: ReportData, values: Mapping[str, Any]) -> None:
    """The orders of the comparison's baseline, of its first training seed."""
    data.tasks = list(values["tasks"])
    data.planned = {name: tuple(order) for name, order in values["orders"].items()}
    rows = _table(data.folder / "robustness.parquet")
    if len(rows):
        own = rows[(rows["setting"] == values["baseline"]) & (rows["seed"] == values["seeds"][0])]
        data.results = own.assign(trial="chosen")


def _json(path: Path) -> dict[str, Any] | None:
    return read_record(path) if path.is_file() else None


def _table(path: Path) -> pd.DataFrame:
    return read_table(path) if path.is_file() else pd.DataFrame()


def _search(folder: Path, name: str) -> optuna.Study | None:
    file = folder / "optuna.db"
    if not file.is_file():
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}")
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage) if name in names else None


def _read_from_store(data: ReportData) -> None:
    """Of a study that hasn't ended: its complete orders, and how far the others are."""
    from orchestrate.facts import fact_rows
    from orchestrate.results import read_order, result_rows, timing_rows
    from orchestrate.session import open_session

    session = open_session(data.study, search=False)
    data.tasks = session.task_names
    data.planned = {work.name: work.order for work in session.evaluate_orders}
    results = []
    for trial in data.trials:
        if trial.state == optuna.trial.TrialState.COMPLETE and "settings" in trial.user_attrs:
            name = f"trial-{trial.number:04d}"
            found = [read_order(session, name, trial.user_attrs["settings"], work) for work in session.tune_orders]
            results += [one for one in found if one is not None]
    settings = _chosen_settings(data)
    if settings is not None:
        data.stages_done = _stages_done(session, settings)
        chosen = [read_order(session, "chosen", settings, work) for work in session.evaluate_orders]
        results += [one for one in chosen if one is not None]
        data.facts = fact_rows(session, [one for one in results if one.trial == "chosen"])
    if results:
        data.results, data.timings = result_rows(session, results), timing_rows(session, results)


def _chosen_settings(data: ReportData) -> Mapping[str, Any] | None:
    """The setting that evaluation uses; None while the search goes on."""
    if data.search is None:
        return {}
    ended = [trial for trial in data.trials if trial.state.is_finished()]
    if len(ended) < data.study.search.trials:
        return None
    if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in ended):
        return None
    from orchestrate.sweep import choose

    return dict(choose(cast(Any, SimpleNamespace(optuna_study=data.search))).user_attrs["settings"])


def _stages_done(session: Session, settings: Mapping[str, Any]) -> dict[str, int]:
    return {
        work.name: sum(
            node.step == "evaluate" and session.store.has(node.key) for node in session.nodes(settings, work)
        )
        for work in session.evaluate_orders
    }
