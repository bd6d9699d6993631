"""LoDA against the other built-in methods, order by order, each with a learning rate and margin of its own.

    python benchmarks/comparison.py                                # the bundled study, ten orders, every method
    python benchmarks/comparison.py --methods inflora ranpac       # a part; its rows join those in the file
    python benchmarks/comparison.py my-study.yaml --orders 20 --out mine.json --jobs 4

Every trained method gets the same effort: a grid of learning rates (a factor of 2 apart) times margins, scored on
**validation** images over tuning orders by the study's own metric. While the best rate is the lowest or highest one
tried, the grid goes on beyond it, by up to three more. The chosen setting is then run over evaluation orders, none of
which is a tuning order, and scored on **test** images. Everything else (head, classifier, drift
transport, augmentation, epochs, targets) is the study's, for all methods alike. A method with a rank has as many
directions as LoDA's two branches together (of the expert pool: experts, of which its default number is at work); BiLoRA
and RanPAC have no rank and keep their defaults, and so do all settings that only one method has. CoSO steps with Adam,
which is its rule; the others with the study's optimiser. The row without GAO takes LoDA's chosen values.

Left out: ``icmlora``, which routes each image to a generated LoRA of one task, and the joint-mode methods
``ortholora``, ``mtllora`` and ``thanora``, which learn all tasks in one stage.

Rows are added to the JSON file as they are finished; one that is there under the same settings isn't computed again.
Intervals are 95% over orders: Student's t of the mean and of the paired differences, and a BCa bootstrap of the
latter. Frozen features and joint training don't depend on the order, so their A_last has no spread. Seconds are those
of one order's stages, as if none were shared; they depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from comparison_rows import EXTENSIONS, Plan, bench_of, compute
from comparison_table import RESULTS, Row, differences, table
from contenders import contenders, grid_of, row_digest, with_likes

from loda.errors import ConfigError
from orchestrate.orders import design_orders
from orchestrate.study import load_study


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
        "effort": {"learning_rates": plan.grid, "further": EXTENSIONS, "margins": list(plan.margins)},
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
    try:
        study = load_study(args.study)
        if args.epochs:
            study = study.with_values({"training.epochs": args.epochs})
        tasks = len(bench_of(study, args.classes).tasks)
        orders = design_orders("random", tasks, args.tune_orders, args.orders, study.orders.seed)
    except ConfigError as error:
        parser.error(str(error))
    plan = Plan(study, args.classes, tuple(orders.tune), tuple(orders.evaluate), args.grid, tuple(args.margins))
    document = compare(plan, args)
    print(json.dumps(document, indent=1, allow_nan=False) if args.json else table(document))


if __name__ == "__main__":
    main()
