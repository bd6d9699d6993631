"""What a Tune trial does where lanes do the work. Light: its process imports no torch, it only asks and tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from loda.errors import StageError
from orchestrate.reports import TrialLedger


def lane_trial(config: Mapping[str, Any]) -> None:
    """A Tune trial: asks the pool for its orders and passes on what it hears.

    Args:
        config: ``pool`` (the actor's name), ``orders``, ``objective``, and ``settings`` from the searcher.

    Raises:
        StageError: an order failed.
    """
    pool = ray.get_actor(config["pool"])
    trial = tune.get_context().get_trial_id()
    ledger = TrialLedger(config["objective"], [order["name"] for order in config["orders"]])
    ray.get(pool.submit.remote(trial, config["settings"], config["orders"]))
    records: list[dict[str, Any]] = []
    while not ledger.complete:
        news = ray.get(pool.collect.remote(trial, 5.0))
        for item in news:
            if item["kind"] == "failed":
                raise StageError(item["reason"])
            if item["kind"] == "stage":
                records.append(item["record"])
            else:
                ledger.add(item["order"], item["outcome"])
        # All orders through is the end, not progress: a scheduler must not stop what has nothing left to do.
        if news and not ledger.complete:
            tune.report(ledger.progress(records))
            records = []
    tune.report(ledger.final(records))
