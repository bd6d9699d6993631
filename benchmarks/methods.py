"""What each registered method costs: trained parameters, bytes kept between tasks and their growth, time an image.

    python benchmarks/methods.py                     # the bundled study, one epoch, a quarter of its training images
    python benchmarks/methods.py my-study.yaml --tasks 4 --validation 0 --json

Every method learns the first tasks of the stream under the study's own head, targets and augmentation. Bytes are the
method's own (``loda.workbench.memory_bytes``): merged weights, heads and class statistics, which all methods have, are
left out. Time is that of observing, training and merging a task, over its training images (with one epoch by default);
accuracy isn't measured here. Joint methods learn all tasks in one stage.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loda.graph import sequence_nodes
from loda.methods import registry
from loda.run import run_nodes
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import memory_bytes, open_workbench
from orchestrate.study import load_study


def measure(settings: RunSettings, tasks: int) -> dict[str, Any]:
    """One method on the first tasks, its steps one after another; evaluation is left out."""
    bench = open_workbench(settings)
    nodes = [
        node
        for node in sequence_nodes(bench, settings, range(min(tasks, len(bench.tasks))), "test")
        if node.step != "evaluate"
    ]
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts)
    images = sum(artifacts[node.key].meta["images"] for node in nodes if node.step == "observe")
    stored = [memory_bytes(artifacts[node.key]) for node in nodes if node.step == "consolidate"]
    trained = [artifacts[node.key].meta.get("trainable_parameters", 0) for node in nodes if node.step == "adapt"]
    seconds = {
        step: sum(artifacts[node.key].timings["seconds"] for node in nodes if node.step == step)
        for step in ("observe", "adapt", "consolidate")
    }
    method = registry()[settings.method.name]
    return {
        "trainable_parameters": trained,
        "stored_bytes": stored,
        "growth_bytes_per_task": (stored[-1] - stored[0]) / (len(stored) - 1) if len(stored) > 1 else None,
        "growth": method.memory_growth,
        "seconds_per_image": sum(seconds.values()) / images / settings.training.epochs,
        "seconds": seconds,
        "images": images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument("--tasks", type=int, default=3, help="tasks to learn, the first of the stream")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--validation", type=float, default=0.75, help="share of the training images to leave out")
    parser.add_argument("--lr", type=float, default=0.001, help="low for all: nothing here depends on what is learned")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    study = load_study(args.study)
    common = {"training.epochs": args.epochs, "training.lr": args.lr, "stream.validation": args.validation}
    rows: dict[str, dict[str, Any]] = {}
    for name in args.methods or sorted(registry()):
        rows[name] = measure(study.with_values({**common, "method.name": name}).run_settings(), args.tasks)
        print(f"{name}: {sum(rows[name]['seconds'].values()):.1f} s", file=sys.stderr)
    if args.json:
        print(json.dumps({"study": study.name, "tasks": args.tasks, "epochs": args.epochs, "rows": rows}))
        return
    print(f"{'method':12} {'trained':>10} {'kept, kB':>10} {'a task, kB':>10} {'growth':>9} {'ms an image':>12}")
    for name, row in rows.items():
        growth = row["growth_bytes_per_task"]
        print(
            f"{name:12} {max(row['trainable_parameters']):>10} {row['stored_bytes'][-1] / 1e3:>10.1f} "
            f"{'' if growth is None else f'{growth / 1e3:.1f}':>10} {row['growth']:>9} "
            f"{1e3 * row['seconds_per_image']:>12.2f}"
        )


if __name__ == "__main__":
    main()
