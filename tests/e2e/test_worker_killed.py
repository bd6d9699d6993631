"""A worker of a lane is killed in mid-run: its group starts again, and the results are those of an undisturbed run."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

import loda
from tests.e2e.studies import TASKS, finish, start, write_study
from tests.e2e.test_interrupt import stored

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]
ORDERS = 2


def train_workers(driver: int) -> list[psutil.Process]:
    """Processes of worker groups below a driver."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_worker_costs_one_step_and_changes_no_bit(tmp_path: Path, shapes_parquet: Path) -> None:
    write_study(tmp_path, shapes_parquet, orders={"evaluate": ORDERS}, training={"epochs": 12})
    process = start(tmp_path, "run", "study.yaml", "--json")
    deadline = time.monotonic() + 300
    while "evaluate" not in stored(tmp_path):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (worker,) = train_workers(process.pid)
    worker.kill()
    done = finish(process, timeout=300)
    values = done.values
    assert done.code == 0, done.err
    assert values["stages_requested"] == ORDERS * TASKS  # counted once, though an order was begun twice
    assert len(values["orders"]) == ORDERS
    for name, order in values["orders"].items():
        assert loda.run_sequence(tmp_path / "study.yaml", order).state_digest == values["state_digests"][name]
