"""The fused node against the graph that autograd builds from the same products, to the bit; what is left out of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loda.branch import BranchedLinear
from loda.distributed import WorkerGroup
from loda.errors import StageError
from loda.gao import _move
from loda.losses import EpochLosses
from tests.conftest import BackboneFactory, SettingsFactory
from tests.loda.attached import fill_up_projections, images, second_task
from tests.loda.running import artifact_of, digests, keys_of, run_all

KINDS = {"general": 0.25, "isolated": 0.5, "third": 1 / 3}


def layer(d_in: int, d_out: int, ranks: Sequence[int], bias: bool, seed: int = 0) -> BranchedLinear:
    draws = torch.Generator().manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    branched = BranchedLinear(base)
    for (name, scale), rank in zip(KINDS.items(), ranks):
        down_rD, up_Or = torch.randn(rank, d_in, generator=draws), torch.randn(d_out, rank, generator=draws)
        branched.add(name, down_rD, up_Or, scale=scale, train_down=False)
    return branched


def written_out(branched: BranchedLinear, x: Tensor) -> Tensor:
    """The form that autograd sees through."""
    branches = list(branched.branches.values())
    down_rD: Tensor = branches[0].down if len(branches) == 1 else torch.cat([branch.down for branch in branches])
    ups = [branch.scale * branch.moved_up() for branch in branches]
    up_Or = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
    return F.linear(x, branched.base.weight, branched.base.bias) + F.linear(F.linear(x, down_rD), up_Or)


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("ranks", [(4,), (4, 3), (16, 16), (1, 5, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 17, 24), (9, 24), (2, 3, 5, 24), (1, 1, 24)])
def test_output_and_gradients_are_those_of_the_written_out_form(
    shape: tuple[int, ...], bias: bool, ranks: tuple[int, ...]
) -> None:
    branched = layer(24, 40, ranks, bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    leaves = [x, *branched.trainable()]
    fused, plain = branched(x), written_out(branched, x)
    assert type(fused.grad_fn).__name__ == "_FusedBranchesBackward" and torch.equal(fused, plain)
    weight = torch.randn(fused.shape, generator=torch.Generator().manual_seed(2))
    assert same(
        torch.autograd.grad((fused * weight).sum(), leaves), torch.autograd.grad((plain * weight).sum(), leaves)
    )


def test_layers_that_share_an_input_add_their_gradients_in_the_same_order() -> None:
    layers = [layer(24, 40, (4, 3), True, seed) for seed in range(4)]
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    fused = sum((own(x) ** 2).sum() for own in layers)
    plain = sum((written_out(own, x) ** 2).sum() for own in layers)
    assert isinstance(fused, Tensor) and isinstance(plain, Tensor)
    assert same(torch.autograd.grad(fused, [x]), torch.autograd.grad(plain, [x]))


def test_an_anchor_is_taken_off_before_the_products() -> None:
    branched = layer(24, 40, (4, 3), True)
    branched.branches["general"].anchor = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    leaves = [x, *branched.trainable()]
    one = torch.autograd.grad(branched(x).square().sum(), leaves)
    assert same(one, torch.autograd.grad(written_out(branched, x).square().sum(), leaves))


def test_a_changed_down_projection_is_stacked_again() -> None:
    branched = layer(24, 40, (4, 3), True)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():  # the stack that this makes must do for training
        first = branched(x)
    branched(x.requires_grad_(True)).sum().backward()
    with torch.no_grad():
        branched.branches["isolated"].down.mul_(2)
    second = branched(x)
    assert not torch.equal(first, second) and torch.equal(second, written_out(branched, x))
    branched.add("third", torch.randn(2, 24), torch.randn(40, 2), scale=1.0, train_down=False)
    assert torch.equal(branched(x), written_out(branched, x))


def test_what_the_node_has_no_gradient_for_takes_the_other_way() -> None:
    branched = layer(24, 40, (4, 3), True)
    branched.branches["general"].down.requires_grad_(True)
    x = torch.randn(3, 24)
    gradients = torch.autograd.grad(branched(x).square().sum(), branched.trainable())
    assert len(gradients) == 3 and all(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("target", [("attn.qkv",), ("mlp.fc2",)])
def test_no_gradient_for_what_is_frozen_and_no_graph_below_the_first_adapted_layer(
    target: tuple[str, ...], tiny_backbone: BackboneFactory
) -> None:
    backbone = tiny_backbone(target)
    second_task(backbone)
    fill_up_projections(backbone)
    wants = {}
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: wants.update({name: output.requires_grad}))
        for name, module in backbone.model.named_modules()
        if not list(module.children()) and isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d)
    ]
    loss = backbone.features(images()).square().sum()
    for handle in handles:
        handle.remove()
    assert not any(wants[name] for name in ("patch_embed.proj", "blocks.0.norm1"))
    assert wants["blocks.0.mlp.fc1"] == (target == ("attn.qkv",))
    assert wants["blocks.1.norm1"] and wants["blocks.1.mlp.fc1"]
    loss.backward()
    trained = {id(tensor) for branched in backbone.attached.values() for tensor in branched.trainable()}
    for name, parameter in backbone.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        assert name.endswith(".up") or parameter.grad is None


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_moves_of_all_tensors_at_once_are_those_of_each_alone(scale: str) -> None:
    draws = torch.Generator().manual_seed(0)
    start = [torch.randn(d, 7, generator=draws) for d in (3, 40, 129)]
    gradients = [torch.randn(tensor.shape, generator=draws) for tensor in start]
    gradients[1] = torch.zeros_like(gradients[1])
    moved = [tensor.clone() for tensor in start]
    _move(moved, gradients, 0.217, scale)  # type: ignore[arg-type]
    for tensor, own, gradient in zip(moved, start, gradients, strict=True):
        length = 0.217 * own.norm() if scale == "relative" else torch.as_tensor(0.217)
        norm = gradient.norm()
        assert torch.equal(tensor, own - gradient * torch.where(norm > 0, length / norm, 0.0))


@pytest.mark.parametrize("waits", [True, False])
def test_the_batch_at_which_training_diverged_is_named_at_once_or_at_the_end(waits: bool) -> None:
    """An accelerator's losses are read once; the message is the same, and names the first batch."""
    losses = EpochLosses(2, 5, torch.device("cpu"), WorkerGroup())
    losses.waits = waits
    message = r"the loss is nan in epoch 3 of 5, batch 2: training diverged; lower training.lr"
    losses.add(torch.tensor(1.0))
    with pytest.raises(StageError, match=message):
        losses.add(torch.tensor(float("nan")))
        assert not waits, "reported when it was added"
        losses.add(torch.tensor(float("inf")))
        losses.mean()


def test_the_mean_loss_is_the_plain_float64_sum_and_later_steps_dont_touch_it() -> None:
    losses, given = EpochLosses(0, 1, torch.device("cpu"), WorkerGroup()), [0.1, 1e16, 0.3, -1e16]
    kept = torch.zeros((), dtype=torch.float64)
    for value in given:
        losses.add(kept.fill_(value))
    total = 0.0
    for value in given:
        total += value
    assert losses.mean() == total / 4


def test_bfloat16_trains_and_ends_near_float32(tiny_settings: SettingsFactory) -> None:
    """Products in bfloat16 over float32 weights: the same run within bfloat16's rounding, and keys of its own."""
    training, head = {"epochs": 6, "lr": 0.002}, {"start": "class_means", "scale": 5.0}
    plain = tiny_settings(training=training, head=head)
    half = tiny_settings(training=training, head=head, compute={"precision": "bfloat16"})
    named = tiny_settings(training=training, head=head, compute={"precision": "float32"})
    assert keys_of(plain) == keys_of(named)
    assert not set(keys_of(plain).values()) & set(keys_of(half).values())
    one, two = run_all(plain), run_all(half)
    assert digests(two) == digests(run_all(half))
    for position in range(2):
        trained, reference = (artifact_of(run, "adapt", position) for run in (two, one))
        assert trained.meta["losses"][-1] < trained.meta["losses"][0]
        assert all(tensor.dtype == torch.float32 for tensor in trained.tensors.values())
        assert trained.meta["losses"] == pytest.approx(reference.meta["losses"], rel=0.05)
        heads = [F.normalize(artifact.tensors["head"], dim=-1) for artifact in (trained, reference)]
        assert float((heads[0] * heads[1]).sum(-1).min()) > 0.99
    seen = artifact_of(two, "observe", 0).tensors
    assert all(seen[name].dtype == torch.float64 for name in seen if name.startswith("moments."))


@pytest.mark.parametrize("method", ["sequential", "gainlora", "expert_pool", "keeplora"])
def test_other_methods_learn_in_bfloat16_too(method: str, tiny_settings: SettingsFactory) -> None:
    training, own = {"epochs": 3, "lr": 0.002}, {"name": method}
    plain = run_all(tiny_settings(method=own, training=training), order=(0, 1))
    half = run_all(tiny_settings(method=own, training=training, compute={"precision": "bfloat16"}), order=(0, 1))
    losses, reference = (artifact_of(run, "adapt", 1).meta["losses"] for run in (half, plain))
    assert losses != reference and losses == pytest.approx(reference, rel=0.05)
