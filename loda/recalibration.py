"""Recalibration of the general branch before it is merged (He et al. 2026; ``full`` is ours)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RecalibrationKind = Literal["diagonal", "full", "none"]


def recalibration(
    A_rD: Tensor, S_old_DD: Tensor, S_new_DD: Tensor, gamma_m: float = 3.0, kind: RecalibrationKind = "diagonal"
) -> Tensor:
    """The matrix Λ in the merged update ``γ_G B Λ A``; leading axes allowed.

    With ``G = A S Aᵀ`` it trades the update's effect on old inputs against its loss on new ones:
    ``J(Λ) = tr(BΛG_oldΛᵀBᵀ) + γ_m tr(B(Λ-I)G_new(Λ-I)ᵀBᵀ)``.

    Args:
        A_rD: (r, D) down-projection.
        S_old_DD, S_new_DD: (D, D) second moments of the old tasks and of the new one.
        gamma_m: weight of the new task; 3 as published.
        kind: ``diagonal`` (published: λ_i from the diagonals), ``full`` (ours: the exact minimiser of J for every
            B, ``γ_m G_new (G_old + γ_m G_new)⁻¹``), ``none`` (identity).

    Returns:
        (r, r) float64.
    """
    A_rD = A_rD.to(torch.float64)
    rank = A_rD.shape[-2]
    eye_rr = torch.eye(rank, dtype=torch.float64, device=A_rD.device).expand(*A_rD.shape[:-2], rank, rank)
    if kind == "none":
        return eye_rr.clone()
    G_old_rr = A_rD @ S_old_DD.to(torch.float64) @ A_rD.mT
    G_new_rr = gamma_m * (A_rD @ S_new_DD.to(torch.float64) @ A_rD.mT)
    if kind == "diagonal":
        old_r = G_old_rr.diagonal(dim1=-2, dim2=-1)
        new_r = G_new_rr.diagonal(dim1=-2, dim2=-1)
        return torch.diag_embed(new_r / (old_r + new_r + 1e-12))
    if kind == "full":
        total_rr = G_old_rr + G_new_rr
        # Directions without any energy leave the sum singular; a ridge at rounding level keeps the solve finite.
        scale = total_rr.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-280)
        return torch.linalg.solve(total_rr + 1e-13 * scale * eye_rr, G_new_rr, left=False)
    raise ValueError(f"recalibration must be 'diagonal', 'full' or 'none', but got {kind!r}")
