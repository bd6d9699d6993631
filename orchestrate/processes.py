"""Which process, on which host: enough to tell that the holder of something is dead. And a server in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import psutil


@cache
def host_identity() -> str:
    """A name for the set of processes whose ids can be looked up from here: host name, boot and process namespace.

    Containers on one host may share its name but not its process ids, so the name alone isn't enough.
    """
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:  # not Linux, or /proc is closed: what there is has to do
        pass
    return "/".join(parts)


def process_start(pid: int) -> str | None:
    """When a process started, in a form only good for comparing; "dead" for a corpse, None when it can't be seen.

    On Linux in clock ticks since boot, which setting the clock doesn't change; elsewhere psutil's creation time.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces and brackets
        return "dead" if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    try:
        process = psutil.Process(pid)
        return "dead" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def own_process() -> dict[str, Any]:
    """Host identity, process id and process start of the caller."""
    pid = os.getpid()
    return {"host": host_identity(), "pid": pid, "pid_start": process_start(pid)}


def is_dead(process: Mapping[str, Any]) -> bool:
    """Whether what ``own_process()`` said of a process names one of this host that is gone.

    Always False for processes of other hosts: nothing is known about those.
    """
    pid = process.get("pid")
    if process.get("host") != host_identity() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    if not psutil.pid_exists(pid):
        return True
    start = process_start(pid)
    return start is not None and start != process.get("pid_start")


def serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server until it ends, or until Ctrl-C or SIGTERM; it and its own workers end with this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(ProcessLookupError):  # gone already
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
