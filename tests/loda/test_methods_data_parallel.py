"""Methods that exchange more than gradients between data-parallel workers, or take gradients of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from loda.settings import RunSettings
from loda.state import Artifact
from tests.conftest import SettingsFactory
from tests.loda.running import Run, run_all

METHODS: dict[str, dict[str, Any]] = {
    "expert_pool": {"rank": 6, "active": 3, "merged": 2},
    "gainlora": {"rank": 4, "energy": 0.7},
    "ortholora": {"rank": 4},
    "mtllora": {"rank": 4},
    "thanora": {"rank": 4},
}
ORDER = (1, 0, 2)


def _worker(rank: int, size: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        for name, settings in runs.items():
            nodes, artifacts = run_all(RunSettings(**settings), ORDER)
            for index, node in enumerate(nodes):
                for file, content in artifacts[node.key].to_files().items():
                    Path(folder, f"{name}-{rank}-{index}-{file}").write_bytes(content)
    finally:
        dist.destroy_process_group()


Read = Callable[[str, int, int], Artifact]


@pytest.fixture(scope="module")
def both(tiny_settings: SettingsFactory, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], Read]:
    """Every method's run in one process, and a reader of the same run's artifacts in two."""
    # 12 images in batches of 11 (36 of them for joint methods): a last batch of one image leaves a worker without.
    settings = {
        name: tiny_settings(method={"name": name, **values}, training={"epochs": 1, "batch_size": 11, "lr": 0.02})
        for name, values in METHODS.items()
    }
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(_worker, args=(2, str(folder), {n: s.model_dump() for n, s in settings.items()}), nprocs=2)

    def read(name: str, rank: int, index: int) -> Artifact:
        start = f"{name}-{rank}-{index}-"
        return Artifact.from_files({f.name.removeprefix(start): f.read_bytes() for f in folder.glob(f"{start}*")})

    return {name: run_all(one, ORDER) for name, one in settings.items()}, read


@pytest.mark.parametrize("name", METHODS)
def test_workers_agree_with_each_other_and_with_one_alone(name: str, both: tuple[dict[str, Run], Read]) -> None:
    (nodes, artifacts), read = both[0][name], both[1]
    for index, node in enumerate(nodes):
        first, second, alone = read(name, 0, index), read(name, 1, index), artifacts[node.key]
        assert first.digest == second.digest, node.step
        for tensor in ("head", "class_means"):
            if tensor in alone.tensors:
                torch.testing.assert_close(first.tensors[tensor], alone.tensors[tensor], rtol=0, atol=1e-3)
        if node.step == "adapt":
            assert first.meta["losses"] == pytest.approx(alone.meta["losses"], rel=1e-3)
        for tensor in (n for n in alone.tensors if n.endswith(".usage")):
            assert torch.equal(first.tensors[tensor], alone.tensors[tensor])
