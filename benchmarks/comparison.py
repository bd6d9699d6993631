"""LoDA against the other built-in methods, order by order, each with a learning rate and margin of its own.

    python benchmarks/comparison.py                                # the bundled study, ten orders
    python benchmarks/comparison.py my-study.yaml --orders 20 --json

Every trained method gets the same effort: a grid of learning rates (a factor of 2 apart) times margins, scored on
**validation** images over tuning orders by the study's own metric. The chosen setting is then run over evaluation
orders, none of which is a tuning order, and scored on **test** images. Everything else (head, classifier, drift
transport, augmentation, epochs, targets) is the study's, for all methods alike; sequential and joint LoRA have as many
directions as LoDA's two branches together. The row without GAO takes LoDA's chosen values.

Intervals are 95% over orders: Student's t of the mean and of the paired differences, and a BCa bootstrap of the
latter. Frozen features and joint training don't depend on the order, so their A_last has no spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy import stats

from loda.errors import StageError
from loda.graph import sequence_nodes
from loda.run import SequenceResult, run_nodes, summarise
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import Workbench, open_workbench
from orchestrate.orders import Order, design_orders
from orchestrate.study import Study, load_study

RESULTS = Path(__file__).resolve().parent / "results" / "comparison.json"
SUBJECT = "loda"


@dataclass(frozen=True)
class Contender:
    """A method in the comparison.

    Attributes:
        lr: centre of its grid of learning rates; None: nothing to choose.
        like: the contender whose chosen values it takes over instead of choosing its own.
    """

    name: str
    method: dict[str, Any]
    lr: float | None = None
    like: str | None = None


@dataclass
class Row:
    """What one contender gave: its chosen values, the whole grid's validation scores (%), and its test results."""

    name: str
    chosen: dict[str, float]
    grid: list[dict[str, Any]] = field(default_factory=list)
    orders: list[dict[str, Any]] = field(default_factory=list)

    def values(self, metric: str) -> np.ndarray | None:
        """(orders,) of a metric; None where the method doesn't define it."""
        found = [order[metric] for order in self.orders]
        return None if any(value is None for value in found) else np.asarray(found, dtype=np.float64)


def contenders(study: Study) -> list[Contender]:
    """LoDA as in the study, itself without GAO, and every other built-in method."""
    own: dict[str, Any] = study.method.model_dump()
    directions = own["rank_general"] + own["rank_isolated"]
    return [
        Contender(SUBJECT, own, lr=study.training.lr),
        Contender("loda without GAO", own | {"gao": False}, like=SUBJECT),
        # LoRA's scale is 1 where LoDA's branches have 0.14 and 0.29, so it wants lower learning rates.
        Contender("sequential", {"name": "sequential", "rank": directions}, lr=study.training.lr / 4),
        Contender("simplecil", {"name": "simplecil", "classifier": "class_means"}),
        Contender("simplecil lda", {"name": "simplecil", "classifier": "lda"}),
        Contender("joint", {"name": "joint", "rank": directions}, lr=study.training.lr / 2),
    ]


def learning_rates(centre: float, points: int) -> list[float]:
    """``points`` values a factor of 2 apart; of an even number, one more lies below the centre than above."""
    return [centre * 2.0**power for power in range(-(points // 2), points - points // 2)]


def settings_of(base: RunSettings, method: dict[str, Any], chosen: dict[str, float]) -> RunSettings:
    """The study under another method, learning rate and margin."""
    values = base.model_dump() | {"method": method}
    values["training"] |= {"lr": chosen["lr"]} if "lr" in chosen else {}
    values["head"] |= {"margin": chosen["margin"]} if "margin" in chosen else {}
    return RunSettings(**values)


def run_orders(bench: Workbench, settings: RunSettings, orders: Sequence[Order], split: str) -> list[SequenceResult]:
    """All orders under one setting; beginnings that orders share are computed once and dropped when done with."""
    bench = replace(bench, settings=settings)
    nodes = [sequence_nodes(bench, settings, order, split) for order in orders]
    artifacts: dict[str, Artifact] = {}
    results = []
    for index, order in enumerate(orders):
        run_nodes(bench, nodes[index], artifacts)
        result = summarise(order, nodes[index], artifacts)
        results.append(replace(result, evaluations=()))
        still_needed = {node.key for later in nodes[index + 1 :] for node in later}
        for key in artifacts.keys() - still_needed:
            del artifacts[key]
    return results


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


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95% t interval; zero where all values are equal."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired(subject: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Subject minus other over the same orders: mean, 95% intervals (None where undefined), and orders won."""
    differences = subject - other
    found: dict[str, Any] = {
        "mean": float(differences.mean()),
        "won": int((differences > 0).sum()),
        "orders": len(differences),
        "t": None,
        "bca": None,
    }
    if len(differences) < 2 or np.ptp(differences) == 0:
        return found
    interval = stats.ttest_rel(subject, other).confidence_interval(0.95)
    found["t"] = [float(interval.low), float(interval.high)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # two or three orders: answered with NaN, below
        drawn = stats.bootstrap(
            (differences,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(0)
        ).confidence_interval
    if np.isfinite([drawn.low, drawn.high]).all():
        found["bca"] = [float(drawn.low), float(drawn.high)]
    return found


def choose(
    bench: Workbench,
    base: RunSettings,
    contender: Contender,
    args: argparse.Namespace,
    tune: Sequence[Order],
    metric: str,
) -> Row:
    """Score the contender's grid on validation images; the first of equal settings wins."""
    grid: list[dict[str, Any]] = []
    if contender.lr is not None:
        for margin in args.margins:
            for lr in learning_rates(contender.lr, args.grid):
                chosen = {"lr": lr, "margin": margin}
                score: float | None = None
                try:
                    results = run_orders(bench, settings_of(base, contender.method, chosen), tune, "validation")
                    score = float(np.mean([getattr(result.summary, metric) for result in results]))
                except StageError as error:  # diverged on an order: not a candidate, and on record as such
                    print(f"  {contender.name}: {error}", file=sys.stderr)
                grid.append(chosen | {f"validation_{metric}": score})
                shown = "failed" if score is None else f"{metric} {score:.2f}"
                print(f"  {contender.name}: lr {lr:g}, margin {margin:g}: {shown}", file=sys.stderr)
    finished = [point for point in grid if point[f"validation_{metric}"] is not None]
    if grid and not finished:
        raise SystemExit(f"{contender.name}: every setting of the grid failed; the messages are above")
    best = max(finished, key=lambda point: point[f"validation_{metric}"]) if finished else {}
    return Row(contender.name, {key: best[key] for key in ("lr", "margin") if key in best}, grid)


def compare(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison as one JSON document."""
    started = time.perf_counter()
    base = study.run_settings()
    bench = open_workbench(base)
    plan = design_orders("random", len(bench.tasks), args.tune_orders, args.orders, study.orders.seed)
    metric = study.search.objective.metric
    rows: dict[str, Row] = {}
    for contender in contenders(study):
        began = time.perf_counter()
        if contender.like is None:
            row = choose(bench, base, contender, args, plan.tune, metric)
        else:
            row = Row(contender.name, rows[contender.like].chosen)
        results = run_orders(bench, settings_of(base, contender.method, row.chosen), plan.evaluate, "test")
        row.orders = [order_record(result) for result in results]
        rows[contender.name] = row
        print(f"{contender.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    differences = {
        name: {
            key: paired(ours, theirs)
            for key in ("a_last", "a_avg")
            if (ours := rows[SUBJECT].values(key)) is not None and (theirs := row.values(key)) is not None
        }
        for name, row in rows.items()
        if name != SUBJECT
    }
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    return {
        "study": study.name,
        "epochs": study.training.epochs,
        "tasks": [task.name for task in bench.tasks],
        "tune_orders": [list(order) for order in plan.tune],
        "chosen_by": f"validation {metric}",
        "rows": {name: asdict(row) for name, row in rows.items()},
        "differences": differences,
        "machine": machine | {"threads": base.compute.threads, "device": str(bench.backbone.device)},
        "wall_seconds": time.perf_counter() - started,
    }


def table(document: dict[str, Any]) -> str:
    """Two tables for people: each method's figures, and what LoDA is ahead by."""
    rows = {name: Row(**row) for name, row in document["rows"].items()}
    count = len(rows[SUBJECT].orders)
    lines = [
        f"{document['study']}: {len(document['tasks'])} tasks, {count} orders, test images, %; "
        "mean ± half of the 95% t interval over orders",
        f"{'method':18}{'lr':>8}{'margin':>8}{'A_last':>15}{'A_avg':>15}{'forgetting':>15}{'s/order':>9}",
    ]
    for name, row in rows.items():
        cells = "".join(f"{row.chosen.get(key, '-'):>8}" for key in ("lr", "margin"))
        for metric in ("a_last", "a_avg", "forgetting"):
            values = row.values(metric)
            cells += f"{'-':>15}" if values is None else "{:>9.2f} ±{:4.2f}".format(*mean_interval(values))
        seconds = np.mean([order["seconds"] for order in row.orders])
        lines.append(f"{name:18}{cells}{seconds:9.1f}")
    lines += ["", f"{'LoDA minus':18}{'':8}{'mean':>8}{'95% t':>19}{'95% BCa':>19}{'orders won':>12}"]
    for name, metrics in document["differences"].items():
        for metric, found in metrics.items():
            intervals = "".join(
                f"{'-':>19}" if found[kind] is None else "{:>19}".format("[{:.2f}, {:.2f}]".format(*found[kind]))
                for kind in ("t", "bca")
            )
            won = f"{found['won']}/{found['orders']}"
            lines.append(f"{name:18}{metric:8}{found['mean']:+8.2f}{intervals}{won:>12}")
    lines += ["", f"wall {document['wall_seconds']:.0f} s, {document['machine']['threads']} thread(s)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument("--orders", type=int, default=10, help="evaluation orders")
    parser.add_argument("--tune-orders", type=int, default=2, help="orders that learning rate and margin are chosen on")
    parser.add_argument("--grid", type=int, default=4, help="learning rates a method")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.0, 0.1], help="margins a learning rate")
    parser.add_argument("--epochs", type=int, help="default: the study's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON document is kept")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of tables")
    args = parser.parse_args()
    study = load_study(args.study)
    if args.epochs:
        study = study.with_values({"training.epochs": args.epochs})
    document = compare(study, args)
    text = json.dumps(document, indent=1, allow_nan=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else table(document))


if __name__ == "__main__":
    main()
