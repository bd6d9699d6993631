"""A frozen linear layer and the thin products beside it, as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _FusedBranches(torch.autograd.Function):
    """``x Wᵀ + b + (x Aᵀ) [γ_1 B_1, γ_2 B_2, ...]ᵀ``, with a gradient for x and for each B_k and for nothing else.

    The products are those that autograd would make one by one, on the same operands in the same order, so forward and
    gradients are the same to the bit (float32, CPU). ``x`` is given twice: autograd then adds what comes back through
    A and what comes back through W in the order in which it always did, also where several layers share one input.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_branch: Tensor,
        x_base: Tensor,
        weight_OD: Tensor,
        bias_O: Tensor | None,
        down_rD: Tensor,
        scales: Sequence[float],
        *ups: Tensor,
    ) -> Tensor:
        dtype = _product_dtype(x_base)
        scaled = torch._foreach_mul(ups, scales)
        up_Or = scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)
        x = x_base
        if dtype != weight_OD.dtype:  # an input of autocast's type may meet weights that aren't
            x, weight_OD, down_rD, up_Or = x.to(dtype), weight_OD.to(dtype), down_rD.to(dtype), up_Or.to(dtype)
            bias_O = None if bias_O is None else bias_O.to(dtype)
        narrow = F.linear(x, down_rD)
        ctx.save_for_backward(narrow, weight_OD, down_rD, up_Or)
        ctx.scales, ctx.ranks = scales, [part.shape[1] for part in ups]
        ctx.dtypes = (x_base.dtype, ups[0].dtype)
        return F.linear(x, weight_OD, bias_O).add_(F.linear(narrow, up_Or))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        narrow, weight_OD, down_rD, up_Or = ctx.saved_tensors
        x_dtype, up_dtype = ctx.dtypes
        flat_MO = gradient.reshape(-1, gradient.shape[-1])
        through_branch = through_base = None
        if ctx.needs_input_grad[1]:
            shape = (*gradient.shape[:-1], down_rD.shape[1])
            through_branch = flat_MO.mm(up_Or).mm(down_rD).view(shape)
            through_base = flat_MO.mm(weight_OD).view(shape)
            if x_dtype != gradient.dtype:
                through_branch, through_base = through_branch.to(x_dtype), through_base.to(x_dtype)
        of_ups: Sequence[Tensor | None] = [None] * len(ctx.ranks)
        if any(ctx.needs_input_grad[6:]):
            of_up_Or = flat_MO.t().mm(narrow.reshape(-1, narrow.shape[-1]))
            if up_dtype != gradient.dtype:
                of_up_Or = of_up_Or.to(up_dtype)
            of_ups = torch._foreach_mul(of_up_Or.split(ctx.ranks, dim=1), ctx.scales)
        return (through_branch, through_base, None, None, None, None, *of_ups)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product of ``x`` is computed in: autocast's type where it is on, its own else."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def fused_branches(
    x: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    down_rD: Tensor,
    scales: Sequence[float],
    ups: Sequence[Tensor],
) -> Tensor:
    """``x Wᵀ + b + (x Aᵀ) [γ_1 B_1, γ_2 B_2, ...]ᵀ``, W, b, A and γ frozen.

    Under autocast the products are in its type and gradients come back in the types of ``x`` and ``ups``.

    Args:
        x: (..., d_in).
        weight_OD, bias_O: W (d_out, d_in) and b (d_out,) or None.
        down_rD: the branches' A, one under the other, (Σ r_k, d_in).
        scales: γ_k.
        ups: B_k, (d_out, r_k).
    """
    output: Tensor = _FusedBranches.apply(x, x, weight_OD, bias_O, down_rD, tuple(scales), *ups)
    return output
