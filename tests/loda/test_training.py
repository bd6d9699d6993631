"""A task's training against a slow loop of its own: schedule, learning rates, momentum, the groups and their moves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from loda.gao import class_halves
from loda.head import random_head_weight
from loda.seeds import generator
from loda.workbench import merge_factors, open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import ORDER, artifact_of, run_all

EPOCHS, BATCH, LR, HEAD_LR, WEIGHT_DECAY, MOMENTUM, SCALE, MARGIN, RHO_MAX = 3, 5, 0.1, 0.05, 1e-2, 0.8, 10.0, 0.1, 0.4


@pytest.mark.parametrize("gao", [True, False])
@pytest.mark.parametrize("position", [0, 1])
def test_training_is_the_written_loop(position: int, gao: bool, tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(
        method={"gao": gao, "rho_max": RHO_MAX},
        training={
            "epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "head_lr": HEAD_LR, "weight_decay": WEIGHT_DECAY,
            "momentum": MOMENTUM, "seed": 5,
        },
        head={"scale": SCALE, "margin": MARGIN},
    )  # fmt: skip
    run = run_all(settings)
    trained = artifact_of(run, "adapt", position).tensors
    bench = open_workbench(settings)
    bench.backbone.load_merges([merge_factors(artifact_of(run, "consolidate", t)) for t in range(position)])
    model, layers = bench.backbone.model, bench.backbone.layers
    names = tuple(bench.tasks[index].classes for index in ORDER[: position + 1])
    rows = bench.indices(names[-1], "train")
    images_NCHW = bench.backbone.normalize(bench.images(rows).float() / 255)
    labels_N = bench.labels(rows, names[-1])

    gammas = {"general": 0.25, "isolated": 0.5} if position else {"general": 0.25}
    down, up = {}, {}
    for layer in layers:
        for kind in gammas:
            stored = trained[f"branch/{layer}/{kind}/down"]
            down[layer, kind] = stored.clone()
            up[layer, kind] = torch.zeros(bench.backbone.widths[layer][1], stored.shape[0])
    if position == 0:  # A is trained as well, from the leading directions of the task
        observed = artifact_of(run, "observe", 0)
        down |= _leading_directions(bench.backbone.layers_by_width, observed.tensors)
    branch = [*up.values(), *(down.values() if position == 0 else ())]
    head_CD = random_head_weight(2, 32, generator(5, "head", *names))
    for tensor in (*branch, head_CD):
        tensor.requires_grad_(True)

    def loss(indices: Tensor) -> Tensor:
        weights = {
            f"{layer}.weight": model.get_submodule(layer).weight
            + sum(gamma * up[layer, kind] @ down[layer, kind] for kind, gamma in gammas.items())
            for layer in layers
        }
        features_BD = functional_call(model, weights, (images_NCHW[indices],))
        cosines_BC = F.normalize(features_BD, dim=1) @ F.normalize(head_CD, dim=1).mT
        return F.cross_entropy(SCALE * (cosines_BC - MARGIN * F.one_hot(labels_N[indices], 2)), labels_N[indices])

    velocity = [torch.zeros_like(tensor) for tensor in (*branch, head_CD)]

    def step(gradients: tuple[Tensor, ...], epoch: int) -> None:
        share = 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        with torch.no_grad():
            for tensor, gradient, v in zip((*branch, head_CD), gradients, velocity, strict=True):
                v.mul_(MOMENTUM).add_(gradient + WEIGHT_DECAY * tensor)
                tensor -= share * (HEAD_LR if tensor is head_CD else LR) * v

    order, method = generator(5, "batches", *names), generator(5, "method", *names)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(labels_N), generator=order).split(BATCH):
            if not gao:
                step(torch.autograd.grad(loss(batch), (*branch, head_CD)), epoch)
                continue
            one, two = (batch[half] for half in class_halves(labels_N[batch], method))
            rho = RHO_MAX * float(torch.rand((), generator=method))
            if len(two) == 0:
                step(torch.autograd.grad(loss(one), (*branch, head_CD)), epoch)
                continue
            for source, target in ((one, two), (two, one)):
                kept = [tensor.detach().clone() for tensor in branch]
                gradients = torch.autograd.grad(loss(source), branch)
                with torch.no_grad():
                    for tensor, gradient in zip(branch, gradients, strict=True):
                        if gradient.any():
                            tensor -= rho * gradient / gradient.norm()
                gradients = torch.autograd.grad(loss(target), (*branch, head_CD))
                with torch.no_grad():
                    for tensor, value in zip(branch, kept, strict=True):
                        tensor.copy_(value)
                step(gradients, epoch)

    assert _relative_error(trained["head"], head_CD) < 1e-3
    for (layer, kind), tensor in up.items():
        assert bool(tensor.detach().any())
        assert _relative_error(trained[f"branch/{layer}/{kind}/up"], tensor) < 5e-3, (layer, kind)
        assert _relative_error(trained[f"branch/{layer}/{kind}/down"], down[layer, kind]) < 1e-3, (layer, kind)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected.detach()).norm() / expected.detach().norm()).item())


def _leading_directions(
    layers_by_width: dict[int, tuple[str, ...]], tensors: dict[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """The top four eigenvectors of each layer's moment over √3, the largest entry of each made positive."""
    found = {}
    for width, layers in layers_by_width.items():
        row, column = torch.triu_indices(width, width)
        for index, layer in enumerate(layers):
            moment_DD = torch.zeros(width, width, dtype=torch.float64)
            moment_DD[row, column] = tensors[f"moments.{width}"][index]
            moment_DD[column, row] = tensors[f"moments.{width}"][index]
            down_rD = torch.linalg.eigh(moment_DD).eigenvectors.flip(1)[:, :4].mT / math.sqrt(3)
            largest = down_rD.gather(1, down_rD.abs().argmax(1, keepdim=True))
            found[layer, "general"] = (down_rD * largest.sign()).float()
    return found
