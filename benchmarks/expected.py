"""Does a run take as long as `orchestrate plan --measure` says beforehand?

    python benchmarks/expected.py                                    # the bundled study
    python benchmarks/expected.py benchmarks/studies/cifar100-mini.yaml --orders 1      # from a folder with its data

Plans the study's evaluation orders in a new folder, with nothing stored, then runs them in one process
(``orchestrate run --local``) and compares. The figure is of the stages' computing: what starting and reporting take on
top is printed beside it. ``ratio`` is taken / expected.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrate.plan import make_plan
from orchestrate.study import load_study
from orchestrate.sweep import run_study


def measure(study_name: str | None, orders: int | None, folder: Path) -> dict[str, Any]:
    changes = {
        "resources.store": str(folder / "stages"),
        "resources.runs": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",
        "tracking.register_model": False,
    }
    if orders is not None:
        changes["orders.evaluate"] = orders
    study = load_study(study_name).with_values(changes)
    started = time.perf_counter()
    plan = make_plan(study, measure=True)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    outcome = run_study(study, local=True)
    return {
        "ratio": outcome.values["stage_seconds"] / plan["expected_run_seconds"],
        "expected_seconds": plan["expected_run_seconds"],
        "stage_seconds": outcome.values["stage_seconds"],
        "run_seconds": time.perf_counter() - started,
        "plan_seconds": planned,
        "stages": outcome.values["stages_run"],
        "study": study.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument("--orders", type=int, help="evaluation orders; default: as the study says")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measured = measure(args.study, args.orders, Path(name))
    if args.json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
