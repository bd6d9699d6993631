"""How long a study's steps will take here, by trying its first two stages with one epoch."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loda.distributed import WorkerGroup
from loda.graph import Step, StepNode, stage_classes
from loda.methods import build_method
from loda.stage import run_step
from loda.state import Artifact
from loda.workbench import Workbench, open_workbench
from orchestrate.session import Session

FIRST, LATER = 0, 1  # a first task trains and merges otherwise than all later ones, which are alike


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds and bytes of steps tried on this machine, carried over to other tasks by their numbers of images.

    Observing, training and merging go with the task's training images (training also with the epochs), evaluating with
    the images passed: those of all tasks so far, and the task's own for the two probes. What doesn't go with images,
    such as the decompositions, is taken along as if it did: tasks of one stream hardly differ in size.

    Attributes:
        bench: the data and settings that are asked about.
        seconds: by step and by whether the task is the first (0) or a later one (1), for ``images``.
        epoch_seconds: of one epoch, for the same images.
    """

    bench: Workbench
    seconds: dict[tuple[Step, int], float]
    epoch_seconds: dict[int, float]
    images: dict[tuple[Step, int], int]
    bytes: dict[tuple[Step, int], int]
    tried_in: float

    def of(self, node: StepNode) -> tuple[float, float]:
        """Expected seconds and bytes of a step under the measured settings."""
        kind = (node.step, min(node.position, LATER))
        if kind not in self.seconds:  # a stream of one task
            kind = (node.step, FIRST)
        share = _images(self.bench, node) / max(1, self.images[kind])
        seconds = self.seconds[kind]
        if node.step == "adapt":
            seconds += self.epoch_seconds[kind[1]] * self.bench.settings.training.epochs
        return share * seconds, self.bytes[kind]

    def expected(self, weighted: Iterable[tuple[StepNode, int]], workers: int, lanes: int) -> dict[str, Any]:
        """What a plan says of these steps, each so many times over."""
        costs = [(self.of(node), times) for node, times in weighted]
        seconds = sum(times * cost[0] for cost, times in costs) / workers
        size = sum(times * cost[1] for cost, times in costs)
        text = f"{seconds / 3600:.2f} worker-hours at most, {seconds / lanes / 60:.1f} min at {lanes} trials at once"
        return {
            "expected_worker_seconds": seconds,
            "expected_worker_hours": seconds / 3600,
            "expected_bytes": round(size),
            "expected": f"{text}; {size / 1e6:.1f} MB (tried here for {self.tried_in:.0f} s"
            + (f"; as if {workers} workers shared all evenly)" if workers > 1 else ")"),
        }


def try_costs(session: Session) -> MeasuredCosts:
    """Run the first two stages of the first evaluation order with one epoch, in this process and alone; store nothing.

    Raises:
        StageError: training diverged, or an image can't be decoded.
    """
    started = time.perf_counter()
    work = session.evaluate_orders[0]
    bench = session.bench
    if bench.group.size > 1:
        bench = open_workbench(session.study.run_settings(), WorkerGroup())
    bench = work.bench(bench)
    short = session.study.with_values({"training.epochs": 1})
    tried = bench.with_settings(short.run_settings())
    nodes = [node for node in work.nodes(tried, short) if node.position <= LATER]
    seconds: dict[tuple[Step, int], float] = {}
    epoch_seconds: dict[int, float] = {}
    sizes: dict[tuple[Step, int], int] = {}
    images: dict[tuple[Step, int], int] = {}
    artifacts: dict[str, Artifact] = {}
    for node in nodes:
        kind = (node.step, node.position)
        if node.step == "adapt":  # the first batches of a process are slow, and a whole run hardly notices
            run_step(tried, node, artifacts)
        artifact = artifacts[node.key] = run_step(tried, node, artifacts)
        epoch = artifact.timings.get("epoch_1", 0.0)
        if node.step == "adapt":
            epoch_seconds[node.position] = epoch
        seconds[kind] = artifact.timings["seconds"] - epoch
        images[kind], sizes[kind] = _images(tried, node), artifact.nbytes
    return MeasuredCosts(bench, seconds, epoch_seconds, images, sizes, time.perf_counter() - started)


def _images(bench: Workbench, node: StepNode) -> int:
    """Images that a step passes through the backbone, up to a factor that is the same for all steps of its kind."""
    settings = bench.settings
    own = len(bench.indices(stage_classes(settings, bench.tasks, node.prefix), "train"))
    if node.step != "evaluate":
        return own
    assert node.split is not None
    seen = [len(bench.indices(bench.tasks[index].classes, node.split)) for index in node.prefix]
    method = build_method(settings.method)
    passes = sum(seen) * (1 + len(seen) * method.needs_task_id)
    if method.joint:
        return passes
    return passes + seen[-1] + (own + seen[-1] if node.position > 0 and method.trains else 0)
