"""How ``comparison.py`` computes a row: a grid scored on tuning orders, then evaluation orders of what was best."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from comparison_table import Row
from contenders import Contender, beyond, grid_of, settings_of

from loda.datasets import ImageDataset, load_dataset
from loda.errors import ConfigError, StageError
from loda.graph import sequence_nodes
from loda.run import SequenceResult, run_nodes, summarise
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import Workbench, memory_bytes, open_workbench
from orchestrate.orders import Order
from orchestrate.study import Study

EXTENSIONS = 3  # rates beyond the grid, while the best one is at its end


@dataclass(frozen=True)
class Plan:
    """What all rows share: the study, its classes, the orders and the effort a method gets."""

    study: Study
    classes: int | None
    tune: tuple[Order, ...]
    evaluate: tuple[Order, ...]
    grid: int
    margins: tuple[float, ...]

    @property
    def metric(self) -> str:
        """What settings are chosen by."""
        return self.study.search.objective.metric


def first_classes(dataset: ImageDataset, count: int) -> ImageDataset:
    """The first classes in the order of labels, all their images."""
    if not 1 <= count <= dataset.classes:
        raise ConfigError(f"--classes: expected 1 to {dataset.classes} (dataset {dataset.name!r}), but got {count}")
    rows = np.flatnonzero(dataset.labels < count)
    return ImageDataset(
        name=dataset.name,
        images=dataset.images.take(rows),
        labels=dataset.labels[rows],
        class_names=dataset.class_names[:count],
        split=dataset.split[rows],
        groups=None if dataset.groups is None else dataset.groups[:count],
        licence=dataset.licence,
    )


@cache
def open_bench(study_json: str, classes: int | None) -> Workbench:
    """Once a process."""
    settings = Study(**json.loads(study_json)).run_settings()
    dataset = None if classes is None else first_classes(load_dataset(settings.stream.dataset), classes)
    return open_workbench(settings, dataset=dataset)


def bench_of(study: Study, classes: int | None) -> Workbench:
    return open_bench(study.model_dump_json(), classes)


@dataclass(frozen=True)
class OrderRun:
    """One order's result, and the most parameters trained in one of its tasks."""

    result: SequenceResult
    trainable_parameters: int


def run_orders(bench: Workbench, settings: RunSettings, orders: Sequence[Order], split: str) -> list[OrderRun]:
    """All orders under one setting; beginnings that orders share are computed once and dropped when done with."""
    bench = replace(bench, settings=settings)
    nodes = [sequence_nodes(bench, settings, order, split) for order in orders]
    artifacts: dict[str, Artifact] = {}
    runs = []
    for index, order in enumerate(orders):
        run_nodes(bench, nodes[index], artifacts)
        result = summarise(order, nodes[index], artifacts)
        trained = [artifacts[node.key].meta.get("trainable_parameters", 0) for node in nodes[index]]
        runs.append(OrderRun(replace(result, evaluations=()), max(trained)))
        still_needed = {node.key for later in nodes[index + 1 :] for node in later}
        for key in artifacts.keys() - still_needed:
            del artifacts[key]
    return runs


def order_record(result: SequenceResult) -> dict[str, Any]:
    """One order's figures as plain JSON; a joint method has no stages to average or to forget over."""
    stages = len(result.accuracy_matrix)
    summary = result.summary
    return {
        "order": [int(task) for task in result.order],
        "a_last": summary.a_last,
        "a_avg": summary.a_avg if stages > 1 else None,
        "forgetting": summary.forgetting,
        "curve": list(summary.curve),
        "seconds": result.seconds,
        "state_digest": result.state_digest,
    }


def score(bench: Workbench, plan: Plan, contender: Contender, chosen: dict[str, float]) -> float | None:
    """Mean over tuning orders of the study's metric on validation images (%); None: diverged on an order."""
    found: float | None = None
    try:
        runs = run_orders(bench, settings_of(bench.settings, contender, chosen), plan.tune, "validation")
        found = float(np.mean([getattr(run.result.summary, plan.metric) for run in runs]))
    except StageError as error:  # not a candidate, and on record as such
        print(f"  {contender.name}: {error}", file=sys.stderr)
    shown = "failed" if found is None else f"{plan.metric} {found:.2f}"
    print(f"  {contender.name}: lr {chosen['lr']:g}, margin {chosen['margin']:g}: {shown}", file=sys.stderr)
    return found


def choose(bench: Workbench, plan: Plan, contender: Contender) -> Row:
    """Score the contender's grid, and rates beyond its ends while the best is there; the first of equal ones wins."""
    key = f"validation_{plan.metric}"
    grid: list[dict[str, Any]] = []
    points = grid_of(contender, plan.grid, plan.margins)
    for extension in range(EXTENSIONS + 1):
        grid += [chosen | {key: score(bench, plan, contender, chosen)} for chosen in points]
        finished = [point for point in grid if point[key] is not None]
        if grid and not finished:
            raise SystemExit(f"{contender.name}: every setting of the grid failed; the messages are above")
        best = max(finished, key=lambda point: point[key]) if finished else {}
        further = beyond([point["lr"] for point in grid], best["lr"]) if plan.grid > 1 and best else None
        if further is None or extension == EXTENSIONS:
            break
        points = [{"lr": further, "margin": margin} for margin in plan.margins]
    return Row(contender.name, {name: best[name] for name in ("lr", "margin") if name in best}, grid)


def compute_row(plan: Plan, contender: Contender, chosen: dict[str, float] | None) -> Row:
    """A contender's row: its values chosen, or taken over as ``chosen``, then the evaluation orders on test images."""
    began = time.perf_counter()
    bench = bench_of(plan.study, plan.classes)
    row = choose(bench, plan, contender) if chosen is None else Row(contender.name, chosen)
    runs = run_orders(bench, settings_of(bench.settings, contender, row.chosen), plan.evaluate, "test")
    row.orders = [order_record(run.result) for run in runs]
    row.memory_bytes = max(memory_bytes(run.result.state) for run in runs)
    row.trainable_parameters = max(run.trainable_parameters for run in runs)
    row.seconds_per_order = float(np.mean([run.result.seconds for run in runs]))
    print(f"{contender.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return row


def compute(
    plan: Plan, wanted: Sequence[Contender], rows: dict[str, Row], jobs: int, finished: Callable[[Row], None]
) -> None:
    """Fill ``rows`` with those that are missing, each after the one whose values it takes over."""
    missing = [contender for contender in wanted if contender.name not in rows]
    if jobs == 1:
        for contender in missing:
            finished(compute_row(plan, contender, rows[contender.like].chosen if contender.like else None))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running: set[Future[Row]] = set()
        while missing or running:
            for contender in [one for one in missing if one.like is None or one.like in rows]:
                chosen = rows[contender.like].chosen if contender.like else None
                running.add(pool.submit(compute_row, plan, contender, chosen))
                missing.remove(contender)
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                finished(future.result())
