"""How much room a study's stream leaves: the frozen floors (class means, shared-covariance LDA) and the joint ceiling.

    python benchmarks/room.py                       # the bundled study
    python benchmarks/room.py my-study.yaml --rank 32 --lr 0.1

All numbers are test accuracy in % over all classes, with no task id. ``joint`` trains LoRA on all classes at once
under the study's own head, loss, targets, augmentation and epochs; its rank and learning rate are given here, because
LoRA without orthonormal projections wants other values than LoDA. A stream can show what adaptation buys only where
joint is well above both floors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loda.run import run_sequence
from loda.settings import RunSettings
from orchestrate.study import load_study


def with_method(
    settings: RunSettings, method: dict[str, Any], lr: float | None = None, epochs: int | None = None
) -> RunSettings:
    """The same study under another method."""
    values = settings.model_dump() | {"method": method}
    values["training"] |= {"lr": lr} if lr else {}
    values["training"] |= {"epochs": epochs} if epochs else {}
    return RunSettings(**values)


def measure(settings: RunSettings, rank: int, lr: float | None, epochs: int | None) -> dict[str, dict[str, float]]:
    """Test accuracy (%) and stage seconds of the floors and of joint LoRA."""
    rows = {
        "frozen, class means": with_method(settings, {"name": "simplecil", "classifier": "class_means"}),
        "frozen, LDA": with_method(settings, {"name": "simplecil", "classifier": "lda"}),
        f"joint LoRA, rank {rank}": with_method(settings, {"name": "joint", "rank": rank}, lr, epochs),
    }
    measured = {}
    for name, row in rows.items():
        result = run_sequence(row)
        measured[name] = {"accuracy": result.summary.a_last, "seconds": result.seconds}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument("--rank", type=int, default=32, help="of joint LoRA")
    parser.add_argument("--lr", type=float, default=0.1, help="of joint LoRA; 0: the study's")
    parser.add_argument("--epochs", type=int, help="of joint LoRA; default: the study's")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    settings = load_study(args.study).run_settings()
    measured = measure(settings, args.rank, args.lr or None, args.epochs)
    (means, lda, joint) = (row["accuracy"] for row in measured.values())
    room = joint - max(means, lda)
    if args.json:
        print(json.dumps({"rows": measured, "room_points": room}))
        return
    for name, row in measured.items():
        print(f"{name:24} {row['accuracy']:6.2f} %  {row['seconds']:7.1f} s")
    print(f"room above the higher floor: {room:.1f} points ({'enough' if room >= 8 else 'too little'}; 8 wanted)")


if __name__ == "__main__":
    main()
