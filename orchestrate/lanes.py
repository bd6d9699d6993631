"""Lanes: Ray Train worker groups that live as long as a study runs, and walk the orders of all its trials.

A worker group is about eight processes that import for seconds. One a trial was most of what a sweep of short stages
cost beside its stages; a lane pays it once.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrate.study import ResourceSettings

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0  # how long a lane may take to end


class _Jobs:
    """A worker's view of the pool, as :func:`orchestrate.worker.serve` wants it."""

    def __init__(self, pool: Any, lane: int) -> None:
        self.pool, self.lane = pool, lane
        self.last: int | None = None

    def _ask(self, method: str, *args: Any) -> Any:
        import ray

        return ray.get(getattr(self.pool, method).remote(*args))

    def take(self) -> dict[str, Any] | None:
        while True:
            job = self._ask("take", self.lane, self.last)
            if job is not False:
                self.last = None if job is None else job["id"]
                return job

    def wanted(self, job: Mapping[str, Any]) -> bool:
        return bool(self._ask("wanted", job["id"]))

    def stage(self, job: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self._ask("stage", job["id"], record)

    def done(self, job: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        self._ask("done", job["id"], job["order"]["name"], outcome)

    def failed(self, job: Mapping[str, Any], reason: str) -> None:
        self._ask("failed", job["id"], reason)


def _lane_worker(config: dict[str, Any]) -> None:
    """The training function of every worker of a lane."""
    import ray
    import ray.train.torch
    import torch

    from loda.distributed import WorkerGroup
    from orchestrate.worker import serve

    group = WorkerGroup.current()
    pool = ray.get_actor(config["pool"])
    if group.rank == 0:
        ray.get(pool.start.remote(config["lane"]))
    group.sum_([torch.zeros(1, device=ray.train.torch.get_device())])  # nobody takes an order before that
    serve(config["payload"], _Jobs(pool, config["lane"]), group)


class Lanes:
    """The driver's hold on a pool and its lanes; a context, inside a Ray cluster that is up.

    Args:
        payload: :meth:`orchestrate.session.Session.payload`.
        resources: of the study; ``concurrent_trials`` lanes of ``workers`` workers each.
        storage: absolute path of a folder for Ray Train's own notes.
    """

    def __init__(self, payload: Mapping[str, Any], resources: ResourceSettings, storage: str) -> None:
        self.payload, self.resources, self.storage = dict(payload), resources, storage
        self.name = f"pool-{uuid.uuid4().hex}"
        self._started = time.time()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Lanes:
        import ray

        from orchestrate.pool import Pool

        concurrency = 16 + 4 * self.resources.concurrent_trials * (self.resources.workers + 1)  # who may wait at once
        self.pool: Any = (
            ray.remote(Pool)
            .options(name=self.name, num_cpus=0, max_concurrency=concurrency)
            .remote(self.resources.max_failures, self.resources.concurrent_trials)
        )
        for lane in range(self.resources.concurrent_trials):
            self._threads.append(threading.Thread(target=self._keep, args=(lane,), name=f"lane-{lane}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self.pool.close.remote()
        for thread in self._threads:  # Ray must not be shut down under them
            thread.join(CLOSE_SECONDS)

    def cancel(self, trial: str) -> None:
        """Nobody wants the rest of a trial."""
        self.pool.cancel.remote(trial)

    def startup_seconds(self) -> float:
        """From asking for the lanes to their first question for work, summed over lanes."""
        import ray

        joined = ray.get(self.pool.joined.remote())
        return sum(max(0.0, moment - self._started) for moment in joined.values())

    def busy_seconds(self) -> float:
        """What lanes spent on orders, computing or not, summed over lanes."""
        import ray

        return float(ray.get(self.pool.busy_seconds.remote()))

    def _keep(self, lane: int) -> None:
        """Keep a lane's worker group running; one that dies again and again without finishing an order is given up."""
        import ray

        start, finished = 0, 0
        while not self._closing:
            try:
                self._group(lane, start).fit()
                return  # it was told that there is no more work
            except Exception as error:
                if self._closing:
                    return
                try:
                    now = ray.get(self.pool.lane_finished.remote(lane))
                    if now == finished:
                        logger.warning("lane %d is given up: %s", lane, error)
                        reason = f"worker group {lane} died again and again: {str(error).strip().splitlines()[-1]}"
                        ray.get(self.pool.lane_closed.remote(lane, reason))
                        return
                except Exception:  # the cluster went down, and with it everything that could be told
                    return
                start, finished = start + 1, now

    def _group(self, lane: int, start: int) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        resources = self.resources
        per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            per_worker["GPU"] = resources.gpus_per_worker
        return TorchTrainer(
            _lane_worker,
            train_loop_config={"pool": self.name, "lane": lane, "payload": self.payload},
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=per_worker,
            ),
            run_config=RunConfig(
                name=f"lane-{lane}-{start}",
                storage_path=self.storage,
                # One more than an order is tried: the pool then fails that order's trial, and the lane goes on.
                failure_config=FailureConfig(max_failures=resources.max_failures + 1),
            ),
        )
