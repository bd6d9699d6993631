"""SD-LoRA, O-LoRA, SLAO and LoRA-P&M: what each does with one LoRA pair a task, on layers of any shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Batch, Learner, Observation
from loda.methods.lora_pm import LoraPm, LoraPmSettings
from loda.methods.olora import OLora, OLoraSettings
from loda.methods.sdlora import Directions, SdLora, SdLoraSettings
from loda.methods.slao import Slao, SlaoSettings, orthonormal_rows
from loda.training import trainable_parameters
from loda.workbench import memory_tensors, merge_factors
from tests.conftest import BackboneFactory, SettingsFactory
from tests.loda.attached import features, fill_up_projections, images
from tests.loda.running import Run, artifact_of, run_all

TARGETS = ["attn.qkv", "mlp.fc1", "mlp.fc2"]  # 32 -> 96, 32 -> 128, 128 -> 32
NO_MOMENTS: Any = None


def _run(tiny_settings: SettingsFactory, training: dict[str, Any] | None = None, **method: Any) -> Run:
    return run_all(tiny_settings(method=method, backbone={"target": TARGETS}, training=training or {}))


def _at(position: int) -> Observation:
    return Observation(NO_MOMENTS, position)


def _delta(tensors: dict[str, Tensor], layer: str, scale: float = 1.0) -> Tensor:
    return scale * tensors[f"branch/{layer}/lora/up"].double() @ tensors[f"branch/{layer}/lora/down"].double()


# SD-LoRA


def _after_tasks(backbone: Backbone, tasks: int, **settings: Any) -> SdLora:
    """SD-LoRA with some tasks behind it, trained by chance."""
    method = SdLora(SdLoraSettings(rank=3, **settings))
    for position in range(tasks):
        method.begin_task(backbone, _at(position))
        draws = torch.Generator().manual_seed(position)
        with torch.no_grad():
            for branched in backbone.attached.values():
                for name, branch in branched.branches.items():
                    assert isinstance(branch.scale, Tensor)
                    branch.scale.mul_(1 + 0.3 * torch.rand((), generator=draws))
                    if name == "new":
                        branch.up.copy_(0.2 * torch.randn(branch.up.shape, generator=draws))
        method.merged(backbone, _at(position), None)
    backbone.detach()
    return method


def _magnitudes(backbone: Backbone) -> list[Tensor]:
    return [p for p in trainable_parameters(backbone) if p.ndim == 0]


@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_sdlora_trains_one_magnitude_a_direction_and_all_of_them_move(
    tasks: int, tiny_backbone: BackboneFactory
) -> None:
    backbone = tiny_backbone()
    method = _after_tasks(backbone, tasks)
    method.begin_task(backbone, _at(tasks))
    magnitudes = _magnitudes(backbone)
    assert len(magnitudes) == (tasks + 1) * len(backbone.layers)
    for branched in backbone.attached.values():
        for name, branch in branched.branches.items():
            assert branch.up.requires_grad == branch.down.requires_grad == (name == "new")
            with torch.no_grad():
                if name == "new":
                    branch.up.normal_(generator=torch.Generator().manual_seed(3))
    loss = (backbone.features(images(4)) * torch.linspace(-1, 1, 32)).sum()
    for gradient in torch.autograd.grad(loss, magnitudes):
        assert float(gradient.abs()) > 0


def test_sdlora_past_directions_have_norm_one(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    _after_tasks(backbone, 2).begin_task(backbone, _at(2))
    for branched in backbone.attached.values():
        for index in range(2):
            branch = branched.branches[f"past{index}"]
            assert float((branch.up.double() @ branch.down.double()).norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("authors_code", [False, True])
def test_sdlora_rescaling_a_frozen_pair_changes_nothing(authors_code: bool, tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = _after_tasks(backbone, 2, authors_code=authors_code)
    method.begin_task(backbone, _at(2))
    before = features(backbone, images(4))
    for past in method.past.values():
        past.pairs = [(0.2 * up_Or, 7 * down_rD) for up_Or, down_rD in past.pairs]
    method.begin_task(backbone, _at(2))
    torch.testing.assert_close(features(backbone, images(4)), before, rtol=1e-4, atol=1e-5)


def test_sdlora_begins_with_the_outputs_that_it_ended_with_and_the_authors_code_does_not(
    tiny_backbone: BackboneFactory,
) -> None:
    for authors_code in (False, True):
        backbone = tiny_backbone()
        method = _after_tasks(backbone, 1, authors_code=authors_code)
        method.begin_task(backbone, _at(1))
        fill_up_projections(backbone)
        factors = method.merged(backbone, _at(1), None)
        backbone.detach()
        backbone.load_merges([factors])
        ended = features(backbone, images(4))
        backbone.load_merges([])
        method.begin_task(backbone, _at(2))
        began = features(backbone, images(4))
        assert torch.allclose(began, ended, rtol=1e-4, atol=1e-4) is not authors_code
        if authors_code:
            assert all(float(alpha.detach()) == pytest.approx(0.8) for alpha in _magnitudes(backbone))
            branch = backbone.attached[backbone.layers[0]].branches["past0"]
            assert float(branch.up.norm() * branch.down.norm()) == pytest.approx(1, abs=1e-4)


def test_sdlora_ranks_fall_with_the_tasks_if_asked(tiny_backbone: BackboneFactory) -> None:
    method = SdLora(SdLoraSettings(rank=10, reduced_ranks={4: 8, 8: 6}))
    assert [method.rank_at(position) for position in range(10)] == [10] * 4 + [8] * 4 + [6] * 2
    backbone = tiny_backbone(("mlp.fc1",))
    method = SdLora(SdLoraSettings(rank=5, reduced_ranks={1: 2}))
    ranks = []
    for position in range(2):
        method.begin_task(backbone, _at(position))
        fill_up_projections(backbone, seed=position)
        ranks.append(len(backbone.attached[backbone.layers[0]].branches["new"].down))
        factors = method.merged(backbone, _at(position), None)
    assert ranks == [5, 2] and factors[f"{backbone.layers[0]}.down"].shape == (7, 32)


@pytest.mark.parametrize("spanned", [True, False])
def test_sdlora_absorbs_a_direction_that_the_old_ones_span(spanned: bool, tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("mlp.fc2",))
    method = _after_tasks(backbone, 2, absorb=True)
    before = {name: list(past.magnitudes) for name, past in method.past.items()}
    method.begin_task(backbone, _at(2))
    added = {}
    for name, branched in backbone.attached.items():
        new, first = branched.branches["new"], branched.branches["past0"]
        with torch.no_grad():
            if spanned:  # three times the first unit direction, with a speck of noise
                new.down.copy_(first.down)
                new.up.copy_(
                    3 * first.up + 1e-4 * torch.randn(new.up.shape, generator=torch.Generator().manual_seed(1))
                )
            else:
                new.up.normal_(generator=torch.Generator().manual_seed(2))
        added[name] = (new.scaled_up() @ new.down.detach()).double()
    old = {
        name: sum(float(b.number) * (b.up @ b.down).double() for n, b in branched.branches.items() if n != "new")
        for name, branched in backbone.attached.items()
    }
    factors = method.merged(backbone, _at(2), None)
    for name, past in method.past.items():
        assert len(past.pairs) == len(past.magnitudes) == (2 if spanned else 3)
        merged_OD = factors[f"{name}.up"].double() @ factors[f"{name}.down"].double()
        torch.testing.assert_close(merged_OD, (old[name] + added[name]).detach(), rtol=0, atol=5e-3)
        if spanned:
            assert past.magnitudes[0] == pytest.approx(before[name][0] + 3, abs=0.01)
            assert past.magnitudes[1] == pytest.approx(before[name][1], abs=0.01)
            assert method.facts["residual"][name] < 9e-4
        else:
            assert method.facts["residual"][name] > 0.5


def test_sdloras_residual_is_that_of_least_squares_on_whole_matrices(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv",))
    method = _after_tasks(backbone, 3, absorb=True)
    method.begin_task(backbone, _at(3))
    expected = {}
    for name, branched in backbone.attached.items():
        with torch.no_grad():  # not orthogonal to the first
            branched.branches["new"].down.copy_(branched.branches["past0"].down)
            branched.branches["new"].up.normal_(generator=torch.Generator().manual_seed(9))
            branched.branches["new"].up.add_(20 * branched.branches["past0"].up)
        units = torch.stack(
            [(b.up @ b.down).detach().double().flatten() for n, b in branched.branches.items() if n != "new"], dim=1
        )
        new = (branched.branches["new"].up @ branched.branches["new"].down).detach().double().flatten()
        new = new / new.norm()
        fit = torch.linalg.lstsq(units, new[:, None]).solution
        expected[name] = float((units @ fit - new[:, None]).square().sum())
        assert 0.01 < expected[name] < 0.99
    method.merged(backbone, _at(3), None)
    assert method.facts["residual"] == pytest.approx(expected, abs=1e-6)


def test_sdlora_runs_with_all_its_options(tiny_settings: SettingsFactory) -> None:
    run = _run(
        tiny_settings, name="sdlora", rank=4, reduced_ranks={1: 2}, absorb=True, absorb_threshold=2.0, authors_code=True
    )
    memory = memory_tensors(artifact_of(run, "consolidate", 2))
    assert all(tensor.shape == (1,) for name, tensor in memory.items() if name.endswith("magnitudes"))


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


def test_the_directions_of_a_task_that_learned_nothing_stay_finite(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv",))
    method = SdLora(SdLoraSettings(rank=2))
    method.begin_task(backbone, _at(0))
    factors = method.merged(backbone, _at(0), None)
    method.begin_task(backbone, _at(1))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in factors.values())
    assert bool(torch.isfinite(features(backbone, images(2))).all())
    assert isinstance(next(iter(method.past.values())), Directions)
