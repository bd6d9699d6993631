"""SD-LoRA: frozen unit directions whose magnitudes go on being trained, on layers of any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Observation
from loda.methods.sdlora import SdLora, SdLoraSettings
from loda.training import trainable_parameters
from loda.workbench import memory_tensors
from tests.conftest import BackboneFactory, SettingsFactory
from tests.loda.attached import features, fill_up_projections, images
from tests.loda.running import artifact_of, run_all

TARGETS = ["attn.qkv", "mlp.fc1", "mlp.fc2"]  # 32 -> 96, 32 -> 128, 128 -> 32
NO_MOMENTS: Any = None


def _at(position: int) -> Observation:
    return Observation(NO_MOMENTS, position)


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
    method = {"name": "sdlora", "rank": 4, "reduced_ranks": {1: 2}, "absorb": True, "absorb_threshold": 2.0}
    run = run_all(tiny_settings(method={**method, "authors_code": True}, backbone={"target": TARGETS}))
    memory = memory_tensors(artifact_of(run, "consolidate", 2))
    assert all(tensor.shape == (1,) for name, tensor in memory.items() if name.endswith("magnitudes"))


def test_the_directions_of_a_task_that_learned_nothing_stay_finite(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv",))
    method = SdLora(SdLoraSettings(rank=2))
    method.begin_task(backbone, _at(0))
    factors = method.merged(backbone, _at(0), None)
    method.begin_task(backbone, _at(1))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in factors.values())
    assert bool(torch.isfinite(features(backbone, images(2))).all())
