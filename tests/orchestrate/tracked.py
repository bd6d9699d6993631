"""A study to be tracked: really learned orders, how they are logged, and what must then be in MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from loda.graph import sequence_nodes
from loda.run import SequenceResult, run_nodes, summarise
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import Workbench, open_workbench
from orchestrate.measurements import epoch_losses, stage_metrics
from orchestrate.tracking import TrackedRun, Tracker

ORDERS = {"tune-0": (0, 1, 2), "tune-1": (2, 0, 1)}
PARAMS: dict[str, Any] = {
    "method": {"name": "loda", "rank_general": 4},
    "orders": {"tune": 2},
    "backbone": {"target": ["attn.qkv"]},
}


@dataclass(frozen=True)
class Learned:
    """Two really learned orders, with all that is logged of them."""

    bench: Workbench
    results: dict[str, SequenceResult]
    stages: dict[str, list[dict[str, Artifact]]]

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.bench.tasks]


def learn_two_orders(settings: RunSettings) -> Learned:
    bench = open_workbench(settings)
    artifacts: dict[str, Artifact] = {}
    results: dict[str, SequenceResult] = {}
    stages: dict[str, list[dict[str, Artifact]]] = {}
    for name, order in ORDERS.items():
        nodes = sequence_nodes(bench, settings, order, "validation")
        run_nodes(bench, nodes, artifacts)
        results[name] = summarise(order, nodes, artifacts)
        stages[name] = [
            {str(node.step): artifacts[node.key] for node in nodes if node.position == i} for i in range(len(order))
        ]
    return Learned(bench, results, stages)


def log_order(tracker: Tracker, trial: TrackedRun, learned: Learned, name: str, stages: int | None = None) -> None:
    result = learned.results[name]
    run = tracker.order_run(trial, name, result.order)
    for position, steps in enumerate(learned.stages[name][:stages]):
        metrics = stage_metrics(steps, result.evaluations[: position + 1], result.order, learned.names)
        tracker.log_stage(run, position + 1, metrics, epoch_losses(steps))
    if stages is None:
        tracker.log_matrix(run, result.accuracy_matrix, result.order, learned.names)
        tracker.end(run, "FINISHED", {"final/a_last": result.summary.a_last})


def log_study(tracker: Tracker, learned: Learned, digest: str = "d1", stages: int | None = None) -> TrackedRun:
    """All of a study with one trial of two orders; ``stages``: stop in the midst of each order."""
    bench = learned.bench
    tags = {"backbone_digest": bench.backbone.digest, "dataset_digest": bench.dataset.digest}
    study = tracker.study_run("shapes", digest, PARAMS, tags)
    tracker.log_setup(study, "name: shapes\n")
    tracker.log_data(study, bench.dataset.name, bench.dataset.digest, "parquet:shapes.parquet")
    trial = tracker.trial_run("t001", {"method.rank_general": 4})
    for name in ORDERS:
        log_order(tracker, trial, learned, name, stages)
    if stages is None:
        tracker.end(trial, "FINISHED", {"objective": 50.0})
        tracker.end(study, "FINISHED", {"best_objective": 50.0}, {"best_trial": "t001"})
    return study


def runs_of(tracker: Tracker) -> dict[str, Run]:
    found = MlflowClient(tracker.uri, tracker.uri).search_runs([tracker.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "a run was made twice"
    return {run.info.run_name: run for run in found}


def history(tracker: Tracker, run: Run, metric: str) -> list[tuple[int, float]]:
    found = MlflowClient(tracker.uri, tracker.uri).get_metric_history(run.info.run_id, metric)
    return sorted((entry.step, entry.value) for entry in found)


def assert_complete(tracker: Tracker, learned: Learned) -> None:
    """Every run is there once, finished, with every number at every step once."""
    runs = runs_of(tracker)
    assert set(runs) == {"shapes", "t001", *ORDERS}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for name, result in learned.results.items():
        curve = history(tracker, runs[name], "accuracy_seen")
        assert [step for step, _ in curve] == [1, 2, 3]
        assert [round(value, 2) for _, value in curve] == list(result.summary.curve)
        assert history(tracker, runs[name], "a_avg")[-1] == (3, pytest.approx(result.summary.a_avg))
        assert history(tracker, runs[name], "forgetting")[-1] == (3, pytest.approx(result.summary.forgetting))
        losses = [loss for steps in learned.stages[name] for loss in epoch_losses(steps)]
        assert history(tracker, runs[name], "loss") == list(enumerate(losses, start=1))
        assert history(tracker, runs[name], "final/a_last") == [(0, result.summary.a_last)]
