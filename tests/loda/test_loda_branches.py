"""What LoDA attaches to each layer, and what of it is merged and remembered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from loda.branch import BranchedLinear
from loda.methods.base import Observation
from loda.methods.loda import GAMMA_GENERAL, GAMMA_ISOLATED, Loda, LodaSettings
from loda.recalibration import recalibration
from loda.training import trainable_parameters
from tests.conftest import BackboneFactory
from tests.loda.attached import TARGETS, features, fill_up_projections, images, moments, second_task


@pytest.mark.parametrize("target", TARGETS, ids="+".join)
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_recalibrated_merge_is_the_written_formula(
    kind: str, target: tuple[str, ...], tiny_backbone: BackboneFactory
) -> None:
    backbone = tiny_backbone(target)
    method, observation = second_task(backbone, recalibration=kind)
    fill_up_projections(backbone)
    adapted = moments(backbone, images(seed=2) ** 3)
    factors = method.merged(backbone, observation, adapted)
    assert method.old is not None
    for width, names in backbone.layers_by_width.items():
        for index, name in enumerate(names):
            general, isolated = (backbone.attached[name].branches[kind] for kind in ("general", "isolated"))
            A_G, B_G, A_I, B_I = (t.detach().double() for t in (general.down, general.up, isolated.down, isolated.up))
            L_rr = recalibration(A_G, method.old.values[width][index], adapted.values[width][index], 3.0, kind)  # type: ignore[arg-type]
            delta = GAMMA_GENERAL * B_G @ L_rr @ A_G + GAMMA_ISOLATED * B_I @ A_I
            ours = factors[f"{name}.up"].double() @ factors[f"{name}.down"].double()
            torch.testing.assert_close(ours, delta, rtol=1e-4, atol=1e-6)
            assert float((L_rr - torch.eye(len(L_rr))).norm()) > 0.1  # Λ is felt


def test_recalibration_reads_moments_with_the_branches_attached(tiny_backbone: BackboneFactory) -> None:
    """A branch in block 0 changes what block 1 sees: the second pass is not the first."""
    backbone = tiny_backbone()
    _, observation = second_task(backbone)
    fill_up_projections(backbone)
    adapted = moments(backbone, images(seed=2) ** 3)
    names = backbone.layers_by_width[32]
    first, last = names.index("blocks.0.attn.qkv"), names.index("blocks.1.attn.qkv")
    torch.testing.assert_close(adapted.values[32][first], observation.moments.values[32][first])
    assert float((adapted.values[32][last] - observation.moments.values[32][last]).abs().max()) > 1e-2


def test_down_projections_have_orthonormal_rows_over_root_three_and_are_frozen(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    second_task(backbone)
    for name, branched in backbone.attached.items():
        assert {k: float(b.scale) for k, b in branched.branches.items()} == {"general": 0.25, "isolated": 0.5}
        for branch in branched.branches.values():
            rank = branch.down.shape[0]
            torch.testing.assert_close(branch.down @ branch.down.mT, torch.eye(rank) / 3, rtol=0, atol=1e-6)
            assert not branch.down.requires_grad and branch.up.requires_grad, name
            assert not branch.up.detach().any()
    trainable = sum(p.numel() for p in trainable_parameters(backbone))
    assert trainable == sum(d_out * (4 + 3) for _, d_out in backbone.widths.values())


def test_the_published_parameter_count_on_vit_b16() -> None:
    """2 · 2304 · 32 · 12 = 1.77 M at rank 32: B_G and B_I of twelve fused qkv layers."""
    with torch.device("meta"):
        layer = BranchedLinear(nn.Linear(768, 2304).requires_grad_(False))
        layer.add("general", torch.zeros(32, 768), scale=0.25, train_down=False)
        layer.add("isolated", torch.zeros(32, 768), scale=0.5, train_down=False)
    assert 12 * sum(p.numel() for p in layer.parameters() if p.requires_grad) == 1_769_472


def test_subspaces_are_those_of_the_layer_they_sit_on(tiny_backbone: BackboneFactory) -> None:
    """Layers of two widths are decomposed in batches: each must get its own."""
    backbone = tiny_backbone()
    method, observation = second_task(backbone)
    assert method.old is not None
    for width, names in backbone.layers_by_width.items():
        for index, name in enumerate(names):
            branches = backbone.attached[name].branches
            old, new = method.old.values[width][index], observation.moments.values[width][index]
            U_G = math.sqrt(3) * branches["general"].down.double().mT
            values_D = torch.linalg.eigvalsh(old + new)
            torch.testing.assert_close((U_G.mT @ (old + new) @ U_G).trace(), values_D[-4:].sum(), rtol=1e-5, atol=0)
            U_I = math.sqrt(3) * branches["isolated"].down.double().mT
            ridged = old + method.facts["ridge"][name] * torch.eye(width, dtype=torch.float64)
            factor = torch.linalg.cholesky(ridged)
            half = torch.linalg.solve_triangular(factor, new, upper=False)
            pencil_D = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
            ratio = torch.linalg.solve(U_I.mT @ ridged @ U_I, U_I.mT @ new @ U_I).trace()
            torch.testing.assert_close(ratio, pencil_D[-3:].sum(), rtol=1e-2, atol=0)


def test_the_first_task_trains_one_branch_with_both_factors(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = Loda(LodaSettings(rank_general=4, rank_isolated=3))
    observation = Observation(moments(backbone, images()), position=0)
    method.begin_task(backbone, observation)
    for width, names in backbone.layers_by_width.items():
        for index, name in enumerate(names):
            branches = backbone.attached[name].branches
            assert list(branches) == ["general"]
            assert branches["general"].down.requires_grad and branches["general"].up.requires_grad
            U_Dr = math.sqrt(3) * branches["general"].down.detach().double().mT
            S_DD = observation.moments.values[width][index]
            torch.testing.assert_close(
                (U_Dr.mT @ S_DD @ U_Dr).trace(), torch.linalg.eigvalsh(S_DD)[-4:].sum(), rtol=1e-5, atol=0
            )
    fill_up_projections(backbone)
    attached = features(backbone, images(seed=3))
    factors = method.merged(backbone, observation, None)
    backbone.detach()
    backbone.load_merges([factors])
    torch.testing.assert_close(features(backbone, images(seed=3)), attached, rtol=0, atol=1e-5)


def test_energy_thresholds_give_layers_their_own_ranks(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = Loda(LodaSettings(rank_general=32, rank_isolated=32, energy_general=0.95, energy_isolated=0.9))
    method.old = moments(backbone, images(seed=1))
    method.begin_task(backbone, Observation(moments(backbone, images(seed=2) ** 3), position=1))
    for kind in ("general", "isolated"):
        ranks = method.facts[f"rank_{kind}"]
        assert set(ranks) == set(backbone.layers) and len(set(ranks.values())) > 1
        for name, rank in ranks.items():
            assert backbone.attached[name].branches[kind].down.shape[0] == rank
            assert backbone.attached[name].branches[kind].up.shape == (backbone.widths[name][1], rank)
        shares = {"general": 0.95, "isolated": 0.9}
        held = method.facts[f"energy_{kind}"]
        assert all(held[name] >= shares[kind] - 1e-9 or ranks[name] == 32 for name in ranks)
    features(backbone, images())  # branches of unlike ranks run


def test_memory_counts_each_finished_task_old_count_times(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    first, second = moments(backbone, images(seed=1)), moments(backbone, images(seed=2))
    observation = Observation(first, 0)
    for count in (1.0, 2.0):
        method = Loda(LodaSettings(old_count=count))
        method.end_task(observation, None, first)
        method.end_task(observation, None, second)
        assert method.old is not None
        for width in first.values:
            torch.testing.assert_close(method.old.values[width], count * (first.values[width] + second.values[width]))
