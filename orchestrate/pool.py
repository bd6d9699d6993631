"""The orders that wait for a lane, and the lanes that work on them. Plain Python: Ray makes an actor of it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Job = dict[str, Any]
POLL_SECONDS = 30.0  # how long a question waits for an answer before it is asked again


@dataclass
class _Trial:
    """One setting: its orders that wait, and what its Tune trial hasn't been told yet."""

    settings: dict[str, Any]
    waiting: list[dict[str, Any]]
    running: set[int] = field(default_factory=set)  # job ids
    news: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False


@dataclass
class _Lane:
    """One worker group: what it works on, and when it first asked for work."""

    job: Job | None = None
    trial: str | None = None
    attempts: int = 0
    finished: int = 0
    joined: float | None = None
    since: float | None = None  # when it began what it works on
    busy_seconds: float = 0.0
    closed: bool = False


class Pool:
    """Hands single orders to lanes and their results back to the trials that asked for them.

    A lane keeps to the trial that it has begun: its artifacts are in memory there. Without work of its own it takes
    up a trial that no lane works on, then helps another: so no lane stands idle while an order waits.

    Args:
        max_failures: how often the workers of a lane may die over one order before its trial fails.
        lanes: how many there are, or will be once they have started.
    """

    def __init__(self, max_failures: int, lanes: int) -> None:
        self.max_failures = max_failures
        self.trials: dict[str, _Trial] = {}
        self.lanes = {number: _Lane() for number in range(lanes)}
        self.closed = False
        self._ids = 0
        self._changed: asyncio.Condition = asyncio.Condition()

    # --- the trials' side

    async def submit(self, trial: str, settings: Mapping[str, Any], orders: Sequence[Mapping[str, Any]]) -> None:
        """A trial asks for its orders; one that asks again (Tune started it again) begins anew."""
        await self.cancel(trial)
        async with self._changed:
            self.trials[trial] = _Trial(dict(settings), [dict(order) for order in orders])
            if all(lane.closed for lane in self.lanes.values()):
                self._fail(trial, "no worker group is left: all of them died again and again")
            self._changed.notify_all()

    async def collect(self, trial: str, seconds: float) -> list[dict[str, Any]]:
        """What has happened to a trial since it last asked; waits up to so many seconds for something to happen.

        Each item has ``kind``: ``stage`` (with ``record``), ``order`` (``order``, ``outcome``) or ``failed``
        (``reason``).
        """
        async with self._changed:
            mine = self.trials[trial]
            await self._until(lambda: bool(mine.news), seconds)
            news, mine.news = mine.news, []
            return news

    async def cancel(self, trial: str) -> None:
        """Nobody wants the rest of a trial; lanes hear of it between steps."""
        async with self._changed:
            if trial in self.trials:
                self.trials[trial].over = True
                self.trials[trial].waiting.clear()

    async def close(self) -> None:
        """No more work: lanes end between two steps or epochs."""
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def joined(self) -> dict[int, float]:
        """When each lane first asked for work (Unix seconds)."""
        return {number: lane.joined for number, lane in self.lanes.items() if lane.joined is not None}

    async def busy_seconds(self) -> float:
        """Seconds from taking an order to asking for the next one, summed over orders and lanes."""
        return sum(lane.busy_seconds for lane in self.lanes.values())

    # --- the lanes' side

    async def start(self, number: int) -> None:
        """A lane's workers have started: called once by the first of them, before any of them takes an order."""
        async with self._changed:
            lane = self.lanes[number]
            lane.joined = lane.joined or time.time()
            if lane.job is not None:
                self._started_again(lane)

    async def take(self, number: int, last: int | None) -> Job | bool | None:
        """The lane's next order: False where there is none yet (ask again), None where there will be none.

        All workers of a lane get the same orders in the same sequence: who asks after ``last`` gets the one after it,
        whether it is handed out just now or has been handed to another worker of the lane before.

        Args:
            number: the lane.
            last: id of the worker's order before; None for a worker that has just started.
        """
        async with self._changed:
            lane = self.lanes[number]
            if lane.job is not None and lane.job["id"] != last:
                return lane.job
            if lane.since is not None:
                lane.busy_seconds += time.monotonic() - lane.since
                lane.since = None
            if not await self._until(lambda: self.closed or lane.closed or self._next(lane) is not None, POLL_SECONDS):
                return False
            if lane.job is not None and lane.job["id"] != last:  # another worker of the lane was faster
                return lane.job
            found = self._next(lane)
            if self.closed or lane.closed or found is None:
                return None if self.closed or lane.closed else False
            return self._assign(lane, *found)

    async def wanted(self, job: int) -> bool:
        """Whether anybody still waits for an order."""
        return not self.closed and any(job in trial.running and not trial.over for trial in self.trials.values())

    async def stage(self, job: int, record: Mapping[str, Any]) -> None:
        """A lane has finished a stage."""
        await self._tell(job, {"kind": "stage", "record": dict(record)})

    async def done(self, job: int, order: str, outcome: Mapping[str, Any]) -> None:
        """A lane has finished an order."""
        await self._tell(job, {"kind": "order", "order": order, "outcome": dict(outcome)}, ends=True)

    async def failed(self, job: int, reason: str) -> None:
        """An order can't be finished; its trial has failed, whatever its other orders give."""
        async with self._changed:
            for name, trial in self.trials.items():
                if job in trial.running:
                    self._fail(name, reason)
            self._changed.notify_all()

    async def lane_finished(self, number: int) -> int:
        """How many orders a lane has finished."""
        return self.lanes[number].finished

    async def lane_closed(self, number: int, reason: str) -> None:
        """A lane is gone for good; without any, all trials fail."""
        async with self._changed:
            lane = self.lanes[number]
            lane.closed = True
            if lane.job is not None and lane.trial is not None and lane.job["id"] in self.trials[lane.trial].running:
                trial = self.trials[lane.trial]
                trial.running.discard(lane.job["id"])
                trial.waiting.insert(0, lane.job["order"])
            if all(other.closed for other in self.lanes.values()) and not self.closed:
                for name in self.trials:
                    self._fail(name, reason)
            self._changed.notify_all()

    # --- inside

    async def _until(self, happened: Any, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait_for(happened)
        except TimeoutError:
            return False
        return True

    def _next(self, lane: _Lane) -> tuple[str, dict[str, Any]] | None:
        """The order that a lane should do next, and its trial."""
        waiting = {name: trial for name, trial in self.trials.items() if trial.waiting and not trial.over}
        if lane.trial in waiting:
            return lane.trial, waiting[lane.trial].waiting[0]
        for name, trial in waiting.items():
            if not trial.running:
                return name, trial.waiting[0]
        for name, trial in waiting.items():
            # Helping: the order least like those under way, which would have to wait for the stages that they share.
            others = [other.job["order"]["order"] for other in self.lanes.values() if other.trial == name and other.job]
            return name, min(trial.waiting, key=lambda order: _likeness(order["order"], others))
        return None

    def _assign(self, lane: _Lane, name: str, order: dict[str, Any]) -> Job:
        trial = self.trials[name]
        trial.waiting.remove(order)
        self._ids += 1
        trial.running.add(self._ids)
        lane.job = {"id": self._ids, "settings": trial.settings, "order": order}
        lane.trial, lane.attempts, lane.since = name, 1, time.monotonic()
        return lane.job

    def _started_again(self, lane: _Lane) -> None:
        """The lane's workers died over their order and are back: they get it again, but not for ever."""
        assert lane.job is not None
        lane.attempts += 1
        unfinished = any(lane.job["id"] in trial.running for trial in self.trials.values())
        if unfinished and lane.attempts > self.max_failures + 1 and lane.trial is not None:
            times = "once" if self.max_failures == 0 else f"{self.max_failures + 1} times"
            self._fail(lane.trial, f"workers died {times} while they computed {lane.job['order']['name']}")
            self._changed.notify_all()
            unfinished = False
        if not unfinished:
            lane.job = None

    def _fail(self, name: str, reason: str) -> None:
        trial = self.trials[name]
        if not trial.over:
            trial.over = True
            trial.waiting.clear()
            trial.news.append({"kind": "failed", "reason": reason})

    async def _tell(self, job: int, item: dict[str, Any], ends: bool = False) -> None:
        async with self._changed:
            for trial in self.trials.values():
                if job in trial.running:
                    trial.news.append(item)
                    if ends:
                        trial.running.discard(job)
            for lane in self.lanes.values():
                lane.finished += bool(ends and lane.job is not None and lane.job["id"] == job)
            self._changed.notify_all()


def _likeness(order: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """How many tasks an order begins with in common with the most alike of others."""
    beginnings = (itertools.takewhile(lambda pair: pair[0] == pair[1], zip(order, other)) for other in others)
    return max((len(list(beginning)) for beginning in beginnings), default=0)
