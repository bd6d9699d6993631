"""What Ray reads at its start, and the executor without worker groups: orders walked inside a Tune function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

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


def inline_trial(config: Mapping[str, Any]) -> None:
    """A Tune trial that walks its orders itself, in the Tune function's own process.

    Args:
        config: ``payload`` (:meth:`orchestrate.session.Session.payload`), ``lists`` of orders with the ``shard`` to
            walk, and ``settings`` from the searcher.
    """
    from ray import tune

    from orchestrate.worker import run_work

    prepare_environment()
    work = {"settings": dict(config["settings"]), "orders": config["lists"][config.get("shard", 0)]}
    tune.report(run_work({**config["payload"], "work": work}, tune.report))
