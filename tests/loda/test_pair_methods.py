"""O-LoRA, SLAO and LoRA-P&M: what each does with one LoRA pair a task, on layers of any shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loda.methods.base import Batch, Learner, Observation
from loda.methods.lora_pm import LoraPm, LoraPmSettings
from loda.methods.olora import OLora, OLoraSettings
from loda.methods.slao import Slao, SlaoSettings, orthonormal_rows
from loda.training import trainable_parameters
from loda.workbench import memory_tensors, merge_factors
from tests.conftest import BackboneFactory, SettingsFactory
from tests.loda.attached import fill_up_projections
from tests.loda.running import Run, artifact_of, run_all

TARGETS = ["attn.qkv", "mlp.fc1", "mlp.fc2"]  # 32 -> 96, 32 -> 128, 128 -> 32
NO_MOMENTS: Any = None


def _run(tiny_settings: SettingsFactory, training: dict[str, Any] | None = None, **method: Any) -> Run:
    return run_all(tiny_settings(method=method, backbone={"target": TARGETS}, training=training or {}))


def _at(position: int) -> Observation:
    return Observation(NO_MOMENTS, position)


def _delta(tensors: dict[str, Tensor], layer: str, scale: float = 1.0) -> Tensor:
    return scale * tensors[f"branch/{layer}/lora/up"].double() @ tensors[f"branch/{layer}/lora/down"].double()


# O-LoRA


def test_oloras_penalty_is_zero_exactly_when_row_spaces_are_orthogonal(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = OLora(OLoraSettings(rank=3, orthogonality=0.5))
    method.begin_task(backbone, _at(0))
    assert method.penalty(backbone) is None
    method.merged(backbone, _at(0), None)
    method.begin_task(backbone, _at(1))
    penalty = method.penalty(backbone)
    assert penalty is not None
    slow = sum(
        abs(float(row_old.double() @ row_new.detach().double()))
        for name, branched in backbone.attached.items()
        for row_old in method.rows[name]
        for row_new in branched.branches["lora"].down
    )
    assert float(penalty.detach()) == pytest.approx(0.5 * slow, rel=1e-5) and slow > 1
    for name, branched in backbone.attached.items():
        old_rD = method.rows[name].double()
        rest_DD = torch.eye(old_rD.shape[1], dtype=torch.float64) - torch.linalg.pinv(old_rD) @ old_rD
        with torch.no_grad():
            branched.branches["lora"].down.copy_(branched.branches["lora"].down.double() @ rest_DD)
    penalty = method.penalty(backbone)
    assert penalty is not None and float(penalty.detach()) < 1e-4
    with torch.no_grad():  # one direction of one layer is enough
        layer = backbone.layers[2]
        backbone.attached[layer].branches["lora"].down[1] += 0.1 * method.rows[layer][0]
    penalty = method.penalty(backbone)
    assert penalty is not None and float(penalty.detach()) > 1e-3


def test_olora_trains_towards_orthogonal_rows(tiny_settings: SettingsFactory) -> None:
    overlaps = []
    for weight in (0.0, 5.0):
        run = _run(tiny_settings, {"epochs": 4, "lr": 0.01}, name="olora", rank=3, orthogonality=weight)
        old, new = (artifact_of(run, "adapt", position).tensors for position in (0, 1))
        downs = [name for name in new if name.endswith("/lora/down")]
        overlaps.append(sum(float((old[name] @ new[name].mT).abs().sum()) for name in downs))
    assert overlaps[1] < 0.7 * overlaps[0]


def test_olora_remembers_the_rows_of_every_task(tiny_settings: SettingsFactory) -> None:
    run = _run(tiny_settings, name="olora", rank=3)
    memory = memory_tensors(artifact_of(run, "consolidate", 2))
    for layer, rows_RD in memory.items():
        trained = [artifact_of(run, "adapt", position).tensors[f"branch/{layer}/lora/down"] for position in range(3)]
        assert torch.equal(rows_RD, torch.cat(trained))


# SLAO


def test_slao_restarts_with_orthonormal_rows_of_the_same_space() -> None:
    down_rD = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    rows_rD = orthonormal_rows(down_rD)
    torch.testing.assert_close(rows_rD @ rows_rD.mT, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(down_rD @ rows_rD.mT @ rows_rD, down_rD, rtol=1e-5, atol=1e-5)  # not the complement
    torch.testing.assert_close(orthonormal_rows(rows_rD), rows_rD, rtol=0, atol=1e-6)  # nor a change of signs
    torch.testing.assert_close(orthonormal_rows(3 * down_rD), rows_rD, rtol=0, atol=1e-6)


def test_slao_starts_a_task_from_the_last_fine_tuned_pair(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = Slao(SlaoSettings(rank=3))
    for position in range(3):
        method.begin_task(backbone, _at(position))
        for name, branched in backbone.attached.items():
            branch = branched.branches["lora"]
            assert branch.up.requires_grad and branch.down.requires_grad
            if position:
                assert torch.equal(branch.up, method.pair[f"{name}.up"])
                assert torch.equal(branch.down, orthonormal_rows(method.pair[f"{name}.down"]))
        fill_up_projections(backbone, seed=position)
        with torch.no_grad():
            for branched in backbone.attached.values():
                branched.branches["lora"].down.add_(0.1)
        method.merged(backbone, _at(position), None)


def test_slaos_merged_pair_is_the_average_written_out(tiny_settings: SettingsFactory) -> None:
    run = _run(tiny_settings, name="slao", rank=3, scale=0.5)
    layers = {name.split("/")[1] for name in artifact_of(run, "adapt", 0).tensors if name.startswith("branch/")}
    for layer in layers:
        weights: list[float] = []
        for position in range(3):
            share = 1 / math.sqrt(position + 1)
            weights = [weight * (1 - share) for weight in weights] + [share]
            assert sum(weights) == pytest.approx(1)
            ups = [
                artifact_of(run, "adapt", t).tensors[f"branch/{layer}/lora/up"].double() for t in range(position + 1)
            ]
            expected_Or = 0.5 * sum(weight * up_Or for weight, up_Or in zip(weights, ups, strict=True))
            factors = merge_factors(artifact_of(run, "consolidate", position))
            torch.testing.assert_close(factors[f"{layer}.up"].double(), expected_Or, rtol=1e-5, atol=1e-6)
            down_rD = artifact_of(run, "adapt", position).tensors[f"branch/{layer}/lora/down"]
            assert torch.equal(factors[f"{layer}.down"], down_rD)
        first = merge_factors(artifact_of(run, "consolidate", 0))[f"{layer}.up"]
        assert torch.equal(first, 0.5 * artifact_of(run, "adapt", 0).tensors[f"branch/{layer}/lora/up"])


# LoRA-P&M


def test_the_merge_step_is_the_minimum_of_the_summed_quadratics(tiny_settings: SettingsFactory) -> None:
    """Every task's Fisher information and end weights kept whole; α by a fine grid."""
    run = _run(tiny_settings, {"lr": 0.2}, name="lora_pm", rank=3, scale=0.7)
    layers = {name.split("/")[1] for name in artifact_of(run, "adapt", 0).tensors if name.startswith("branch/")}
    merged = {layer: torch.zeros((), dtype=torch.float64) for layer in layers}
    fishers: list[dict[str, Tensor]] = []
    ends: list[dict[str, Tensor]] = []
    for position in range(3):
        tensors = artifact_of(run, "adapt", position).tensors
        change = {layer: _delta(tensors, layer, 0.7) for layer in layers}
        fishers.append({layer: tensors[f"trained/{layer}"] for layer in layers})
        ends.append({layer: merged[layer] + change[layer] for layer in layers})

        def loss(alpha: float, change: dict[str, Tensor] = change) -> float:
            return sum(
                float((fisher[layer] * (merged[layer] + alpha * change[layer] - end[layer]).square()).sum()) / 2
                for fisher, end in zip(fishers, ends, strict=True)
                for layer in layers
            )

        grid = torch.linspace(-0.5, 1.5, 2001, dtype=torch.float64)
        best = float(grid[int(torch.tensor([loss(float(alpha)) for alpha in grid[::40]]).argmin()) * 40])
        fine = torch.linspace(best - 0.05, best + 0.05, 101, dtype=torch.float64)
        best = float(fine[int(torch.tensor([loss(float(alpha)) for alpha in fine]).argmin())])
        found = artifact_of(run, "consolidate", position).meta["facts"]["merge_step"]
        assert found == pytest.approx(best, abs=2e-3)
        assert found == 1 if position == 0 else 0 < found < 1
        factors = merge_factors(artifact_of(run, "consolidate", position))
        for layer in layers:
            step_OD = factors[f"{layer}.up"].double() @ factors[f"{layer}.down"].double()
            torch.testing.assert_close(step_OD, found * change[layer], rtol=1e-4, atol=1e-7)
            merged[layer] = merged[layer] + step_OD


def test_perturbations_are_plain_shorter_or_longer_with_equal_chances_and_leave_no_trace(
    tiny_backbone: BackboneFactory,
) -> None:
    backbone = tiny_backbone(("mlp.fc1",))
    method = LoraPm(LoraPmSettings(rank=2, scale=2.0, perturbation=0.5))
    method.begin_task(backbone, _at(0))
    branches = [branched.branches["lora"] for branched in backbone.attached.values()]
    seen: list[float] = []

    def loss_of(indices: Tensor) -> Tensor:
        scales = {float(branch.scale) for branch in branches}
        assert len(scales) == 1  # one draw for all layers
        seen.extend(scales)
        return sum((branch.up * branch.up).sum() for branch in branches)  # type: ignore[return-value]

    draws = torch.Generator().manual_seed(0)
    learner = Learner(trainable_parameters(backbone), [], lambda: None, lambda g: None, draws, backbone, lambda: 0.1)
    for _ in range(300):
        method.training_step(learner, Batch(torch.arange(2), loss_of))
        assert all(branch.scale == 2.0 for branch in branches)
    assert set(seen) == {1.0, 2.0, 3.0}
    assert all(70 < seen.count(value) < 130 for value in (1.0, 2.0, 3.0))


def test_without_perturbation_the_first_task_is_plain_lora(tiny_settings: SettingsFactory) -> None:
    plain = _run(tiny_settings, name="olora", rank=3)
    still = _run(tiny_settings, name="lora_pm", rank=3, perturbation=0.0)
    moved = _run(tiny_settings, name="lora_pm", rank=3)
    names = [name for name in artifact_of(plain, "adapt", 0).tensors if name.startswith("branch/")]
    for name in names:
        assert torch.equal(artifact_of(plain, "adapt", 0).tensors[name], artifact_of(still, "adapt", 0).tensors[name])
    assert any(
        not torch.equal(artifact_of(plain, "adapt", 0).tensors[name], artifact_of(moved, "adapt", 0).tensors[name])
        for name in names
    )
