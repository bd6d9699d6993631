"""What shared prefixes save: a tree of orders with sharing and without, to the same digests.

    python benchmarks/sharing.py                     # 4 roots x 8 continuations, 5 of 10 tasks shared
    python benchmarks/sharing.py study.yaml --roots 2 --continuations 2 --depth 1 --json

Walks every order of a tree in this process, root by root, each root once with sharing and once as ``--no-sharing``
does, so that both see the same machine; stages go to a temporary store on the disk. Data, backbone and decoded images
are warm before the clock starts. Then, on the stages that sharing left: the first order of each root under another
``gamma_m``, and all orders of the first root under another ``head.classifier``.

Claims: with sharing at most 57% of the stages run, in at most 62% of the wall time, and all digests are equal; another
gamma_m reuses everything before consolidation of the second task (at the first there is nothing to recalibrate
against); another classifier trains nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loda.distributed import WorkerGroup
from orchestrate.orders import design_orders
from orchestrate.study import Study, load_study
from orchestrate.work import OrderWork, StageCounts, WorkList, name_orders
from orchestrate.worker import bench_for, run_work

# The bundled study, cut into ten tasks and made quick: what is measured is the platform's saving, not accuracy.
QUICK = {
    "stream.tasks": 10,
    "stream.partition": "random",
    "method.gao": False,
    "method.rank_general": 8,
    "method.rank_isolated": 8,
    "training.epochs": 2,
    "backbone.target": ["attn.qkv"],
}


@dataclass
class Walks:
    """Work lists walked one after another through one store, and what they took."""

    study: Study
    store: Path
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    counts: StageCounts = field(default_factory=StageCounts)
    digests: dict[str, str] = field(default_factory=dict)
    ran: list[tuple[int, str]] = field(default_factory=list)  # position and step of each step computed

    def walk(self, orders: Sequence[OrderWork], settings: dict[str, Any] | None = None) -> None:
        """Walk orders as a worker does."""

        def report(metrics: dict[str, Any]) -> None:
            for event in metrics["events"]:
                self.counts.add(event["steps"])
                self.ran += [(event["position"], step["step"]) for step in event["steps"] if step["ran"]]

        work = WorkList(settings or {}, tuple(orders))
        payload = {"study": self.study.resolved(), "store": str(self.store), "work": work.to_dict()}
        started, cpu_started = time.perf_counter(), time.process_time()
        final = run_work(payload, report, WorkerGroup())
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu_started
        self.digests |= {order["name"]: order["state_digest"] for order in final["orders"]}


def measure(study: Study, roots: int, continuations: int, depth: int, folder: Path) -> dict[str, Any]:
    """Everything that the claims are about."""
    tasks = len(bench_for(study.run_settings(), WorkerGroup()).tasks)
    plan = design_orders("tree", tasks, 0, 0, 0, roots=roots, continuations=continuations, depth=depth)
    orders = name_orders(plan, "evaluate", "test")
    by_root = [orders[start : start + continuations] for start in range(0, len(orders), continuations)]
    Walks(study, folder / "warm").walk(orders[:1])
    shared = Walks(study, folder / "stages")
    alone = Walks(study.with_values({"resources.sharing": False}), folder / "alone")
    for number, some in enumerate(by_root):
        for walks in (shared, alone) if number % 2 else (alone, shared):
            walks.walk(some)
    gamma = Walks(study, folder / "stages")
    gamma.walk([some[0] for some in by_root], {"method.gamma_m": study.resolved()["method"]["gamma_m"] + 1})
    classifier = Walks(study, folder / "stages")
    classifier.walk(by_root[0], {"head.classifier": "class_means"})
    return {
        "orders": len(orders),
        "tasks": tasks,
        "stages_without": alone.counts.stages_run,
        "stages_with": shared.counts.stages_run,
        "stage_ratio": shared.counts.stages_run / alone.counts.stages_run,
        "seconds_without": alone.seconds,
        "seconds_with": shared.seconds,
        "ratio": shared.seconds / alone.seconds,
        "cpu_seconds_without": alone.cpu_seconds,
        "cpu_seconds_with": shared.cpu_seconds,
        "cpu_ratio": shared.cpu_seconds / alone.cpu_seconds,
        "same_digests": shared.digests == alone.digests,
        "gamma_m": {
            "steps_requested": gamma.counts.steps_requested,
            "steps_run": gamma.counts.steps_run,
            "trained": gamma.counts.by_step.get("adapt", 0),
            # nothing of the first task may run, and neither observing nor training of the second
            "run_before_it": sum(at == 0 or (at == 1 and step in ("observe", "adapt")) for at, step in gamma.ran),
        },
        "classifier": {
            "steps_requested": classifier.counts.steps_requested,
            "steps_run": classifier.counts.steps_run,
            "run_but_evaluate": classifier.counts.steps_run - classifier.counts.by_step.get("evaluate", 0),
        },
    }


def table(found: dict[str, Any]) -> str:
    """The claims beside what was measured."""
    gamma, classifier = found["gamma_m"], found["classifier"]
    rows = [
        ("stages run", found["stages_without"], found["stages_with"], f"{found['stage_ratio']:.1%}", "at most 57%"),
        (
            "wall seconds",
            f"{found['seconds_without']:.1f}",
            f"{found['seconds_with']:.1f}",
            f"{found['ratio']:.1%}",
            "at most 62%",
        ),
        (
            "CPU seconds",
            f"{found['cpu_seconds_without']:.1f}",
            f"{found['cpu_seconds_with']:.1f}",
            f"{found['cpu_ratio']:.1%}",
            "(other work on the machine tells less on it)",
        ),
    ]
    lines = [f"{found['orders']} orders of {found['tasks']} tasks"]
    lines.append(f"{'':14}{'without':>10}{'with':>10}{'ratio':>9}  claim")
    lines += [f"{name:14}{without:>10}{with_:>10}{ratio:>9}  {claim}" for name, without, with_, ratio, claim in rows]
    lines.append(f"digests of all orders equal: {'yes' if found['same_digests'] else 'NO'}")
    lines.append(
        f"another gamma_m: {gamma['steps_run']} of {gamma['steps_requested']} steps run, {gamma['run_before_it']} of "
        "them before consolidation of the second task (claim: 0)"
    )
    lines.append(
        f"another classifier: {classifier['steps_run']} of {classifier['steps_requested']} steps run, "
        f"{classifier['run_but_evaluate']} of them not evaluation (claim: 0)"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file of LoDA; default: the bundled one in ten tasks, quick")
    parser.add_argument("--roots", type=int, default=4)
    parser.add_argument("--continuations", type=int, default=8)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="another number than the study's")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    study = load_study(args.study) if args.study else load_study().with_values(QUICK)
    if args.epochs:
        study = study.with_values({"training.epochs": args.epochs})
    with tempfile.TemporaryDirectory() as folder:
        found = measure(study, args.roots, args.continuations, args.depth, Path(folder))
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
