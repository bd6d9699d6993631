"""Ctrl-C and a killed process: what was finished is kept, and going on ends with the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import loda
from tests.e2e.studies import TASKS, Done, finish, orchestrate, start, write_study

pytestmark = pytest.mark.chaos
ORDERS = 4
RUN = ("run", "study.yaml", "--local")


def stored(folder: Path) -> list[str]:
    """Names of the finished steps in the store; what is still being written has a longer name than a key."""
    entries = [file for file in (folder / "stages").glob("??/*/manifest.json") if len(file.parent.name) == 64]
    return [json.loads(file.read_bytes())["step"] for file in entries]


def stopped_on_the_way(folder: Path, number: signal.Signals) -> Done:
    """Start a run and send it a signal once its first stage is in the store."""
    process: subprocess.Popen[str] = start(folder, *RUN)
    deadline = time.monotonic() + 300
    while "evaluate" not in stored(folder):  # the last step of a stage
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    done = finish(process, timeout=120)
    assert not (folder / "runs" / "tiny" / "summary.json").exists()
    return done


def assert_goes_on(folder: Path) -> None:
    """The same command finishes, reuses what was there, and gives the bits of an undisturbed run."""
    kept = len(stored(folder))
    values: dict[str, Any] = orchestrate(folder, *RUN, "--json").values
    distinct = {tuple(order[: i + 1]) for order in values["orders"].values() for i in range(TASKS)}
    assert len(values["orders"]) == ORDERS
    assert values["stages_requested"] == ORDERS * TASKS
    assert 0 < values["stages_run"] < len(distinct)
    assert values["stages_reused"] > ORDERS * TASKS - len(distinct)
    assert values["steps_run"] == 4 * len(distinct) - kept
    for name, order in values["orders"].items():
        assert loda.run_sequence(folder / "study.yaml", order).state_digest == values["state_digests"][name]


@pytest.fixture
def folder(tmp_path: Path, shapes_parquet: Path) -> Path:
    # Enough epochs that the signal comes long before the last of the stages.
    write_study(tmp_path, shapes_parquet, orders={"evaluate": ORDERS}, training={"epochs": 4})
    return tmp_path


def test_ctrl_c_says_how_to_go_on_and_going_on_reuses_what_was_done(folder: Path) -> None:
    done = stopped_on_the_way(folder, signal.SIGINT)
    assert done.code == 130
    assert "Finished stages are kept; go on with: orchestrate run study.yaml --local" in done.err
    assert "Traceback" not in done.err
    assert_goes_on(folder)


def test_a_killed_run_is_taken_up_again(folder: Path) -> None:
    done = stopped_on_the_way(folder, signal.SIGKILL)
    assert done.code == -signal.SIGKILL
    assert_goes_on(folder)
