"""Does racing choose as well as a full search, with at most half of the stages?

    python benchmarks/racing.py                        # 40 seeds over the recorded table; no training
    python benchmarks/racing.py --test wilcoxon --json

Replays a search over a recorded table of settings x orders (``benchmarks/racing_table.py`` records it): for each seed,
settings arrive in another sequence and another part of the orders serves as tuning orders. The full search gives every
setting all of them; the race is the scheduler that sweeps use, fed with the reports that trials make. Both choose the
best objective among the settings that finished. Regret is how far the choice lies below the best setting of the table,
in points of the objective over **all** recorded orders. Claim: stages at most 50 % of the full search, and no more
regret. ``ratio`` is stages of the race / stages of the full search.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from ray.tune.schedulers import TrialScheduler
from ray.tune.utils import flatten_dict
from scipy import stats

from orchestrate.objective import across_orders
from orchestrate.racing import RaceScheduler
from orchestrate.reports import TrialLedger
from orchestrate.study import ObjectiveSettings, RacingSettings

TABLE = Path(__file__).resolve().parent / "results" / "racing_table.json"
Curves = list[list[float] | None]  # by order: accuracy (%) after each task; None: training diverged


@dataclass
class Replay:
    """What a search came to: its choice, how many stages it computed, and how many settings it stopped."""

    chosen: int
    stages: int
    stopped: int


def outcome(curve: Sequence[float]) -> dict[str, Any]:
    """An order's outcome, as a walk gives it, from its curve."""
    summary = {"a_last": curve[-1], "a_last_macro": None, "a_avg": float(np.mean(curve)), "forgetting": None}
    return {"order": [], "summary": summary, "state_digest": "", "seconds": 0.0}


def run_setting(
    number: int, curves: Curves, objective: ObjectiveSettings, scheduler: RaceScheduler | None
) -> tuple[float | None, int, bool]:
    """One setting over its orders, stage after stage: (objective or None, stages computed, whether it was stopped)."""
    names = [f"order-{index}" for index in range(len(curves))]
    ledger = TrialLedger(objective.model_dump(mode="json"), names)
    trial: Any = SimpleNamespace(trial_id=str(number))
    stages = 0
    if scheduler is not None:
        scheduler.on_trial_add(None, trial)

    def stops(report: dict[str, Any]) -> bool:
        return scheduler is not None and scheduler.on_trial_result(None, trial, flatten_dict(report)) == STOP

    for name, curve in zip(names, curves, strict=True):
        if curve is None:
            if scheduler is not None:
                scheduler.on_trial_error(None, trial)
            return None, stages + 1, False
        for position, value in enumerate(curve):
            stages += 1
            event = {"order": name, "position": position, "accuracy": {"a_last": value, "a_last_macro": value}}
            if stops(ledger.progress([event])):
                return None, stages, True
        ledger.add(name, outcome(curve))
        if not ledger.complete and stops(ledger.progress([])):
            return None, stages, True
    final = ledger.final()
    stops(final)
    return float(final["objective"]), stages, False


STOP = TrialScheduler.STOP


def search(
    table: list[Curves], arrival: Sequence[int], objective: ObjectiveSettings, racing: RacingSettings | None
) -> Replay:
    """A whole search over settings in the sequence given; without ``racing``, every setting gets all orders."""
    tasks = max(len(curve) for curves in table for curve in curves if curve)
    scheduler = None if racing is None else RaceScheduler(racing, objective, tasks, lambda trial: f"setting {trial}")
    values: dict[int, float] = {}
    stages = stopped = 0
    for number in arrival:
        value, cost, beaten = run_setting(number, table[number], objective, scheduler)
        stages, stopped = stages + cost, stopped + beaten
        if value is not None:
            values[number] = value
    return Replay(max(values, key=lambda number: values[number]), stages, stopped)


def measure(document: dict[str, Any], args: argparse.Namespace, racing: RacingSettings) -> dict[str, Any]:
    """Both searches for each seed, and how they compare."""
    objective = ObjectiveSettings()
    table: list[Curves] = [[row and row["validation"] for row in one["orders"]] for one in document["rows"]]
    # The table's own verdict: the objective over all orders; a setting that diverged on any can't be chosen by it.
    true = [
        None if any(curve is None for curve in curves) else across_orders([np.mean(c) for c in curves], objective)
        for curves in table
    ]
    best = max(value for value in true if value is not None)
    rows = []
    for seed in range(args.seeds):
        draws = np.random.default_rng(seed)
        arrival = draws.permutation(len(table)).tolist()[: args.settings]
        tune = draws.permutation(len(document["orders"])).tolist()[: args.tune]
        part = [[curves[order] for order in tune] for curves in table]
        full, race = search(part, arrival, objective, None), search(part, arrival, objective, racing)
        among = max(value for number in arrival if (value := true[number]) is not None)
        rows.append(
            {
                "seed": seed,
                "full_regret": None if true[full.chosen] is None else among - true[full.chosen],
                "race_regret": None if true[race.chosen] is None else among - true[race.chosen],
                "full_stages": full.stages,
                "race_stages": race.stages,
                "stopped": race.stopped,
                "same_choice": full.chosen == race.chosen,
            }
        )
    fit = [row for row in rows if row["full_regret"] is not None and row["race_regret"] is not None]
    difference = np.array([row["race_regret"] - row["full_regret"] for row in fit])
    half = 0.0 if np.ptp(difference) == 0 else stats.t.ppf(0.975, len(fit) - 1) * stats.sem(difference)
    return {
        "ratio": sum(row["race_stages"] for row in rows) / sum(row["full_stages"] for row in rows),
        "full_regret": float(np.mean([row["full_regret"] for row in fit])),
        "race_regret": float(np.mean([row["race_regret"] for row in fit])),
        "regret_difference": float(difference.mean()),
        "regret_difference_95": [float(difference.mean() - half), float(difference.mean() + half)],
        "same_choice": float(np.mean([row["same_choice"] for row in rows])),
        "stopped": float(np.mean([row["stopped"] for row in rows])),
        "settings": min(args.settings, len(table)),
        "tune_orders": args.tune,
        "seeds": args.seeds,
        "best_of_table": best,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--settings", type=int, default=24, help="settings that arrive in one search")
    parser.add_argument("--tune", type=int, default=6, help="tuning orders of one search")
    parser.add_argument("--test", choices=["t", "wilcoxon"], default="t")
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    document = json.loads(args.table.read_bytes())
    rules = {
        "orders": {"orders": True},
        "tasks": {"tasks": True},
        "orders and tasks": {"orders": True, "tasks": True},
    }
    measured = {
        name: measure(document, args, RacingSettings(**switches, test=args.test, confidence=args.confidence))
        for name, switches in rules.items()
    }
    if args.json:
        print(json.dumps({"ratio": measured["orders and tasks"]["ratio"], "rules": measured}))
        return
    sizes = " x ".join(f"{len(document[key])} {what}" for key, what in
                       (("rows", "settings"), ("orders", "orders"), ("tasks", "tasks")))  # fmt: skip
    print(f"{sizes}; a search has {args.settings} settings and {args.tune} tuning orders; {args.seeds} seeds")
    print(f"test: {args.test}, confidence {args.confidence:g}")
    print(f"{'rule':18}{'stages':>9}{'stopped':>9}{'regret':>9}{'full search':>13}{'difference, 95% t':>24}{'same':>7}")
    for name, found in measured.items():
        low, high = found["regret_difference_95"]
        print(
            f"{name:18}{found['ratio']:9.1%}{found['stopped']:9.1f}{found['race_regret']:9.3f}{found['full_regret']:13.3f}"
            f"{found['regret_difference']:+9.3f} [{low:+.3f}, {high:+.3f}]{found['same_choice']:7.0%}"
        )


if __name__ == "__main__":
    main()
