"""One later task of LoDA with the structure of the published code, in plain PyTorch; written from its description.

Three passes over the training images, each copying every layer's input products to the CPU batch by batch; layer by
layer decompositions in NumPy's float32; recalibration rank by rank; GAO with tensors cloned and norms read one by one;
a test batch of one image, and every task's head in turn. What it computes is LoDA; how fast is what it is here for.
Images come decoded and normalised, as in the comparison's other side: the published code also loads and crops them one
by one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAMMA_GENERAL, GAMMA_ISOLATED, DOWN_SCALE, GAMMA_M = 0.25, 0.5, 1 / math.sqrt(3), 3.0


class TwoBranches(nn.Module):
    """``W x + γ_G B_G A_G x + γ_I B_I A_I x``, the down-projections frozen."""

    down_general_rD: Tensor
    down_isolated_rD: Tensor

    def __init__(self, base: nn.Linear, general_rD: Tensor, isolated_rD: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down_general_rD", general_rD)
        self.register_buffer("down_isolated_rD", isolated_rD)
        self.up_general_Or = nn.Parameter(torch.zeros(base.out_features, len(general_rD), device=general_rD.device))
        self.up_isolated_Or = nn.Parameter(torch.zeros(base.out_features, len(isolated_rD), device=general_rD.device))

    def forward(self, x: Tensor) -> Tensor:
        general = F.linear(F.linear(x, self.down_general_rD), self.up_general_Or)
        isolated = F.linear(F.linear(x, self.down_isolated_rD), self.up_isolated_Or)
        return self.base(x) + GAMMA_GENERAL * general + GAMMA_ISOLATED * isolated


def _batches(images_NCHW: Tensor, size: int) -> Iterator[Tensor]:
    yield from images_NCHW.split(size)


def observe(model: nn.Module, layers: Sequence[str], images_NCHW: Tensor, batch_size: int) -> dict[str, np.ndarray]:
    """A pass over the images; every layer's ``XᵀX`` goes to the CPU after each batch."""
    sums: dict[str, np.ndarray] = {}
    tokens = 0

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_ND = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            product = (x_ND.T @ x_ND).cpu().numpy()
            sums[name] = sums[name] + product if name in sums else product

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    with torch.no_grad():
        for batch in _batches(images_NCHW, batch_size):
            model(batch)
            tokens += len(batch)
    for handle in handles:
        handle.remove()
    return {name: value / tokens for name, value in sums.items()}


def decompose(new_DD: np.ndarray, old_DD: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """General and isolated down-projections (r, D) of one layer."""
    _, vectors = np.linalg.eigh(old_DD + new_DD)
    general = vectors[:, ::-1][:, :rank]
    ridge = 1e-4 * np.trace(old_DD) / len(old_DD) * np.eye(len(old_DD), dtype=old_DD.dtype)
    _, directions = scipy.linalg.eigh(new_DD, old_DD + ridge)
    isolated, _ = np.linalg.qr(directions[:, ::-1][:, :rank])
    return DOWN_SCALE * general.T.copy(), DOWN_SCALE * isolated.T.copy()


def train(
    model: nn.Module,
    branches: Sequence[TwoBranches],
    head: nn.Parameter,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    rho_max: float,
    scale: float,
) -> None:
    """GAO, two optimiser steps a batch."""
    adapted = [up for branch in branches for up in (branch.up_general_Or, branch.up_isolated_Or)]
    optimizer = torch.optim.SGD([*adapted, head], lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scale * F.linear(F.normalize(model(images), dim=-1), F.normalize(head, dim=-1)), labels)

    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(labels_N), generator=draws).split(batch_size):
            images, labels = images_NCHW[index], labels_N[index]
            classes = torch.unique(labels)[torch.randperm(len(torch.unique(labels)), generator=draws)]
            first = torch.isin(labels, classes[: max(1, len(classes) // 2)])
            rho = rho_max * float(torch.rand((), generator=draws))
            for source, target in ((first, ~first), (~first, first)):
                if not bool(source.any()) or not bool(target.any()):
                    continue
                optimizer.zero_grad()
                loss_of(images[source], labels[source]).backward()
                moves = []
                for parameter in adapted:
                    assert parameter.grad is not None
                    norm = parameter.grad.norm().item()
                    move = rho * parameter.grad / norm if norm > 0 else torch.zeros_like(parameter)
                    parameter.data -= move
                    moves.append(move.clone())
                optimizer.zero_grad()
                loss = loss_of(images[target], labels[target])
                loss.backward()
                for parameter, move in zip(adapted, moves, strict=True):
                    parameter.data += move
                optimizer.step()
                total += loss.item()
        schedule.step()


def merge(branch: TwoBranches, old_DD: np.ndarray, new_DD: np.ndarray) -> nn.Linear:
    """The layer with its branches merged; the general one recalibrated rank by rank."""
    down = branch.down_general_rD.cpu().numpy()
    ups = []
    for index in range(len(down)):
        energy_old = float(down[index] @ old_DD @ down[index])
        energy_new = GAMMA_M * float(down[index] @ new_DD @ down[index])
        ups.append(branch.up_general_Or.detach()[:, index] * (energy_new / (energy_old + energy_new + 1e-12)))
    change = GAMMA_GENERAL * torch.stack(ups, dim=1) @ branch.down_general_rD
    change += GAMMA_ISOLATED * branch.up_isolated_Or.detach() @ branch.down_isolated_rD
    merged = copy.deepcopy(branch.base)
    with torch.no_grad():
        merged.weight += change
    return merged


def test(model: nn.Module, heads: Sequence[Tensor], images_NCHW: Tensor, labels_N: Tensor) -> float:
    """Accuracy (%) over all heads' classes, one image at a time."""
    right = 0
    with torch.no_grad():
        for image, label in zip(images_NCHW, labels_N, strict=True):
            feature = F.normalize(model(image[None]), dim=-1)
            logits = torch.cat([F.linear(feature, F.normalize(head, dim=-1)) for head in heads], dim=1)
            right += int(logits.argmax(1).item() == label.item())
    return 100 * right / len(labels_N)


def later_task(
    model: nn.Module,
    layers: Sequence[str],
    old: dict[str, np.ndarray],
    heads: Sequence[Tensor],
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    rank: int,
    epochs: int,
    batch_size: int,
    lr: float,
    rho_max: float,
    scale: float,
) -> float:
    """A whole task; ``model`` is a copy of its own and ends merged. Returns the accuracy (%)."""
    new = observe(model, layers, train_images, batch_size)
    branches = []
    for name in layers:
        general, isolated = decompose(new[name], old[name], rank)
        device = train_images.device
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        branch = TwoBranches(base, torch.from_numpy(general).to(device), torch.from_numpy(isolated).to(device))
        model.set_submodule(name, branch)
        branches.append(branch)
    classes = int(train_labels.max()) + 1
    head = nn.Parameter(torch.randn(classes, heads[0].shape[1], generator=torch.Generator().manual_seed(0)))
    head.data = head.data.to(train_images.device)
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "rho_max": rho_max, "scale": scale}
    train(model, branches, head, train_images, train_labels, **options)  # type: ignore[arg-type]
    adapted = observe(model, layers, train_images, batch_size)
    for name, branch in zip(layers, branches, strict=True):
        model.set_submodule(name, merge(branch, old[name], adapted[name]))
    remembered = observe(model, layers, train_images, batch_size)
    for name in layers:
        old[name] = old[name] + remembered[name]
    return test(model, [*heads, head.detach()], test_images, test_labels)
