"""Every method in two data-parallel workers: the same bits in both, and the weights of a single process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from loda.methods import build_method, registry
from loda.settings import RunSettings
from loda.state import Artifact
from loda.workbench import merge_factors, open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import Run, artifact_of, run_all
from tests.loda.test_methods import small_values

METHODS = sorted(registry())
ORDER = (1, 0)


def _settings(build: SettingsFactory, name: str) -> RunSettings:
    # Batches of 5: the last one of a task has a single image, and one worker none.
    training = {"epochs": 1, "batch_size": 5, "lr": 0.001 if name == "coso" else 0.01}
    return build(stream={"tasks": 2}, method=small_values(name), training=training)


def _worker(rank: int, size: int, folder: str, settings: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        for name, values in settings.items():
            nodes, artifacts = run_all(RunSettings(**values), ORDER[: 1 if registry()[name].joint else 2])
            path = Path(folder) / f"worker-{rank}" / name
            path.mkdir(parents=True)
            digests = {f"{node.step}-{node.position}": artifacts[node.key].digest for node in nodes}
            (path / "digests.json").write_text(json.dumps(digests), encoding="utf-8")
            for node in nodes:
                if node.step == "consolidate":
                    for file, content in artifacts[node.key].to_files().items():
                        (path / f"{node.position}-{file}").write_bytes(content)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tiny_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    settings = {name: _settings(tiny_settings, name).model_dump() for name in METHODS}
    mp.spawn(_worker, args=(2, str(folder), settings), nprocs=2)
    return folder


def _weights(settings: RunSettings, chain: list[Artifact]) -> dict[str, torch.Tensor]:
    """The weights between tasks, less the pre-trained ones."""
    backbone = open_workbench(settings).backbone
    backbone.load_merges(build_method(settings.method).weights_at_rest([merge_factors(state) for state in chain]))
    return {name: backbone._linear(name).weight - backbone.original[name] for name in backbone.layers}


@pytest.mark.parametrize("name", METHODS)
def test_two_workers_agree_with_each_other_and_with_one(
    name: str, workers: Path, tiny_settings: SettingsFactory
) -> None:
    one, two = ((workers / f"worker-{rank}" / name / "digests.json").read_text() for rank in (0, 1))
    assert one == two and len(json.loads(one)) in (4, 8)
    settings = _settings(tiny_settings, name)
    alone: Run = run_all(settings, ORDER)
    chain = [alone[1][node.key] for node in alone[0] if node.step == "consolidate"]
    theirs = [
        Artifact.from_files(
            {
                file.name.split("-", 1)[1]: file.read_bytes()
                for file in (workers / "worker-0" / name).glob(f"{position}-*")
            }
        )
        for position in range(len(chain))
    ]
    expected, found = _weights(settings, chain), _weights(settings, theirs)
    for layer, change in expected.items():
        assert bool(change.any()) == (registry()[name].trains and registry()[name].mergeable)
        assert float((found[layer] - change).norm()) <= 0.01 * float(change.norm()), layer
    torch.testing.assert_close(theirs[-1].tensors["class_means"], chain[-1].tensors["class_means"], rtol=0, atol=1e-3)
    assert artifact_of(alone, "consolidate", len(chain) - 1).meta["classes"] == theirs[-1].meta["classes"]
