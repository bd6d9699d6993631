"""The rank-1 expert pool: who works, who learns, what is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Observation
from loda.methods.expert_pool import ClassTokenRouter, ExpertPool, ExpertPoolSettings
from tests.conftest import ALL_TARGETS, BackboneFactory, SettingsFactory
from tests.loda.attached import fill_up_projections, images, moments
from tests.loda.running import artifact_of, run_all


def _pool(backbone: Backbone, **settings: Any) -> ExpertPool:
    method = ExpertPool(ExpertPoolSettings(**settings))
    method.begin_task(backbone, Observation(moments(backbone, images()), 0))
    fill_up_projections(backbone)
    return method


def _working(backbone: Backbone) -> dict[str, Tensor]:
    found = {}
    for name, branched in backbone.attached.items():
        assert isinstance(branched.weigh, ClassTokenRouter)
        found[name] = branched.weigh.working_1K[0]
    return found


def test_a_pass_is_that_of_the_sum_over_the_experts_voted_for(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    _pool(backbone, rank=12, active=5, scale=0.5)
    for name, branched in backbone.attached.items():
        d_in = backbone.widths[name][0]
        x_BND = torch.randn(6, 7, d_in, generator=torch.Generator().manual_seed(1))
        found = branched(x_BND)
        router = branched.weigh
        assert isinstance(router, ClassTokenRouter)
        votes = [0] * 12
        for image in range(6):
            scores = [float(router.weight[k] @ x_BND[image, 0]) for k in range(12)]
            for k in sorted(range(12), key=lambda k: -scores[k])[:5]:
                votes[k] += 1
        chosen = sorted(range(12), key=lambda k: -votes[k])[:5]
        assert sorted(chosen) == router.working_1K[0].nonzero().flatten().tolist()
        delta_OD = torch.zeros_like(branched.base.weight)
        for k in chosen:
            branch = branched.branches[f"expert{k}"]
            delta_OD += 0.5 * torch.outer(branch.up[:, 0], branch.down[0])
        assert int(torch.linalg.matrix_rank(delta_OD)) == 5
        torch.testing.assert_close(found, branched.base(x_BND) + x_BND @ delta_OD.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router_grad", ["none", "ste"])
def test_experts_that_are_not_chosen_get_no_gradient_at_all(router_grad: str, tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = _pool(backbone, rank=12, active=8, router_grad=router_grad)
    method.past = {n: torch.randn(size[1], 4).div(size[1] ** 0.5) for n, size in backbone.widths.items()}
    features_BD = backbone.features(images())
    penalty = method.penalty(backbone)
    assert penalty is not None
    (features_BD.square().sum() + penalty).backward()
    for name, working_K in _working(backbone).items():
        assert int(working_K.sum()) == 8
        for index, branch in enumerate(backbone.attached[name].branches.values()):
            assert branch.up.grad is not None and branch.down.grad is not None
            assert bool(branch.up.grad.any()) == bool(working_K[index])
            assert bool(branch.down.grad.any()) == bool(working_K[index])
        router = backbone.attached[name].weigh
        assert isinstance(router, ClassTokenRouter)
        assert (router.weight.grad is not None and bool(router.weight.grad.any())) == (router_grad == "ste")


def test_the_straight_through_router_changes_no_output(tiny_backbone: BackboneFactory) -> None:
    outputs = []
    for router_grad in ("none", "ste"):
        backbone = tiny_backbone()
        _pool(backbone, router_grad=router_grad)
        outputs.append(backbone.features(images()).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_the_penalty_is_zero_exactly_when_columns_are_orthogonal_to_the_past(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("mlp.fc2",))
    method = _pool(backbone, rank=3, active=3, orthogonality=0.5)
    assert method.penalty(backbone) is None  # nothing in the past yet
    method.past = {name: torch.eye(32)[:, 5:7] for name in backbone.layers}
    expected = 0.0
    with torch.no_grad():
        for branched in backbone.attached.values():
            up_OK = torch.cat([branch.up for branch in branched.branches.values()], dim=1)
            expected += 0.5 * float(up_OK[5:7].norm())
    before = method.penalty(backbone)
    assert before is not None and float(before.detach()) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        for branched in backbone.attached.values():
            for branch in branched.branches.values():
                branch.up[5:7] = 0
    penalty = method.penalty(backbone)
    assert penalty is not None and float(penalty.detach()) == 0
    penalty.backward()
    assert all(
        not bool(torch.isnan(b.up.grad).any()) for br in backbone.attached.values() for b in br.branches.values()
    )  # type: ignore[arg-type]


def test_the_most_used_experts_are_merged_and_remembered(tiny_settings: SettingsFactory) -> None:
    method = {"name": "expert_pool", "rank": 6, "active": 3, "merged": 2, "scale": 0.5}
    backbone = {"target": list(ALL_TARGETS)}
    run = run_all(tiny_settings(method=method, backbone=backbone))
    for position in range(3):
        trained, state = artifact_of(run, "adapt", position), artifact_of(run, "consolidate", position)
        for layer, kept in state.meta["facts"]["merged_experts"].items():
            usage = trained.tensors[f"trained/{layer}.usage"].tolist()
            assert sum(usage) == 3 * 2 * 2  # three experts a batch, two batches an epoch, two epochs
            rest = [count for index, count in enumerate(usage) if index not in kept]
            assert len(kept) == 2 and min(usage[index] for index in kept) >= max(rest)
            for column, index in enumerate(kept):
                up_O = trained.tensors[f"branch/{layer}/expert{index}/up"][:, 0]
                assert torch.equal(state.tensors[f"merge/{layer}.up"][:, column], 0.5 * up_O)
            past_OK = state.tensors[f"memory/{layer}"]
            assert past_OK.shape[1] == 2 * (position + 1)
            torch.testing.assert_close(past_OK.norm(dim=0), torch.ones(2 * (position + 1)))
