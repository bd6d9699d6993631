"""Record the table that benchmarks/racing.py replays: settings of a search space x orders, task by task.

    python benchmarks/racing_table.py            # 32 settings x 10 orders of the bundled stream, two epochs a task

Settings are drawn at random from the study's search space. Each is run over the same orders and scored after each task
on validation images (what a search sees) and on test images. A setting that diverges on an order has null there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optuna

from loda.errors import StageError
from loda.graph import sequence_nodes
from loda.run import run_nodes, summarise
from loda.state import Artifact
from loda.workbench import Workbench, open_workbench
from orchestrate.orders import Order, design_orders
from orchestrate.space import load_space
from orchestrate.study import Study, load_study

TABLE = Path(__file__).resolve().parent / "results" / "racing_table.json"
SPLITS = ("validation", "test")


def draw_settings(study: Study, count: int, seed: int) -> list[dict[str, Any]]:
    """Random settings of the study's space, by key path."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load_space(study.search.space)
    sampler = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.suggest(sampler.ask()) for _ in range(count)]


def curves(bench: Workbench, study: Study, settings: dict[str, Any], orders: list[Order]) -> list[Any]:
    """For each order, by split: accuracy (%) over all classes seen, after each task; None where training diverged."""
    run_settings = study.with_values(settings).run_settings()
    bench = replace(bench, settings=run_settings)
    artifacts: dict[str, Artifact] = {}
    rows: list[Any] = []
    for order in orders:
        try:
            row = {}
            for split in SPLITS:
                nodes = sequence_nodes(bench, run_settings, order, split)
                run_nodes(bench, nodes, artifacts)
                row[split] = list(summarise(order, nodes, artifacts).summary.curve)
            rows.append(row)
        except StageError as error:
            print(f"  {settings}: {error}", file=sys.stderr)
            rows.append(None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument("--settings", type=int, default=32)
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the settings drawn")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    study = load_study(args.study).with_values({"training.epochs": args.epochs})
    bench = open_workbench(study.run_settings())
    orders = list(design_orders("random", len(bench.tasks), 0, args.orders, study.orders.seed).evaluate)
    started, rows = time.perf_counter(), []
    for number, settings in enumerate(draw_settings(study, args.settings, args.seed)):
        rows.append({"settings": settings, "orders": curves(bench, study, settings, orders)})
        print(f"{number + 1}/{args.settings}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    document = {
        "study": study.name,
        "space": study.search.space,
        "epochs": args.epochs,
        "seed": args.seed,
        "tasks": [task.name for task in bench.tasks],
        "orders": [list(order) for order in orders],
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(rows)} settings x {len(orders)} orders in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
