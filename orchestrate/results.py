"""Results of a study, read back from the store: tables, Parquet files, and the document that ``--json`` prints."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from loda.graph import StepNode
from loda.methods import build_method
from loda.run import SequenceResult, summarise
from loda.workbench import memory_bytes
from orchestrate.session import Session, write_atomic
from orchestrate.work import OrderWork, StageCounts


@dataclass(frozen=True)
class OrderResult:
    """One order under one setting, complete."""

    trial: str
    work: OrderWork
    nodes: list[StepNode]
    result: SequenceResult


def read_order(session: Session, trial: str, settings: Mapping[str, Any], work: OrderWork) -> OrderResult | None:
    """An order's result from the store; None unless every stage is there."""
    nodes = session.nodes(settings, work)
    artifacts = {}
    last = next(node for node in reversed(nodes) if node.step == "consolidate")
    for node in nodes:
        if node.step == "evaluate" or node is last:
            artifact = session.store.read(node.key)
            if artifact is None:
                return None
            artifacts[node.key] = artifact
    return OrderResult(trial, work, nodes, summarise(work.order, nodes, artifacts))


def mean_interval(
    values: Sequence[float], roots: Sequence[str] | None = None, confidence: float = 0.95
) -> tuple[float, float] | None:
    """t interval of the mean over orders; None for fewer than two, or one tree root: nothing can be said then.

    Args:
        values: one for each order.
        roots: their tree roots; orders that share one are alike, and the interval is that of the roots.
    """
    if len(values) < 2:
        return None
    if roots is not None and len(set(roots)) < len(roots):
        from orchestrate.robustness.spread import clustered_interval  # seconds of imports that only trees need

        return clustered_interval(values, roots, confidence)
    spread = stats.sem(values)
    if spread == 0:
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=spread)
    return float(low), float(high)


def result_rows(session: Session, results: Iterable[OrderResult]) -> pd.DataFrame:
    """Tidy accuracies: a row for each trial, order and pair (i, j): accuracy (%) on the j-th task after the i-th."""
    rows = []
    for one in results:
        matrix = one.result.accuracy_matrix
        for i, j in np.argwhere(np.isfinite(matrix)):
            task = one.result.order[j] if matrix.shape[0] > 1 else j
            rows.append(
                {
                    "study": session.study.name,
                    "method": session.study.method.name,
                    "trial": one.trial,
                    "order_name": one.work.name,
                    "order": list(one.work.order),
                    "root": one.work.root,
                    "split": one.work.split,
                    "seed": session.study.training.seed,
                    "i": int(i),
                    "j": int(j),
                    "task": session.task_names[int(task)],
                    "accuracy": float(matrix[i, j]),
                    "images": int(one.result.test_counts[j]),
                }
            )
    return pd.DataFrame(rows)


def timing_rows(session: Session, results: Iterable[OrderResult]) -> pd.DataFrame:
    """Seconds of every distinct step, by key."""
    seen: dict[str, dict[str, Any]] = {}
    for one in results:
        for node in one.nodes:
            if node.key not in seen:
                seconds = (session.store.timings(node.key) or {}).get("seconds", math.nan)
                seen[node.key] = {
                    "key": node.key,
                    "step": node.step,
                    "prefix": list(node.prefix),
                    "position": node.position,
                    "trial": one.trial,
                    "seconds": seconds,
                }
    return pd.DataFrame(list(seen.values()))


def write_tables(session: Session, results: Sequence[OrderResult]) -> None:
    """``results.parquet`` and ``timings.parquet`` in the run folder."""
    for name, frame in (
        ("results", result_rows(session, results)),
        ("timings", timing_rows(session, results)),
    ):
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_atomic(session.folder / f"{name}.parquet", buffer.getvalue())


def metric_block(results: Sequence[OrderResult], metric: str) -> dict[str, Any]:
    """A metric of the summary by order, its mean and the mean's 95% interval."""
    return _block(results, {one.work.name: getattr(one.result.summary, metric) for one in results})


def _block(results: Sequence[OrderResult], by_order: Mapping[str, float]) -> dict[str, Any]:
    values = list(by_order.values())
    interval = mean_interval(values, [one.work.root or one.work.name for one in results])
    return {
        "per_order": by_order,
        "mean": float(np.mean(values)) if values else None,
        "interval_95": list(interval) if interval else None,
    }


def _without_task_id(results: Sequence[OrderResult]) -> dict[str, Any]:
    """Final accuracy without the images' tasks, for a method that is otherwise told them; empty for all others."""
    scores = {one.work.name: one.result.a_last_without_task_id for one in results}
    by_order = {name: score for name, score in scores.items() if score is not None}
    return {"a_last_without_task_id": _block(results, by_order)} if by_order else {}


def document(session: Session, results: Sequence[OrderResult], counts: StageCounts, wall: float) -> dict[str, Any]:
    """The part of ``--json`` that ``run`` and ``sweep`` share."""
    return {
        "study": session.study.name,
        "study_digest": session.study.digest,
        "method": session.study.method.name,
        "export_refusal": build_method(session.study.method).export_refusal or None,
        "orders": {one.work.name: list(one.work.order) for one in results},
        "tasks": session.task_names,
        "a_last": metric_block(results, "a_last"),
        "a_avg": metric_block(results, "a_avg"),
        **_without_task_id(results),
        "accuracy_matrix": {
            one.work.name: [[None if math.isnan(x) else x for x in row] for row in one.result.accuracy_matrix.tolist()]
            for one in results
        },
        "memory_bytes": {one.work.name: memory_bytes(one.result.state) for one in results},
        "state_digests": {one.work.name: one.result.state_digest for one in results},
        **{key: value for key, value in counts.to_dict().items() if key != "stage_seconds"},
        "stage_seconds": counts.stage_seconds,
        "wall_seconds": wall,
        "executor": session.study.resources.executor,
        "concurrent_trials": session.study.resources.concurrent_trials,
        "results": str(session.folder / "results.parquet"),
    }
