"""Branches beside linear layers of any shape: attached, merged, gone; afterwards a plain backbone again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loda.branch import BranchedLinear, attach, detach
from loda.errors import ConfigError
from tests.conftest import BackboneFactory
from tests.loda.attached import TARGETS, features, fill_up_projections, images, moments, second_task


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
    backbone, images_BCHW = tiny_backbone(target), images(seed=3)
    plain = features(backbone, images_BCHW)
    method, observation = second_task(backbone, recalibration="none")
    torch.testing.assert_close(features(backbone, images_BCHW), plain, rtol=0, atol=1e-6)  # B = 0 at the start
    fill_up_projections(backbone)
    attached = features(backbone, images_BCHW)
    factors = method.merged(backbone, observation, moments(backbone, images_BCHW))
    backbone.detach()
    backbone.load_merges([factors])
    merged = features(backbone, images_BCHW)
    assert float((attached - plain).abs().max()) > 1e-2  # the branches do something
    torch.testing.assert_close(merged, attached, rtol=0, atol=1e-5)


def test_nothing_is_left_of_the_branches_and_frozen_tensors_keep_their_bits(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv", "mlp.fc2"))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    method, observation = second_task(backbone)
    fill_up_projections(backbone)
    factors = method.merged(backbone, observation, moments(backbone, images()))
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


def test_trained_branches_can_be_attached_again(tiny_backbone: BackboneFactory) -> None:
    backbone, again = tiny_backbone(), tiny_backbone()
    second_task(backbone)
    fill_up_projections(backbone)
    again.attach_tensors(backbone.branch_tensors(), backbone.branch_scales())
    assert torch.equal(features(backbone, images()), features(again, images()))


def test_reattaching_does_not_depend_on_the_order_of_the_stored_tensors(tiny_backbone: BackboneFactory) -> None:
    """Files keep tensors in an order of their own; the bits of the outputs must not follow it."""
    backbone, again = tiny_backbone(), tiny_backbone()
    second_task(backbone)
    fill_up_projections(backbone)
    stored = dict(reversed(list(backbone.branch_tensors().items())))
    again.attach_tensors(stored, backbone.branch_scales())
    assert torch.equal(features(backbone, images()), features(again, images()))


def test_a_merge_after_reattaching_is_the_merge_of_what_was_trained(tiny_backbone: BackboneFactory) -> None:
    """Up- and down-projections stay in step whatever the order in which a file gives the branches back."""
    backbone = tiny_backbone()
    method, observation = second_task(backbone)
    fill_up_projections(backbone)
    adapted = moments(backbone, images(seed=2) ** 3)
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
