"""LoDA against the other built-in methods, order by order, each with a learning rate and margin of its own.

    python benchmarks/comparison.py                                # the bundled study, ten orders, every method
    python benchmarks/comparison.py --methods inflora ranpac       # a part; its rows join those in the file
    python benchmarks/comparison.py my-study.yaml --orders 20 --out mine.json --jobs 4

Every trained method gets the same effort: a grid of learning rates (a factor of 2 apart) times margins, scored on
**validation** images over tuning orders by the study's own metric. The chosen setting is then run over evaluation
orders, none of which is a tuning order, and scored on **test** images. Everything else (head, classifier, drift
transport, augmentation, epochs, targets) is the study's, for all methods alike. A method with a rank has as many
directions as LoDA's two branches together (of the expert pool: experts, of which its default number is at work); BiLoRA
and RanPAC have no rank and keep their defaults, and so do all settings that only one method has. CoSO steps with Adam,
which is its rule; the others with the study's optimiser. The row without GAO takes LoDA's chosen values.

Left out: ``icmlora``, which routes each image to a generated LoRA of one task, and the joint-mode methods
``ortholora``, ``mtllora`` and ``thanora``, which learn all tasks in one stage.

Rows are added to the JSON file as they are finished; one that is there under the same settings isn't computed again.
Intervals are 95% over orders: Student's t of the mean and of the paired differences, and a BCa bootstrap of the
latter. Frozen features and joint training don't depend on the order, so their A_last has no spread. Seconds are those of
the stages of one order, as if none were shared; they depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from comparison_table import RESULTS, Row, differences, table
from contenders import Contender, contenders, grid_of, row_digest, settings_of, with_likes

from loda.datasets import ImageDataset, load_dataset
from loda.errors import ConfigError, StageError
from loda.graph import sequence_nodes
from loda.run import SequenceResult, run_nodes, summarise
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import Workbench, memory_bytes, open_workbench
from orchestrate.orders import Order, design_orders
from orchestrate.study import Study, load_study


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


def choose(bench: Workbench, plan: Plan, contender: Contender) -> Row:
    """Score the contender's grid on validation images; the first of equal settings wins."""
    grid: list[dict[str, Any]] = []
    key = f"validation_{plan.metric}"
    for chosen in grid_of(contender, plan.grid, plan.margins):
        score: float | None = None
        try:
            settings = settings_of(bench.settings, contender, chosen)
            runs = run_orders(bench, settings, plan.tune, "validation")
            score = float(np.mean([getattr(run.result.summary, plan.metric) for run in runs]))
        except StageError as error:  # diverged on an order: not a candidate, and on record as such
            print(f"  {contender.name}: {error}", file=sys.stderr)
        grid.append(chosen | {key: score})
        shown = "failed" if score is None else f"{plan.metric} {score:.2f}"
        print(f"  {contender.name}: lr {chosen['lr']:g}, margin {chosen['margin']:g}: {shown}", file=sys.stderr)
    finished = [point for point in grid if point[key] is not None]
    if grid and not finished:
        raise SystemExit(f"{contender.name}: every setting of the grid failed; the messages are above")
    best = max(finished, key=lambda point: point[key]) if finished else {}
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


def heading(plan: Plan) -> dict[str, Any]:
    """What makes rows comparable; all rows of a file have it in common."""
    bench = bench_of(plan.study, plan.classes)
    return {
        "study": plan.study.name,
        "epochs": plan.study.training.epochs,
        "tasks": [task.name for task in bench.tasks],
        "classes": bench.dataset.classes,
        "tune_orders": [list(order) for order in plan.tune],
        "evaluation_orders": [list(order) for order in plan.evaluate],
        "effort": {"learning_rates": plan.grid, "margins": list(plan.margins)},
        "chosen_by": f"validation {plan.metric}",
    }


def kept_document(path: Path, head: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What the file holds of this comparison.

    Raises:
        SystemExit: it holds another comparison, which is not overwritten unasked.
    """
    if not path.is_file():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, value in head.items() if document.get(key) != value]
    if other and not fresh:
        raise SystemExit(f"{path}: holds a comparison with other {', '.join(other)}; give another --out, or --fresh")
    return {} if other else document


def compare(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """The comparison as one JSON document, kept in the file after each row."""
    started = time.perf_counter()
    bench = bench_of(plan.study, plan.classes)
    everyone = contenders(plan.study)
    wanted = with_likes(args.methods or [one.name for one in everyone], everyone)
    head = heading(plan)
    kept = kept_document(args.out, head, args.fresh)
    digests: dict[str, str] = {}
    for one in everyone:
        grid = grid_of(one, plan.grid, plan.margins)
        digests[one.name] = row_digest(bench, bench.settings, one, grid, digests[one.like] if one.like else None)
    rows = {name: Row(**row) for name, row in kept.get("rows", {}).items() if name in digests}
    stale = {name for name, row in rows.items() if row.settings_digest != digests[name]}
    if args.fresh:
        stale |= {one.name for one in wanted}
    for name in stale:
        del rows[name]
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    machine |= {"threads": bench.settings.compute.threads, "device": str(bench.backbone.device)}

    def document() -> dict[str, Any]:
        ordered = {one.name: rows[one.name] for one in everyone if one.name in rows}
        return {
            **head,
            "rows": {name: asdict(row) for name, row in ordered.items()},
            "differences": differences(ordered),
            "machine": machine,
            "wall_seconds": kept.get("wall_seconds", 0.0) + time.perf_counter() - started,
        }

    def finished(row: Row) -> None:
        row.settings_digest = digests[row.name]
        rows[row.name] = row
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_name(f"{args.out.name}.part")
        part.write_text(json.dumps(document(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(args.out)

    compute(plan, wanted, rows, args.jobs, finished)
    return json.loads(args.out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these rows; default: all")
    parser.add_argument("--orders", type=int, default=10, help="evaluation orders")
    parser.add_argument("--tune-orders", type=int, default=2, help="orders that learning rate and margin are chosen on")
    parser.add_argument("--grid", type=int, default=4, help="learning rates a method")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.0, 0.1], help="margins a learning rate")
    parser.add_argument("--epochs", type=int, help="default: the study's")
    parser.add_argument("--classes", type=int, help="only the first classes of the data set, in the order of labels")
    parser.add_argument("--jobs", type=int, default=1, help="rows computed at a time, a process each")
    parser.add_argument("--fresh", action="store_true", help="compute rows again that the file has already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON document is kept")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of tables")
    args = parser.parse_args()
    study = load_study(args.study)
    if args.epochs:
        study = study.with_values({"training.epochs": args.epochs})
    tasks = len(bench_of(study, args.classes).tasks)
    orders = design_orders("random", tasks, args.tune_orders, args.orders, study.orders.seed)
    plan = Plan(study, args.classes, tuple(orders.tune), tuple(orders.evaluate), args.grid, tuple(args.margins))
    document = compare(plan, args)
    print(json.dumps(document, indent=1, allow_nan=False) if args.json else table(document))


if __name__ == "__main__":
    main()
