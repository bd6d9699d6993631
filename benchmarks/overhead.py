"""What share of a sweep's wall time isn't stage computation.

    python benchmarks/overhead.py                    # the default sweep, in a folder of its own
    python benchmarks/overhead.py study.yaml -s resources.executor=inline

Runs ``orchestrate sweep`` as a user would and compares its wall time with the stage seconds that its workers measured,
spread over the lanes (worker groups) that ran at once. The rest of the wall time, all of it counted in
``overhead_share``, is: start-up (the driver's own until the cluster is up, then the lanes' until they first ask for
work), lanes that wait for work (at the ends of search and evaluation), the end (tables, report, model, MLflow), and
what a stage costs beside its computing (store, leases, reports): the lanes' time on orders less the stages' computing,
by stage. Targets for the default sweep on two cores: overhead under 25% of the wall time, start-up included, and under
0.15 s a stage beyond start-up; the line "all beyond start-up" counts waiting and the end as the stages', too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(arguments: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Run the sweep in ``folder``; seconds and shares, and the table that it ended with."""
    orchestrate = [sys.executable, "-m", "orchestrate.cli"]
    started = time.perf_counter()
    done = subprocess.run(
        [*orchestrate, "sweep", *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    wall = time.perf_counter() - started
    values = json.loads(next(folder.glob("runs/*/summary.json")).read_bytes())
    lanes = values["concurrent_trials"]
    computing = values["stage_seconds"] / lanes
    overhead = wall - computing
    startup = values["startup_seconds"]["driver"] + values["startup_seconds"]["workers"] / lanes
    busy = values.get("lane_busy_seconds")
    requested = max(1, values["stages_requested"])
    measured = {
        "wall_seconds": wall,
        "stage_seconds": values["stage_seconds"],
        "concurrent_trials": lanes,
        "stages_run": values["stages_run"],
        "overhead_share": overhead / wall,
        "startup_seconds": startup,
        "all_beyond_startup_per_stage_seconds": (overhead - startup) * lanes / requested,
        "overhead_per_stage_seconds": None if busy is None else (busy - values["stage_seconds"]) / requested,
        "ratio": overhead / wall,
    }
    return measured, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary folder")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        measured, table = measure(rest, args.folder or Path(temporary))
    if args.json:
        print(json.dumps(measured))
        return
    print(table)
    for name, value in measured.items():
        print(f"{name:38}" + (" unknown" if value is None else f"{value:10.3f}"))


if __name__ == "__main__":
    main()
