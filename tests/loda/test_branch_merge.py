"""Branches beside linear layers of any shape: attached, trained, merged; afterwards a plain backbone again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.branch import BranchedLinear, attach, detach
from loda.energy import SecondMoment
from loda.errors import ConfigError
from loda.methods.base import Observation
from loda.methods.loda import GAMMA_GENERAL, GAMMA_ISOLATED, Loda, LodaSettings
from loda.moments import LayerMoments, MomentRecorder
from loda.recalibration import recalibration
from loda.training import trainable_parameters
from tests.conftest import ALL_TARGETS, BackboneFactory

TARGETS = [("attn.qkv",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",), ALL_TARGETS]


def _images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _moments(backbone: Backbone, images_BCHW: Tensor) -> LayerMoments:
    modules = {name: backbone.model.get_submodule(name) for name in backbone.layers}
    recorder = MomentRecorder(modules, backbone.layers_by_width, backbone.device)
    with torch.inference_mode():
        backbone.features(images_BCHW)
    recorder.close()
    return recorder.value()


def _fill_up_projections(backbone: Backbone, seed: int = 0, size: float = 0.3) -> None:
    """Stand-in for training: B anywhere but at zero."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for branched in backbone.attached.values():
            for branch in branched.branches.values():
                branch.up.copy_(size * torch.randn(branch.up.shape, generator=draws))


def _second_task(backbone: Backbone, **settings: object) -> tuple[Loda, Observation]:
    """LoDA at the start of its second task, with branches attached."""
    method = Loda(LodaSettings(rank_general=4, rank_isolated=3, **settings))  # type: ignore[arg-type]
    method.old = _moments(backbone, _images(seed=1))
    observation = Observation(_moments(backbone, _images(seed=2) ** 3), position=1)
    method.begin_task(backbone, observation)
    return method, observation


def _features(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        return backbone.features(images_BCHW).clone()


@pytest.mark.parametrize("d_in,d_out", [(6, 6), (5, 15), (20, 5)])
def test_forward_is_base_plus_scaled_branches(d_in: int, d_out: int) -> None:
    draws = torch.Generator().manual_seed(0)
    layer = BranchedLinear(nn.Linear(d_in, d_out, dtype=torch.float64))
    x_BND = torch.randn(3, 4, d_in, generator=draws, dtype=torch.float64)
    expected = x_BND @ layer.base.weight.mT + layer.base.bias
    assert torch.equal(layer(x_BND), layer.base(x_BND))
    for name, rank, scale in (("general", 3, 0.25), ("isolated", 2, 0.5)):
        down_rD = torch.randn(rank, d_in, generator=draws, dtype=torch.float64)
        up_Or = torch.randn(d_out, rank, generator=draws, dtype=torch.float64)
        layer.add(name, down_rD, up_Or, scale=scale, train_down=False)
        expected = expected + scale * (x_BND @ down_rD.mT) @ up_Or.mT
        torch.testing.assert_close(layer(x_BND), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.branches[name].delta(), scale * up_Or @ down_rD, rtol=1e-12, atol=1e-12)


def test_up_projections_start_at_zero_and_change_nothing() -> None:
    layer = BranchedLinear(nn.Linear(5, 8))
    layer.add("general", torch.randn(3, 5), scale=0.25, train_down=False)
    x_BD = torch.randn(4, 5)
    torch.testing.assert_close(layer(x_BD), layer.base(x_BD), rtol=0, atol=0)
    assert not layer.branches["general"].up.detach().any()


def test_a_branch_keeps_its_own_copy_of_what_it_is_given() -> None:
    down_rD, up_Or = torch.ones(2, 5), torch.ones(8, 2)
    layer = BranchedLinear(nn.Linear(5, 8))
    layer.add("lora", down_rD, up_Or, scale=1.0, train_down=True)
    down_rD.zero_(), up_Or.zero_()
    assert float(layer.branches["lora"].delta().detach().min()) == 2


def test_attach_and_detach_leave_the_model_as_it_was(tiny_backbone: BackboneFactory) -> None:
    model = tiny_backbone().model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    attached = attach(model, ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
    assert isinstance(model.get_submodule("blocks.1.mlp.fc2"), BranchedLinear)
    detach(model, attached)
    assert [type(module) for module in model.modules()] == modules
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", TARGETS, ids="+".join)
def test_merging_without_recalibration_keeps_the_outputs(
    target: tuple[str, ...], tiny_backbone: BackboneFactory
) -> None:
    backbone, images_BCHW = tiny_backbone(target), _images(seed=3)
    plain = _features(backbone, images_BCHW)
    method, observation = _second_task(backbone, recalibration="none")
    torch.testing.assert_close(_features(backbone, images_BCHW), plain, rtol=0, atol=1e-6)  # B = 0 at the start
    _fill_up_projections(backbone)
    attached = _features(backbone, images_BCHW)
    factors = method.merged(backbone, observation, _moments(backbone, images_BCHW))
    backbone.detach()
    backbone.load_merges([factors])
    merged = _features(backbone, images_BCHW)
    assert float((attached - plain).abs().max()) > 1e-2  # the branches do something
    torch.testing.assert_close(merged, attached, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS, ids="+".join)
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_recalibrated_merge_is_the_written_formula(
    kind: str, target: tuple[str, ...], tiny_backbone: BackboneFactory
) -> None:
    backbone = tiny_backbone(target)
    method, observation = _second_task(backbone, recalibration=kind)
    _fill_up_projections(backbone)
    adapted = _moments(backbone, _images(seed=2) ** 3)
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
    _, observation = _second_task(backbone)
    _fill_up_projections(backbone)
    adapted = _moments(backbone, _images(seed=2) ** 3)
    names = backbone.layers_by_width[32]
    first, last = names.index("blocks.0.attn.qkv"), names.index("blocks.1.attn.qkv")
    torch.testing.assert_close(adapted.values[32][first], observation.moments.values[32][first])
    assert float((adapted.values[32][last] - observation.moments.values[32][last]).abs().max()) > 1e-2


def test_nothing_is_left_of_the_branches_and_frozen_tensors_keep_their_bits(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv", "mlp.fc2"))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    method, observation = _second_task(backbone)
    _fill_up_projections(backbone)
    factors = method.merged(backbone, observation, _moments(backbone, _images()))
    backbone.detach()
    backbone.load_merges([factors])
    assert backbone.attached == {} and not any(isinstance(m, BranchedLinear) for m in backbone.model.modules())
    after = backbone.model.state_dict()
    assert list(after) == list(before)
    adapted = {f"{layer}.weight" for layer in backbone.layers}
    assert len(adapted) == 4
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (name in adapted), name
    backbone.load_merges([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


def test_merged_weights_do_not_depend_on_where_a_run_is_taken_up(tiny_backbone: BackboneFactory) -> None:
    straight, resumed = tiny_backbone(), tiny_backbone()
    draws = torch.Generator().manual_seed(5)
    merges = [
        {
            f"{name}.{part}": torch.randn(shape, generator=draws)
            for name, (d_in, d_out) in straight.widths.items()
            for part, shape in (("up", (d_out, 3)), ("down", (3, d_in)))
        }
        for _ in range(3)
    ]
    straight.load_merges(merges)
    for count in (1, 3, 2, 0, 3):
        resumed.load_merges(merges[:count])
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
    name = straight.layers[0]
    expected = tiny_backbone().original[name].double()
    for factors in merges:
        expected += factors[f"{name}.up"].double() @ factors[f"{name}.down"].double()
    torch.testing.assert_close(straight.original[name].double() + expected - straight.original[name], expected)
    torch.testing.assert_close(straight.model.get_submodule(name).weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_down_projections_have_orthonormal_rows_over_root_three_and_are_frozen(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    _second_task(backbone)
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
    method, observation = _second_task(backbone)
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
    observation = Observation(_moments(backbone, _images()), position=0)
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
    _fill_up_projections(backbone)
    attached = _features(backbone, _images(seed=3))
    factors = method.merged(backbone, observation, None)
    backbone.detach()
    backbone.load_merges([factors])
    torch.testing.assert_close(_features(backbone, _images(seed=3)), attached, rtol=0, atol=1e-5)


def test_energy_thresholds_give_layers_their_own_ranks(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = Loda(LodaSettings(rank_general=32, rank_isolated=32, energy_general=0.95, energy_isolated=0.9))
    method.old = _moments(backbone, _images(seed=1))
    method.begin_task(backbone, Observation(_moments(backbone, _images(seed=2) ** 3), position=1))
    for kind in ("general", "isolated"):
        ranks = method.facts[f"rank_{kind}"]
        assert set(ranks) == set(backbone.layers) and len(set(ranks.values())) > 1
        for name, rank in ranks.items():
            assert backbone.attached[name].branches[kind].down.shape[0] == rank
            assert backbone.attached[name].branches[kind].up.shape == (backbone.widths[name][1], rank)
        shares = {"general": 0.95, "isolated": 0.9}
        held = method.facts[f"energy_{kind}"]
        assert all(held[name] >= shares[kind] - 1e-9 or ranks[name] == 32 for name in ranks)
    _features(backbone, _images())  # branches of unlike ranks run


def test_trained_branches_can_be_attached_again(tiny_backbone: BackboneFactory) -> None:
    backbone, again = tiny_backbone(), tiny_backbone()
    _second_task(backbone)
    _fill_up_projections(backbone)
    again.attach_tensors(backbone.branch_tensors(), backbone.branch_scales())
    assert torch.equal(_features(backbone, _images()), _features(again, _images()))


def test_reattaching_does_not_depend_on_the_order_of_the_stored_tensors(tiny_backbone: BackboneFactory) -> None:
    """Files keep tensors in an order of their own; the bits of the outputs must not follow it."""
    backbone, again = tiny_backbone(), tiny_backbone()
    _second_task(backbone)
    _fill_up_projections(backbone)
    stored = dict(reversed(list(backbone.branch_tensors().items())))
    again.attach_tensors(stored, backbone.branch_scales())
    assert torch.equal(_features(backbone, _images()), _features(again, _images()))


def test_a_merge_after_reattaching_is_the_merge_of_what_was_trained(tiny_backbone: BackboneFactory) -> None:
    """Up- and down-projections stay in step whatever the order in which a file gives the branches back."""
    backbone = tiny_backbone()
    method, observation = _second_task(backbone)
    _fill_up_projections(backbone)
    adapted = _moments(backbone, _images(seed=2) ** 3)
    straight = method.merged(backbone, observation, adapted)
    stored, scales = backbone.branch_tensors(), backbone.branch_scales()
    for names in (sorted(stored), sorted(stored, reverse=True)):
        backbone.attach_tensors({name: stored[name] for name in names}, scales)
        again = method.merged(backbone, observation, adapted)
        for layer in backbone.layers:
            one, two = (f[f"{layer}.up"] @ f[f"{layer}.down"] for f in (straight, again))
            torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


def test_all_targets_without_a_layer_are_named(tiny_backbone: BackboneFactory) -> None:
    with pytest.raises(ConfigError, match=r"no linear layer ends in \['attn.key', 'fc9'\]") as caught:
        tiny_backbone(("attn.qkv", "attn.key", "fc9"))
    assert "mlp.fc1" in str(caught.value)


def test_memory_counts_each_finished_task_old_count_times(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    first, second = _moments(backbone, _images(seed=1)), _moments(backbone, _images(seed=2))
    observation = Observation(first, 0)
    assert SecondMoment(32).layers == 1
    for count in (1.0, 2.0):
        method = Loda(LodaSettings(old_count=count))
        method.end_task(observation, None, first)
        method.end_task(observation, None, second)
        assert method.old is not None
        for width in first.values:
            torch.testing.assert_close(method.old.values[width], count * (first.values[width] + second.values[width]))
