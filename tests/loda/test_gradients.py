"""Gradients of a task's loss by layer, against autograd and a loop over images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.distributed import WorkerGroup
from loda.gradients import LossGradients
from loda.head import CosineHead
from tests.conftest import BackboneFactory

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def _passes(backbone: Backbone, batch_size: int = 3) -> LossGradients:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(LABELS), 3, 32, 32), generator=draws, dtype=torch.uint8)
    head = CosineHead(torch.randn(3, 32, generator=draws))
    return LossGradients(backbone, head, images, LABELS, 10.0, 0.2, batch_size, WorkerGroup())


def _with_branches(backbone: Backbone) -> None:
    backbone.attach()
    draws = torch.Generator().manual_seed(1)
    for branched in backbone.attached.values():
        d_in, d_out = branched.base.in_features, branched.base.out_features
        down_rD, up_Or = torch.randn(2, d_in, generator=draws) / 9, torch.randn(d_out, 2, generator=draws) / 9
        branched.add("lora", down_rD, up_Or, scale=0.5, train_down=True)


def _by_autograd(backbone: Backbone, passes: LossGradients, rows: list[int]) -> dict[str, Tensor]:
    """Of the mean loss of some images, written out with the margin."""
    weights = {name: backbone._linear(name).weight for name in backbone.layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    features_BD = backbone.features(backbone.normalize(passes.images_NCHW[rows].float() / 255))
    cosines_BC = passes.head(features_BD)
    shifted_BC = 10.0 * (cosines_BC - 0.2 * torch.nn.functional.one_hot(LABELS[rows], 3))
    loss = -shifted_BC.log_softmax(-1)[torch.arange(len(rows)), LABELS[rows]].mean()
    found = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: gradient.double() for name, gradient in zip(weights, found, strict=True)}


@pytest.mark.parametrize("attached", [False, True])
def test_mean_gradients_are_autograds(attached: bool, tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    if attached:
        _with_branches(backbone)
    passes = _passes(backbone)
    expected = _by_autograd(backbone, passes, list(range(len(LABELS))))
    for name, gradient in passes.mean().items():
        assert tuple(gradient.shape) == backbone.widths[name][::-1]
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    assert not any(parameter.requires_grad for n, parameter in backbone.model.named_parameters() if "branches" not in n)


@pytest.mark.parametrize("attached", [False, True])
def test_squared_gradients_are_the_mean_over_images_of_squares(attached: bool, tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    if attached:
        _with_branches(backbone)
    passes = _passes(backbone)
    slow = [_by_autograd(backbone, passes, [row]) for row in range(len(LABELS))]
    for name, squares in passes.squared().items():
        expected = sum(one[name].square() for one in slow) / len(LABELS)
        torch.testing.assert_close(squares, expected, rtol=1e-3, atol=1e-8)


def test_batches_do_not_matter(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    one, two = _passes(backbone, 2).mean(), _passes(backbone, 7).mean()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-4, atol=1e-7)
