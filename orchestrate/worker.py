"""What runs inside a worker: walk a work list, stage after stage, through the store."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from loda.distributed import WorkerGroup
from loda.errors import ConfigError, StageError
from loda.graph import StepNode
from loda.run import summarise
from loda.settings import RunSettings
from loda.stage import run_step
from loda.state import Artifact
from loda.workbench import Workbench, canonical_digest, open_workbench
from orchestrate.redaction import guard_logs
from orchestrate.reports import TrialLedger
from orchestrate.step_memory import StepMemory
from orchestrate.store import StageStore
from orchestrate.study import Study, parse_study
from orchestrate.work import OrderWork, WorkList

Report = Callable[[dict[str, Any]], None]

_benches: dict[str, Workbench] = {}


def bench_for(settings: RunSettings, group: WorkerGroup) -> Workbench:
    """The process's workbench for these settings; data and backbone are loaded once for all settings of a method."""
    shared = settings.model_dump(mode="json", include={"stream", "backbone", "compute"})
    key = canonical_digest([shared, group.rank, group.size])
    if key not in _benches:
        _benches.clear()
        _benches[key] = open_workbench(settings, group)
    torch.set_num_threads(settings.compute.threads)
    return _benches[key].with_settings(settings)


class StoppedError(Exception):
    """Nobody wants the rest of this work any more."""


class Walker:
    """Makes sure that steps are in the store, computing those that aren't.

    Args:
        bench: backbone and data.
        store: of finished steps.
        memory: the artifacts read or computed last, kept from one walk of this process to the next.
        wanted: asked by the group's first worker between steps and epochs; once it says no, the walk stops.
    """

    def __init__(
        self,
        bench: Workbench,
        store: StageStore,
        memory: StepMemory | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        self.bench, self.store = bench, store
        self.owner = f"{socket.gethostname()}:{os.getpid()}"  # whom a lease names
        self._memory = StepMemory() if memory is None else memory
        self._wanted = wanted
        self._nodes: dict[str, StepNode] = {}
        self.computed: dict[str, float] = {}  # seconds of what was computed here and isn't reported yet

    def check(self, *progress: int) -> None:
        """Stop here if the work isn't wanted any more; ``progress`` is what epoch callbacks pass and isn't used.

        Raises:
            StoppedError: on all workers of the group alike.
        """
        if self._wanted is not None and not self._agreed(self.bench.group.rank > 0 or self._wanted()):
            raise StoppedError

    def _agreed(self, value: bool) -> bool:
        """Whether all workers of the group say yes."""
        if self.bench.group.size == 1:
            return value
        votes = torch.tensor([float(value)], device=self.bench.backbone.device)
        self.bench.group.sum_([votes])
        return int(votes) == self.bench.group.size

    def fetch(self, key: str, merged_only: bool = False) -> Artifact:
        """An artifact that should be stored; one that turns out to be damaged is computed again.

        Args:
            merged_only: what it adds to the weights is enough.
        """
        while True:
            artifact = self._memory.get(key, merged_only)
            known = artifact is not None
            artifact = artifact or self.store.read(key)
            if self._agreed(artifact is not None):
                assert artifact is not None
                if not known:
                    self._memory.add(key, artifact)
                return artifact
            self.ensure(self._nodes[key])

    def ensure(self, node: StepNode) -> None:
        """Have the step stored, computing it if nobody has or does."""
        self._nodes[node.key] = node
        leader = self.bench.group.rank == 0
        while True:
            # Only the first worker asks the store and holds the lease; the others do as it does.
            if not self._agreed(not (leader and self.store.has(node.key))):
                return
            lease = self.store.acquire_or_wait(node.key, self.owner) if leader else None
            try:
                if not self._agreed(not leader or lease is not None):
                    continue  # somebody else stored it while this one waited
                artifacts = {key: self.fetch(key, key in node.merged_only) for key in node.reads}
                artifact = run_step(self.bench, node, artifacts, self.check)
                if leader:
                    self.store.write(node.key, artifact, node.step)
                self._agreed(True)  # nobody goes on before it is stored
                self._memory.add(node.key, artifact)
                self.computed[node.key] = artifact.timings["seconds"]
                return
            finally:
                if lease is not None:
                    lease.release()


def walk_order(walker: Walker, nodes: list[StepNode], order: OrderWork, on_stage: Report) -> dict[str, Any]:
    """Walk one order, stage after stage.

    Args:
        nodes: the order's steps under the setting of the walker's workbench.
        on_stage: called after each stage with its record, by every worker of the group alike.

    Returns:
        The order's outcome: ``order``, ``summary`` (``AccuracySummary.to_dict``), ``state_digest``, and ``seconds``,
        the computing time of its stages, whether run now or reused.

    Raises:
        StageError: a stage failed; the message names it.
        StoppedError: the work isn't wanted any more.
    """
    walker.bench = order.bench(walker.bench)
    stage: list[StepNode] = []
    for node in nodes:
        walker.check()
        walker.ensure(node)
        stage.append(node)
        if node.step in ("consolidate", "evaluate"):
            walker.fetch(node.key)  # what the results rest on is read, and so checked
        if node.step == "evaluate":
            on_stage(_event(order.name, stage, walker))
            stage = []
    wanted = [node.key for node in nodes if node.step == "evaluate"]
    wanted.append(next(node.key for node in reversed(nodes) if node.step == "consolidate"))
    result = summarise(order.order, nodes, {key: walker.fetch(key) for key in wanted})
    seconds = sum((walker.store.timings(node.key) or {}).get("seconds", 0.0) for node in nodes)
    return {
        "order": list(result.order),
        "summary": result.summary.to_dict(),
        "state_digest": result.state_digest,
        "seconds": seconds,
    }


def walk(study: Study, work: WorkList, store: StageStore, report: Report, group: WorkerGroup) -> dict[str, Any]:
    """Walk all orders of a work list.

    Args:
        study: the study file's values; the work list's settings are put on top.
        report: called after each stage and each order with :meth:`TrialLedger.progress`, by every worker alike.
        group: data-parallel workers that walk the same list together.

    Returns:
        The last report: ``finished``, a few figures of each order, and the objectives.

    Raises:
        StageError: a stage failed; the message names it.
    """
    bench = bench_for(study.with_values(work.settings).run_settings(), group)
    walker = Walker(bench, store)
    nodes = work.nodes(bench, study)
    objective = study.search.objective.model_dump(mode="json")
    ledger = TrialLedger(objective, [order.name for order in work.orders])
    for order in work.orders:
        outcome = walk_order(walker, nodes[order.name], order, lambda event: report(ledger.progress([event])))
        ledger.add(order.name, outcome)
        if not ledger.complete:
            report(ledger.progress([]))
    return ledger.final()


def _event(order: str, stage: list[StepNode], walker: Walker) -> dict[str, Any]:
    """A finished stage: which of its steps were computed here, in how many seconds, and the accuracy after it (%)."""
    records = []
    for node in stage:
        seconds = walker.computed.pop(node.key, None)
        records.append({"step": node.step, "key": node.key, "ran": seconds is not None, "seconds": seconds or 0.0})
    meta = walker.fetch(stage[-1].key).meta
    correct, count = np.asarray(meta["correct"]), np.asarray(meta["count"])
    accuracy = {
        "a_last": round(100 * float(correct.sum() / count.sum()), 2),
        "a_last_macro": 100 * float((correct / count).mean()),
    }
    return {"order": order, "position": stage[-1].position, "steps": records, "accuracy": accuracy}


def open_work(payload: Mapping[str, Any]) -> tuple[Study, StageStore]:
    """The study and the store that a payload names (:meth:`orchestrate.session.Session.payload`)."""
    guard_logs()
    study = parse_study(payload["study"], "the study of this trial")
    return study, StageStore(payload["store"], writer={"torch": torch.__version__})


def run_work(payload: Mapping[str, Any], report: Report, group: WorkerGroup | None = None) -> dict[str, Any]:
    """Walk ``payload["work"]`` (:meth:`WorkList.to_dict`) here, to its end; as :func:`walk`."""
    study, store = open_work(payload)
    return walk(study, WorkList.from_dict(payload["work"]), store, report, group or WorkerGroup.current())


def serve(payload: Mapping[str, Any], jobs: Any, group: WorkerGroup) -> None:
    """Walk one order after another, as a pool hands them out, until it has no more.

    Args:
        payload: :meth:`orchestrate.session.Session.payload`.
        jobs: ``take() -> job | None``, ``wanted(job)``, ``stage(job, record)``, ``done(job, outcome)`` and
            ``failed(job, reason)``; a job is ``{"id", "settings", "order"}``.
        group: data-parallel workers that walk the same orders together.
    """
    study, store = open_work(payload)
    memory = StepMemory()
    leader = group.rank == 0
    while (job := jobs.take()) is not None:
        work = WorkList.from_dict({"settings": job["settings"], "orders": [job["order"]]})
        (order,) = work.orders
        try:
            bench = bench_for(study.with_values(work.settings).run_settings(), group)
            walker = Walker(bench, store, memory, partial(jobs.wanted, job))
            tell = partial(jobs.stage, job) if leader else _nobody
            outcome = walk_order(walker, work.nodes(bench, study)[order.name], order, tell)
        except StoppedError:
            continue
        except (StageError, ConfigError) as error:
            jobs.failed(job, f"{type(error).__name__}: {error}")
            if group.size > 1:
                raise  # others may be waiting in the middle of a sum: the group has to start again
            continue
        if leader:
            jobs.done(job, outcome)


def _nobody(event: Mapping[str, Any]) -> None:
    """Only the group's first worker reports."""
