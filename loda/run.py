"""Run one order of tasks in this process: the platform's numbers, without the platform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from loda.errors import ConfigError
from loda.graph import StepNode, sequence_nodes
from loda.metrics import AccuracySummary, accuracy_matrix_summary
from loda.reading import ReadingError, read_yaml
from loda.settings import RunSettings
from loda.stage import run_step
from loda.state import Artifact
from loda.stream import cut_published, published_class_order
from loda.workbench import Workbench, open_workbench


@dataclass(frozen=True)
class SequenceResult:
    """What one order gave.

    Attributes:
        order: the tasks' indices, in the order learned.
        accuracy_matrix: (T, T) percent; row i: after the i-th task of the order; column j: on the j-th. NaN above the
            diagonal. A joint method has a single row.
        summary: accuracy, forgetting and transfer (``loda.metrics``).
        state: the last consolidated artifact.
        state_digest: its digest, which covers all stages before it.
        seconds: computing time of the stages, whether run now or read from a store.
    """

    order: tuple[int, ...]
    accuracy_matrix: np.ndarray
    test_counts: np.ndarray
    summary: AccuracySummary
    state: Artifact
    state_digest: str
    seconds: float
    evaluations: tuple[Artifact, ...] = field(repr=False, default=())

    @property
    def a_last_without_task_id(self) -> float | None:
        """Final accuracy (%) when a method that is told each image's task is not told it; None for all others."""
        meta = self.evaluations[-1].meta if self.evaluations else {}
        if "correct_without_task_id" not in meta:
            return None
        return round(100 * sum(meta["correct_without_task_id"]) / sum(meta["count"]), 2)


def load_run_settings(source: RunSettings | Mapping[str, Any] | str | Path | None) -> RunSettings:
    """Settings from an object, a mapping or a study file, whose platform sections (orders, search, ...) are ignored.

    Raises:
        ConfigError: all problems, with key paths.
    """
    if isinstance(source, RunSettings):
        return source
    if source is None or isinstance(source, Mapping):
        values = dict(source or {})
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"no study file {str(path)!r}")
        try:
            values = read_yaml(path) or {}
        except (ReadingError, OSError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path}: expected a mapping of sections, but got {type(values).__name__}")
    platform = {"name", "orders", "search", "resources", "tracking", "racing", "robustness"}
    try:
        return RunSettings(**{str(key): value for key, value in values.items() if key not in platform})
    except ValidationError as error:
        raise ConfigError(
            [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        ) from error


def summarise(order: Sequence[int], nodes: Sequence[StepNode], artifacts: Mapping[str, Artifact]) -> SequenceResult:
    """Collect the evaluations of one order's nodes.

    Args:
        order: the tasks' indices.
        nodes: from :func:`loda.graph.sequence_nodes`.
        artifacts: at least all ``evaluate`` artifacts and the last ``consolidate`` one.
    """
    rows = [artifacts[node.key] for node in nodes if node.step == "evaluate"]
    last = artifacts[next(node.key for node in reversed(nodes) if node.step == "consolidate")]
    counts = np.asarray(rows[-1].meta["count"], dtype=np.int64)
    seconds = sum(artifacts[n.key].timings.get("seconds", 0.0) for n in nodes if n.key in artifacts)
    scores = [100 * np.asarray(row.meta["correct"]) / np.asarray(row.meta["count"]) for row in rows]
    if "probe_before" not in rows[0].meta:  # joint: one stage, scored task by task; nothing before it to compare with
        matrix = np.asarray([[100 * sum(rows[0].meta["correct"]) / counts.sum()]])
        summary = accuracy_matrix_summary(matrix, counts.sum(keepdims=True))
        matrix = scores[0][None]
    else:
        matrix = np.full((len(rows), len(rows)), np.nan)
        for i, row_scores in enumerate(scores):
            matrix[i, : len(row_scores)] = row_scores
        summary = accuracy_matrix_summary(
            matrix,
            counts,
            zero_shot_T=np.asarray([row.meta["probe_before"] for row in rows]),
            baseline_T=np.asarray([row.meta["probe_frozen"] for row in rows]),
        )
    return SequenceResult(tuple(order), matrix, counts, summary, last, last.digest, seconds, tuple(rows))


def run_nodes(
    bench: Workbench,
    nodes: Sequence[StepNode],
    artifacts: MutableMapping[str, Artifact],
    on_step: Callable[[StepNode, Artifact], None] | None = None,
) -> None:
    """Compute, in order, every node whose key isn't among the artifacts yet, and add it there."""
    for node in nodes:
        if node.key not in artifacts:
            artifacts[node.key] = run_step(bench, node, artifacts)  # type: ignore[arg-type]
        if on_step is not None:
            on_step(node, artifacts[node.key])


def run_sequence(
    study: RunSettings | Mapping[str, Any] | str | Path | None = None,
    order: Sequence[int] | None = None,
    *,
    split: Literal["test", "validation"] = "test",
    class_seed: int | None = None,
    bench: Workbench | None = None,
    on_step: Callable[[StepNode, Artifact], None] | None = None,
) -> SequenceResult:
    """Learn the tasks of a stream one after another, in this process.

    Args:
        study: settings, a mapping, or a study file; None: the defaults.
        order: the tasks' indices; None: as they come.
        split: what the accuracy matrix is measured on.
        class_seed: a class order instead of the stream's partition: classes are permuted as published
            (``loda.stream.published_class_order``), then cut into the stream's number of tasks.
        bench: an open workbench of the same settings, to load data and backbone once for many orders.
        on_step: called after each step.

    Returns:
        The same numbers and digests as ``orchestrate run`` gives for that order.

    Raises:
        ConfigError: bad settings, all at once.

    Example:
        >>> result = loda.run_sequence({"stream": {"tasks": 3}}, order=[2, 0, 1])  # doctest: +SKIP
        >>> result.summary.a_last, result.state_digest  # doctest: +SKIP
    """
    settings = load_run_settings(study)
    bench = open_workbench(settings) if bench is None else bench.with_settings(settings)
    if class_seed is not None:
        tasks = cut_published(published_class_order(class_seed, bench.dataset.classes), len(bench.tasks))
        bench = dataclasses.replace(bench, tasks=tasks)
    order = tuple(range(len(bench.tasks))) if order is None else tuple(order)
    if sorted(order) != list(range(len(bench.tasks))):
        raise ConfigError(f"order: expected each task from 0 to {len(bench.tasks) - 1} once, but got {list(order)}")
    nodes = sequence_nodes(bench, settings, order, split)
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts, on_step)
    return summarise(order, nodes, artifacts)
