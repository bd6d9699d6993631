"""Does a task cost the same wherever it stands, and what do two workers give?

    python benchmarks/scaling.py                    # 57 tasks of 4 classes of the bundled stream; then Ray workers
    python benchmarks/scaling.py --tasks 57 --no-workers --json

One order of a stream of many equal tasks, walked by a worker as the platform does it, stages written to a store and
read back. Training time goes with a task's images, and random tasks differ by none: 4 classes of 15 drawings each.
Evaluation is left out of ``ratio``: it scores all classes seen so far, so it grows by what is asked of it.

``ratio``: seconds of a task (observe, adapt, consolidate), median of tasks 46 to 50 over median of tasks 2 to 6.
``stored_ratio``: bytes that the method keeps after task 50 over those after task 2. ``grown_mb``: how much the process
has grown from task 6 to task 50. ``total_10``, ``total_20``, ``total_50``: seconds of the first tasks, all steps but
evaluation. ``workers_ratio``: seconds of training a task with two Ray Train workers of one thread over one such worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from loda.workbench import memory_bytes
from orchestrate.session import open_session
from orchestrate.store import StageStore
from orchestrate.study import Study, load_study
from orchestrate.sweep import run_study
from orchestrate.worker import Walker

EARLY, LATE = range(1, 6), range(45, 50)  # positions: tasks 2 to 6, and 46 to 50


def study_of(folder: Path, tasks: int, changes: dict[str, Any] | None = None) -> Study:
    """The bundled study on random tasks of one size, in a folder of its own."""
    places = {
        "stream.tasks": tasks,
        "stream.partition": "random",
        "stream.validation": 0,
        "training.epochs": 2,
        "orders.tune": 1,
        "orders.evaluate": 1,
        "resources.store": str(folder / "stages"),
        "resources.runs": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",
        "tracking.register_model": False,
    }
    return load_study(None).with_values(places | (changes or {}))


def walk(folder: Path, tasks: int) -> dict[str, Any]:
    """Seconds by position, bytes kept, and the process's size, for one order."""
    session = open_session(study_of(folder, tasks), search=False)
    walker = Walker(session.bench, StageStore(session.study.resources.store))
    process = psutil.Process()
    seconds: dict[int, float] = {}
    evaluating: dict[int, float] = {}
    kept: dict[int, int] = {}
    size: dict[int, int] = {}
    for node in session.nodes({}, session.evaluate_orders[0]):
        walker.ensure(node)
        spent = walker.computed.pop(node.key)
        if node.step == "evaluate":
            evaluating[node.position], size[node.position] = spent, process.memory_info().rss
            continue
        seconds[node.position] = seconds.get(node.position, 0.0) + spent
        if node.step == "consolidate":
            kept[node.position] = memory_bytes(walker.fetch(node.key))
    late = [position for position in LATE if position < tasks]
    if not late:
        raise SystemExit(f"--tasks {tasks}: at least 50 are compared")
    last = late[-1]
    return {
        "ratio": statistics.median(seconds[p] for p in late) / statistics.median(seconds[p] for p in EARLY),
        "stored_ratio": kept[last] / kept[EARLY[0]],
        "grown_mb": (size[last] - size[EARLY[-1]]) / 1e6,
        "early_seconds": statistics.median(seconds[p] for p in EARLY),
        "late_seconds": statistics.median(seconds[p] for p in late),
        **{f"total_{count}": sum(seconds[p] for p in range(count)) for count in (10, 20, 50)},
        "evaluate_early_seconds": statistics.median(evaluating[p] for p in EARLY),
        "evaluate_late_seconds": statistics.median(evaluating[p] for p in late),
        "tasks": tasks,
    }


def workers(folder: Path) -> dict[str, Any]:
    """Seconds of training the tasks of a short stream, by one and by two Ray Train workers."""
    found: dict[str, Any] = {}
    for count in (1, 2):
        changes = {
            "stream.tasks": 3,
            "resources.workers": count,
            "resources.concurrent_trials": 1,
            "training.epochs": 4,
        }
        study = study_of(folder / f"workers-{count}", 3, changes)
        outcome = run_study(study)
        store = StageStore(study.resources.store)
        session = open_session(study, search=False)
        nodes = session.nodes({}, session.evaluate_orders[0])
        found[f"workers_{count}_seconds"] = sum(
            (store.timings(node.key) or {})["seconds"] for node in nodes if node.step == "adapt"
        )
        found[f"workers_{count}_a_last"] = outcome.values["a_last"]["mean"]
    found["workers_ratio"] = found["workers_2_seconds"] / found["workers_1_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=57, help="of the bundled stream's 228 classes; 57 are all of 4")
    parser.add_argument("--no-workers", action="store_true", help="leave the comparison of Ray workers out")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measured = walk(Path(name), args.tasks)
        if not args.no_workers:
            measured |= workers(Path(name))
    if args.json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
