"""Leases: of all processes that want one stage, one computes it and the others wait.

A lease is a file ``<root>/leases/<key>.json`` that its holder keeps changing (a counter, the heartbeat). A waiter takes
it over when the holder is a dead process of the same host, or when the counter has stood still for too long by the
waiter's own monotonic clock: no two clocks are ever compared. Two holders at once, possible where a filesystem's
guarantees are weak, cost a stage computed twice and nothing else, because a stage's bits depend on its key alone.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
import uuid
import weakref
from typing import Any

from loda.reading import parse_json
from orchestrate.lease_files import FIRST_BEAT, LeaseFiles
from orchestrate.processes import is_dead, own_process

logger = logging.getLogger(__name__)

_LONGEST_GLANCE_SECONDS = 1.0


class Lease:
    """The right, and the duty, to compute one stage. Leave it with ``release()`` or as a context manager."""

    def __init__(self, board: LeaseBoard, key: str, token: str, slot: Any) -> None:
        self.key = key
        self.token = token
        self.slot = slot  # what the files below need to find it again
        self.lost = False  # whether somebody took it over: this process stood still for longer than the lease lives
        self._board = board

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        self._board.release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class Watch:
    """How long a waiter has seen one lease stand still."""

    def __init__(self) -> None:
        self.still_seconds = 0.0
        self._content: bytes | None = None
        self._looked_at = 0.0

    def look(self, content: bytes, now_seconds: float) -> float:
        """Seconds without a change up to now (monotonic clock).

        Between two looks at most one second counts: a waiter that was itself suspended learnt nothing about the holder,
        which may have been suspended with it.
        """
        if content != self._content:
            self._content, self.still_seconds = content, 0.0
        else:
            self.still_seconds += min(now_seconds - self._looked_at, _LONGEST_GLANCE_SECONDS)
        self._looked_at = now_seconds
        return self.still_seconds


class LeaseBoard:
    """All leases that this process holds on one store, kept alive by one thread."""

    def __init__(self, files: LeaseFiles, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._files = files
        self._held: dict[str, Lease] = {}  # by token
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        _boards.add(self)

    def try_acquire(self, key: str, owner: str) -> Lease | None:
        """The lease, or None when somebody holds it."""
        token = uuid.uuid4().hex
        document = {"beat": FIRST_BEAT, "key": key, "owner": owner, "token": token, **own_process()}
        slot = self._files.create(key, json.dumps(document).encode())
        if slot is None:
            return None
        lease = Lease(self, key, token, slot)
        with self._lock:
            self._held[token] = lease
            if self._thread is None:
                self._wake.clear()
                self._thread = threading.Thread(target=self._keep_alive, name="lease-heartbeat", daemon=True)
                self._thread.start()
        return lease

    def holder(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """The lease file's content and what it says; None when nobody holds the lease."""
        content = self._files.read(key)
        if content is None:
            return None
        try:
            document = parse_json(content)
        except ValueError:  # being written right now, or its writer died over it: silence will tell
            document = {}
        return content, document if isinstance(document, dict) else {}

    def evict_if_dead(self, key: str, watch: Watch) -> dict[str, Any] | None:
        """Look at the lease once; clear it away if its holder is dead or silent for too long. Says who holds it."""
        found = self.holder(key)
        if found is None:
            return None
        content, holder = found
        still_seconds = watch.look(content, time.monotonic())
        dead = is_dead(holder)
        if not dead and still_seconds < self.timeout_seconds:
            return holder
        reason = f"process {holder.get('pid')} is gone" if dead else f"no heartbeat for {still_seconds:.0f} s"
        logger.warning("taking over the lease on stage %s from %s: %s", key, holder.get("owner", "unknown"), reason)
        self._files.evict(key, holder.get("token"))
        return None

    def release(self, lease: Lease) -> None:
        """Give one lease back."""
        with self._lock:
            if self._held.pop(lease.token, None) is not None:
                self._files.remove(lease.key, lease.token, lease.slot)
            if not self._held:
                self._wake.set()

    def release_all(self) -> None:
        """Give all leases back."""
        for lease in list(self._held.values()):
            lease.release()

    def forget_all(self) -> None:
        """Start anew in a forked child: the leases are the parent's, and so is the thread that keeps them alive."""
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._held, self._thread = {}, None

    def _keep_alive(self) -> None:
        beats = 0
        interval_seconds = self.timeout_seconds / 8
        while True:
            self._wake.wait(interval_seconds)
            with self._lock:
                if self._thread is not threading.current_thread():
                    return
                if not self._held:
                    self._thread = None
                    return
                self._wake.clear()
                beats += 1
                for lease in list(self._held.values()):
                    self._beat(lease, beats)

    def _beat(self, lease: Lease, number: int) -> None:
        try:
            alive = self._files.beat(lease.key, lease.token, lease.slot, number)
        except OSError as error:  # a full disk or a network hiccup: the next beat may come through
            logger.warning("no heartbeat for the lease on stage %s: %s", lease.key, error)
            return
        if not alive and not lease.lost:
            lease.lost = True
            logger.warning("the lease on stage %s was taken over; the stage may be computed twice", lease.key)


_boards: weakref.WeakSet[LeaseBoard] = weakref.WeakSet()


@atexit.register
def _release_all() -> None:
    for board in list(_boards):
        board.release_all()


def _forget_all() -> None:
    for board in list(_boards):
        board.forget_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
