"""Data-parallel workers, in processes of their own: the same artifacts on each, and those of a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from loda.energy import unpack_symmetric
from loda.settings import RunSettings
from loda.state import Artifact
from loda.subspace import general_subspace
from loda.workbench import open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import Run, artifact_of, run_all


def _worker(rank: int, size: int, folder: str, settings: dict[str, Any]) -> None:
    """One of several data-parallel workers; leaves its artifacts as files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        nodes, artifacts = run_all(RunSettings(**settings))
        for node in nodes:
            path = Path(folder) / f"worker-{rank}" / f"{node.step}-{node.position}"
            path.mkdir(parents=True)
            for name, content in artifacts[node.key].to_files().items():
                (path / name).write_bytes(content)
    finally:
        dist.destroy_process_group()


Read = Callable[[int, str, int], Artifact]
Workers = tuple[tuple[str, ...], Run, Read]


@pytest.fixture(scope="module")
def workers(tiny_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    """The adapted layers, a run in one process, and a reader of the same run's artifacts in two."""
    # Batches of 5 from two classes: some halves have a single image, and then one worker has none.
    settings = tiny_settings(training={"epochs": 2, "batch_size": 5, "lr": 0.02})
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(_worker, args=(2, str(folder), settings.model_dump()), nprocs=2)

    def read(rank: int, step: str, position: int) -> Artifact:
        path = folder / f"worker-{rank}" / f"{step}-{position}"
        return Artifact.from_files({file.name: file.read_bytes() for file in path.iterdir()})

    return tuple(open_workbench(settings).backbone.layers), run_all(settings), read


def _distance(one_rD: torch.Tensor, other_rD: torch.Tensor) -> float:
    """Largest entry of the difference of the projectors onto two row spaces."""
    bases = [torch.linalg.qr(rows.double().mT).Q for rows in (one_rD, other_rD)]
    return float((bases[0] @ bases[0].mT - bases[1] @ bases[1].mT).abs().max())


def test_all_workers_have_the_same_bits(workers: Workers) -> None:
    _, alone, read = workers
    for node in alone[0]:
        assert read(0, node.step, node.position).digest == read(1, node.step, node.position).digest


def test_observed_subspaces_do_not_depend_on_the_number_of_workers(workers: Workers) -> None:
    _, alone, read = workers
    ours, theirs = artifact_of(alone, "observe", 0), read(0, "observe", 0)
    names = [name for name in ours.tensors if name.startswith("moments.")]
    assert len(names) == 2
    for name in names:
        bases = [general_subspace(unpack_symmetric(a.tensors[name]), 4).basis for a in (ours, theirs)]
        projectors = [basis_LDr @ basis_LDr.mT for basis_LDr in bases]
        assert float((projectors[0] - projectors[1]).abs().max()) < 1e-6
    torch.testing.assert_close(theirs.tensors["features"], ours.tensors["features"], rtol=1e-5, atol=1e-6)


def test_trained_weights_do_not_depend_on_the_number_of_workers(workers: Workers) -> None:
    layers, alone, read = workers
    for position in range(3):
        ours, theirs = artifact_of(alone, "adapt", position).tensors, read(0, "adapt", position).tensors
        assert sorted(ours) == sorted(theirs)
        torch.testing.assert_close(theirs["head"], ours["head"], rtol=0, atol=1e-3)
        for layer in layers:
            general = f"branch/{layer}/general/down"
            assert _distance(ours[general], theirs[general]) < 1e-5, (layer, position)
            if position > 0:  # the pencil magnifies what rounding the earlier tasks' weights differ by
                isolated = f"branch/{layer}/isolated/down"
                assert _distance(ours[isolated], theirs[isolated]) < 2e-3, (layer, position)
        ours, theirs = artifact_of(alone, "consolidate", position).tensors, read(0, "consolidate", position).tensors
        for layer in layers:
            delta, other = (t[f"merge/{layer}.up"] @ t[f"merge/{layer}.down"] for t in (ours, theirs))
            assert float((delta - other).norm() / delta.norm()) < 5e-3, (layer, position)
        torch.testing.assert_close(theirs["class_means"], ours["class_means"], rtol=0, atol=1e-3)
