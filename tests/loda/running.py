"""Run sequences step by step, and look into what they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loda.graph import StepNode, sequence_nodes
from loda.run import run_nodes
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import open_workbench

ORDER = (2, 0, 1)
Run = tuple[list[StepNode], dict[str, Artifact]]


def run_all(settings: RunSettings, order: Sequence[int] = ORDER, known: Mapping[str, Artifact] | None = None) -> Run:
    """All steps of one order in a fresh workbench."""
    bench = open_workbench(settings)
    nodes = sequence_nodes(bench, settings, order, "test")
    artifacts = dict(known or {})
    run_nodes(bench, nodes, artifacts)
    return nodes, artifacts


def keys_of(settings: RunSettings, order: Sequence[int] = ORDER) -> dict[tuple[str, int], str]:
    nodes = sequence_nodes(open_workbench(settings), settings, order, "test")
    return {(node.step, node.position): node.key for node in nodes}


def digests(run: Run) -> dict[str, str]:
    return {node.key: run[1][node.key].digest for node in run[0]}


def reread(artifact: Artifact) -> Artifact:
    """As a store gives it back: from files, and with the tensors in another order, which files don't keep."""
    again = Artifact.from_files(artifact.to_files())
    return Artifact(dict(sorted(again.tensors.items(), reverse=True)), again.meta, again.timings)


def artifact_of(run: Run, step: str, position: int) -> Artifact:
    return run[1][next(n.key for n in run[0] if n.step == step and n.position == position)]
