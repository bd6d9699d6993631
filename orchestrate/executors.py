"""How a work list is walked: in a Ray Train worker group, inside a Tune function, or in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrate.study import ResourceSettings

# Before Ray starts: a report would otherwise wait for the next of the health checks, 2 s apart.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it says how to go on
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def prepare_environment() -> None:
    """Set what Ray reads at its start, unless the user has."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _train_worker(payload: dict[str, Any]) -> None:
    """The training function of every worker of a group."""
    import ray.train

    from orchestrate.worker import run_work

    context = ray.train.get_context()
    objectives = dict.fromkeys(payload["objectives"])

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report(objectives | metrics)

    final = run_work(payload, report)
    if context.get_world_rank() == 0:
        report(final)
    else:  # every worker must report equally often
        report({"finished": True})


def train_executor(payload: dict[str, Any], resources: ResourceSettings, name: str, storage: str) -> None:
    """Walk the list in a Ray Train worker group, one for all orders; its reports go on to Tune.

    Ours instead of Ray's TuneReportCallback, which can hang: Tune's thread takes the last report from Ray's queue and
    waits to hand it on in a slot that the finished training function has just filled.

    Raises:
        RuntimeError: the group failed more often than ``resources.max_failures`` allows.
    """
    from ray import tune
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Empty, Queue

    class Forward(UserCallback):
        """Runs in Train's controller: what the first worker reports goes into the trial's queue."""

        def __init__(self, reports: Queue) -> None:
            self.reports = reports

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            self.reports.put(metrics[0])

    reports = Queue(actor_options={"num_cpus": 0})
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            callbacks=[Forward(reports)],  # type: ignore[list-item]
        ),
    )
    with ThreadPoolExecutor(max_workers=1) as pool:
        group = pool.submit(trainer.fit)
        over = False
        while not over:
            over = group.done()  # asked before the queue: whatever was reported by then is still taken
            try:
                while True:
                    tune.report(reports.get(timeout=0.2))
            except Empty:
                pass
    reports.shutdown()
    group.result()


def inline_executor(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Walk the list in this very process."""
    from orchestrate.worker import run_work

    objectives = dict.fromkeys(payload["objectives"])
    final = run_work(payload, lambda metrics: report(objectives | metrics))
    report(final)


def tune_trial(config: Mapping[str, Any]) -> None:
    """A Tune trial: one setting, all its orders.

    Args:
        config: ``payload`` for :func:`orchestrate.worker.run_work`, ``resources``; ``settings`` from the searcher, or a
            ``shard`` number that picks one of the payload's prepared lists.
    """
    from ray import tune

    prepare_environment()
    payload = dict(config["payload"])
    lists = payload.pop("lists")
    if "shard" in config:
        payload["work"] = lists[config["shard"]]
    else:
        payload["work"] = {**lists[0], "settings": dict(config["settings"])}
    resources = ResourceSettings(**config["resources"])
    if resources.executor == "inline":
        inline_executor(payload, tune.report)
    else:
        name = f"{config['run']}-{tune.get_context().get_trial_id()}"
        train_executor(payload, resources, name, config["storage"])
