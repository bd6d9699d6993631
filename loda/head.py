"""Cosine heads and the CosFace loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """A bias-free cosine classifier over one task's classes.

    Args:
        weight_CD: (C, D) start values; only their directions matter.
    """

    def __init__(self, weight_CD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_CD.clone())

    def forward(self, features_BD: Tensor) -> Tensor:
        """Cosines, (B, C)."""
        return cosines(features_BD, self.weight)


def cosines(features_BD: Tensor, weight_CD: Tensor) -> Tensor:
    """Cosine of every feature with every class weight, (B, C)."""
    return F.linear(F.normalize(features_BD, dim=-1), F.normalize(weight_CD, dim=-1))


def random_head_weight(classes: int, width: int, generator: torch.Generator) -> Tensor:
    """(C, D) uniform in ±1/√D, the start that a linear layer has."""
    return (torch.rand(classes, width, generator=generator) * 2 - 1) / width**0.5


def cosface_loss(cosines_BC: Tensor, labels_B: Tensor, scale: float = 20.0, margin: float = 0.0) -> Tensor:
    """Sum over the batch of the cross-entropy on ``scale · (cos θ - margin · 1[y])`` (Wang et al. 2018, CosFace).

    A sum, not a mean: workers divide by the size of the whole batch, of which each holds a share.
    """
    if margin:
        cosines_BC = cosines_BC - margin * F.one_hot(labels_B, cosines_BC.shape[-1]).to(cosines_BC)
    return F.cross_entropy(scale * cosines_BC, labels_B, reduction="sum")
