"""Gradient-aligned optimisation: look a step ahead on one half of the classes, learn on the other (He et al. 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

RhoScale = Literal["absolute", "relative"]


def class_halves(labels_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split a batch by class: the first ``max(1, n // 2)`` of the shuffled classes present, and the rest.

    Args:
        labels_B: (B,) integer labels.
        generator: a CPU generator; one permutation is drawn.

    Returns:
        Two index tensors that cover the batch and share no class; the second is empty if only one class is present.
    """
    classes = torch.unique(labels_B)
    order = torch.randperm(len(classes), generator=generator).to(classes.device)
    first = classes[order[: max(1, len(classes) // 2)]]
    in_first_B = torch.isin(labels_B, first)
    return in_first_B.nonzero().squeeze(1), (~in_first_B).nonzero().squeeze(1)


def _move(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, scale: RhoScale) -> None:
    """Move each tensor by ``-ρ g/‖g‖``, in place: a descent move; L₂(θ - ρĝ₁) ≈ L₂ - ρ ĝ₁·g₂ rewards agreement."""
    norms_P = torch.stack(torch._foreach_norm(list(gradients)))
    # Published: the move has norm ρ. Ours ("relative"): norm ρ‖θ‖, so it shrinks with a small B.
    lengths_P = torch.full_like(norms_P, rho)
    if scale == "relative":
        lengths_P = rho * torch.stack(torch._foreach_norm(list(parameters)))
    factors_P = torch.where(norms_P > 0, lengths_P / norms_P, 0.0)  # no gradient, no move
    torch._foreach_sub_(list(parameters), torch._foreach_mul(list(gradients), list(factors_P.unbind())))


def gradient_aligned_step(
    loss_of: Callable[[Tensor], Tensor],
    halves: tuple[Tensor, Tensor],
    rho: float,
    branch_parameters: Sequence[Tensor],
    head_parameters: Sequence[Tensor],
    step: Callable[[], None],
    reduce_gradients: Callable[[Sequence[Tensor]], None] = lambda gradients: None,
    scale: RhoScale = "absolute",
) -> Tensor:
    """Two optimiser steps on one batch, one for each direction between its halves.

    For (source, target): the gradient on source, w.r.t. the branch tensors only; each moves to ``θ - ρ g/‖g‖``
    (norm per tensor; the head stays); the gradient on target there, for branches and head; θ is put back bit for
    bit; a step. First order: the move is not differentiated through. With one class present, a plain step.

    Args:
        loss_of: mean loss of the given batch indices (a worker's share of it, where several work together).
        halves: from :func:`class_halves`.
        rho: length of the move (``ρ_max · U(0, 1)`` as drawn for this batch).
        branch_parameters, head_parameters: leaf tensors that the optimiser holds.
        step: the optimiser's step.
        reduce_gradients: sums gradients over workers, in place.
        scale: ``absolute`` as published, or ``relative`` to each tensor's norm (ours).

    Returns:
        Mean of the losses that were stepped on, a float64 scalar where they were computed.
    """
    parameters = [*branch_parameters, *head_parameters]
    if len(halves[1]) == 0:
        return plain_step(loss_of, halves[0], parameters, step, reduce_gradients)
    losses = []
    for source, target in (halves, halves[::-1]):
        if rho == 0:
            losses.append(plain_step(loss_of, target, parameters, step, reduce_gradients))
            continue
        ahead = list(torch.autograd.grad(loss_of(source), branch_parameters, materialize_grads=True))
        reduce_gradients(ahead)
        with torch.no_grad():
            kept = [parameter.clone() for parameter in branch_parameters]
            _move(branch_parameters, ahead, rho, scale)
        loss = loss_of(target)
        gradients = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
        reduce_gradients(gradients)
        with torch.no_grad():
            torch._foreach_copy_(list(branch_parameters), kept)
        _assign_and_step(parameters, gradients, step)
        losses.append(loss.detach())
    return torch.stack(losses).double().sum() / len(losses)


def plain_step(
    loss_of: Callable[[Tensor], Tensor],
    indices: Tensor,
    parameters: Sequence[Tensor],
    step: Callable[[], None],
    reduce_gradients: Callable[[Sequence[Tensor]], None] = lambda gradients: None,
) -> Tensor:
    """One ordinary optimiser step on the given batch indices; returns the loss, a scalar where it was computed."""
    loss = loss_of(indices)
    gradients = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
    reduce_gradients(gradients)
    _assign_and_step(parameters, gradients, step)
    return loss.detach()


def _assign_and_step(parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: Callable[[], None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    step()
