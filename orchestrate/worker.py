"""What runs inside a worker: walk a work list, stage after stage, through the store."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from loda.distributed import WorkerGroup
from loda.errors import StageError
from loda.graph import StepNode
from loda.run import SequenceResult, summarise
from loda.settings import RunSettings
from loda.stage import run_step
from loda.state import Artifact
from loda.workbench import Workbench, canonical_digest, open_workbench
from orchestrate.objective import objective_values
from orchestrate.store import StageStore
from orchestrate.study import Study, parse_study
from orchestrate.work import WorkList

Report = Callable[[dict[str, Any]], None]
KEPT_IN_MEMORY = 96  # artifacts; a stage's parents are needed again at once, and the store has the rest

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


class Walker:
    """Makes sure that steps are in the store, computing those that aren't.

    Args:
        bench: backbone and data.
        store: of finished steps.
        owner: whom a lease names.
    """

    def __init__(self, bench: Workbench, store: StageStore, owner: str) -> None:
        self.bench, self.store, self.owner = bench, store, owner
        self._memory: OrderedDict[str, Artifact] = OrderedDict()
        self._nodes: dict[str, StepNode] = {}
        self.computed: dict[str, float] = {}  # seconds of what was computed here and isn't reported yet

    def _remember(self, key: str, artifact: Artifact) -> Artifact:
        self._memory[key] = artifact
        self._memory.move_to_end(key)
        while len(self._memory) > KEPT_IN_MEMORY:
            self._memory.popitem(last=False)
        return artifact

    def _agreed(self, value: bool) -> bool:
        """Whether all workers of the group say yes."""
        if self.bench.group.size == 1:
            return value
        votes = torch.tensor([float(value)], device=self.bench.backbone.device)
        self.bench.group.sum_([votes])
        return int(votes) == self.bench.group.size

    def fetch(self, key: str) -> Artifact:
        """An artifact that should be stored; one that turns out to be damaged is computed again."""
        while True:
            artifact = self._memory.get(key) or self.store.read(key)
            if self._agreed(artifact is not None):
                assert artifact is not None
                return self._remember(key, artifact)
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
                artifacts = {key: self.fetch(key) for key in node.reads}
                artifact = run_step(self.bench, node, artifacts)
                if leader:
                    self.store.write(node.key, artifact, node.step)
                self._agreed(True)  # nobody goes on before it is stored
                self._remember(node.key, artifact)
                self.computed[node.key] = artifact.timings["seconds"]
                return
            finally:
                if lease is not None:
                    lease.release()


def walk(study: Study, work: WorkList, store: StageStore, report: Report, group: WorkerGroup) -> dict[str, Any]:
    """Walk all orders of a work list.

    Args:
        study: the study file's values; the work list's settings are put on top.
        report: called after each stage with ``{"events": [...]}``, by every worker of the group alike.
        group: data-parallel workers that walk the same list together.

    Returns:
        The last report: ``finished``, one summary for each order, and the objectives.

    Raises:
        StageError: a stage failed; the message names it.
    """
    chosen = study.with_values(work.settings)
    settings = chosen.run_settings()
    bench = bench_for(settings, group)
    walker = Walker(bench, store, f"{socket.gethostname()}:{os.getpid()}")
    all_nodes = work.nodes(bench, study)
    results: dict[str, SequenceResult] = {}
    for order in work.orders:
        nodes = all_nodes[order.name]
        walker.bench = order.bench(bench)
        stage: list[StepNode] = []
        for node in nodes:
            walker.ensure(node)
            stage.append(node)
            if node.step in ("consolidate", "evaluate"):
                walker.fetch(node.key)  # what the results rest on is read, and so checked
            if node.step == "evaluate":
                report({"events": [_event(order.name, stage, walker)], "finished": False})
                stage = []
        wanted = [node.key for node in nodes if node.step == "evaluate"]
        wanted.append(next(node.key for node in reversed(nodes) if node.step == "consolidate"))
        results[order.name] = summarise(order.order, nodes, {key: walker.fetch(key) for key in wanted})
    return final_report(chosen, results, _stage_seconds(store, all_nodes))


def _event(order: str, stage: list[StepNode], walker: Walker) -> dict[str, Any]:
    """A finished stage: which of its steps were computed here, and in how many seconds."""
    records = []
    for node in stage:
        seconds = walker.computed.pop(node.key, None)
        records.append({"step": node.step, "key": node.key, "ran": seconds is not None, "seconds": seconds or 0.0})
    return {"order": order, "position": stage[-1].position, "steps": records}


def _stage_seconds(store: StageStore, nodes: Mapping[str, list[StepNode]]) -> list[float]:
    """Computing seconds of each order's stages, whether run now or reused."""
    return [sum((store.timings(n.key) or {}).get("seconds", 0.0) for n in steps) for steps in nodes.values()]


def final_report(study: Study, results: Mapping[str, SequenceResult], seconds: list[float]) -> dict[str, Any]:
    """What a trial reports when all its orders are through: from stored results alone, so it can always be repeated."""
    summaries = [result.summary for result in results.values()]
    orders = {
        name: {
            "order": list(result.order),
            "a_last": result.summary.a_last,
            "a_avg": result.summary.a_avg,
            "forgetting": result.summary.forgetting,
            "state_digest": result.state_digest,
        }
        for name, result in results.items()
    }
    try:
        objectives: dict[str, Any] = dict(objective_values(summaries, seconds, study.search.objective))
    except ValueError as error:
        raise StageError(f"the objective can't be computed: {error}") from error
    return {"finished": True, "orders": orders, "events": []} | objectives


def run_work(payload: Mapping[str, Any], report: Report, group: WorkerGroup | None = None) -> dict[str, Any]:
    """Entry point of every executor.

    Args:
        payload: ``study`` (resolved values with absolute paths), ``work`` (:meth:`WorkList.to_dict`), ``store``.
    """
    study = parse_study(payload["study"], "the study of this trial")
    store = StageStore(payload["store"], writer={"torch": torch.__version__})
    return walk(study, WorkList.from_dict(payload["work"]), store, report, group or WorkerGroup.current())
