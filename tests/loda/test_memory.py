"""The memory of protected input directions, and the sketch that grows one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loda.memory import SubspaceMemory, complement
from loda.sketch import FrequentDirections

WIDTH = 12


def _moment(seed: int, rank: int = WIDTH) -> Tensor:
    """Steep, like a layer's inputs."""
    x_ND = torch.randn(40, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix_rD = torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64)
    x_ND = x_ND @ (mix_rD * 0.6 ** torch.arange(rank)[:, None])
    return x_ND.mT @ x_ND / 40


def _held(basis_Dk: Tensor, S_DD: Tensor) -> float:
    return float((basis_Dk.mT @ S_DD @ basis_Dk).trace() / S_DD.trace())


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("energy", [0.6, 0.9, 0.99])
def test_each_moment_is_held_to_its_share_with_the_fewest_directions(dual: bool, energy: float) -> None:
    memory = SubspaceMemory(dual)
    for seed in range(3):
        S_DD = _moment(seed)
        before_Dk = memory.protected("a") if "a" in memory.bases else torch.zeros(WIDTH, 0, dtype=torch.float64)
        added = memory.grow("a", S_DD, energy)
        after_Dk = memory.protected("a")
        eye = torch.eye(after_Dk.shape[1], dtype=torch.float64)
        torch.testing.assert_close(after_Dk.mT @ after_Dk, eye, rtol=0, atol=1e-12)
        assert after_Dk.shape[1] == before_Dk.shape[1] + added
        assert _held(after_Dk, S_DD) >= energy - 1e-9
        # What was protected still is.
        torch.testing.assert_close(after_Dk @ (after_Dk.mT @ before_Dk), before_Dk, rtol=0, atol=1e-10)
        if added:  # no choice of one direction less would do: Ky Fan on the residual
            rest_DD = torch.eye(WIDTH, dtype=torch.float64) - before_Dk @ before_Dk.mT
            best = torch.linalg.eigvalsh(rest_DD @ S_DD @ rest_DD).flip(0)[: added - 1].sum()
            assert float(best / S_DD.trace()) + _held(before_Dk, S_DD) < energy


def test_the_dual_form_protects_the_same_directions_and_keeps_the_smaller_side() -> None:
    one, two = SubspaceMemory(dual=True), SubspaceMemory(dual=False)
    for seed in range(4):
        for memory in (one, two):
            memory.grow("a", _moment(seed), 0.97)
        projectors = [m.protected("a") @ m.protected("a").mT for m in (one, two)]
        torch.testing.assert_close(*projectors, rtol=0, atol=1e-8)
        assert one.bases["a"].shape[1] <= WIDTH / 2
    assert "a" in one.retaining and two.bases["a"].shape[1] > WIDTH / 2


def test_free_and_protected_directions_fill_the_space() -> None:
    for energy in (0.5, 0.999):
        memory = SubspaceMemory()
        memory.grow("a", _moment(0), energy)
        both_DD = torch.cat([memory.protected("a"), memory.free("a")], dim=1)
        torch.testing.assert_close(both_DD.mT @ both_DD, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-12)


def test_no_direction_without_energy_is_ever_taken() -> None:
    memory = SubspaceMemory()
    assert memory.grow("a", _moment(0, rank=3), 1.0) == 3
    assert memory.grow("a", _moment(0, rank=3), 1.0) == 0
    assert memory.grow("b", torch.zeros(WIDTH, WIDTH), 0.9) == 0
    assert memory.grow("c", _moment(0), 1.0) == WIDTH and memory.grow("c", _moment(1), 1.0) == 0
    assert memory.free("c").shape == (WIDTH, 0) and memory.protected("c").shape == (WIDTH, WIDTH)


def test_a_memory_goes_through_its_tensors() -> None:
    memory = SubspaceMemory()
    for name, energy in (("blocks.0.attn.qkv", 0.5), ("blocks.0.mlp.fc2", 0.999999)):
        memory.grow(name, _moment(0), energy)
    assert memory.retaining == {"blocks.0.mlp.fc2"}
    again = SubspaceMemory()
    again.load_state_tensors(memory.state_tensors(), torch.device("cpu"))
    assert again.retaining == memory.retaining
    assert all(torch.equal(again.bases[name], basis) for name, basis in memory.bases.items())


def test_the_complement_of_nothing_is_everything() -> None:
    assert torch.equal(complement(torch.zeros(3, 0)), torch.eye(3))


@pytest.mark.parametrize("rows", [4, 8])
def test_a_sketch_underestimates_every_direction_by_a_bounded_energy(rows: int) -> None:
    x_ND = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.8 ** (
        torch.arange(WIDTH)
    )
    sketch = FrequentDirections(WIDTH, rows)
    for part in x_ND.split(7):
        sketch.update(part)
    assert sketch.sketch_lD.shape == (rows, WIDTH)
    lost_D = torch.linalg.eigvalsh(x_ND.mT @ x_ND - sketch.energy())
    assert float(lost_D.min()) > -1e-9
    assert float(lost_D.max()) <= float(x_ND.square().sum()) / rows
    assert float(sketch.energy().trace()) > 0.3 * float(x_ND.square().sum())


def test_a_sketch_keeps_what_fits_exactly() -> None:
    x_ND = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) @ torch.randn(
        3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    sketch = FrequentDirections(WIDTH, 4)
    for part in x_ND.split(4):
        sketch.update(part)
    torch.testing.assert_close(sketch.energy(), x_ND.mT @ x_ND, rtol=0, atol=1e-9)
