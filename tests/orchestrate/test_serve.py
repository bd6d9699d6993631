"""A server in the foreground ends with the command that started it, workers and all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SERVER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
COMMAND = (
    f"import sys; from orchestrate.processes import serve; sys.exit(serve([sys.executable, '-c', {SERVER!r}], {{}}))"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_and_its_workers_end_with_the_command(number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", COMMAND], env=environment)
    below: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(below) < 2:  # the server, and a worker of its own
        assert time.monotonic() < deadline
        time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=30) == 0
    _, alive = psutil.wait_procs(below, timeout=30)
    assert alive == []


def test_the_exit_code_is_the_servers_own() -> None:
    from orchestrate.processes import serve

    assert serve([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3
