"""General and isolated subspaces of a layer's inputs (He et al. 2026), batched over layers in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loda.energy import rank_by_energy

# Ours: far below any eigenvalue that carries signal, far above float64 rounding.
RELATIVE_RIDGE = 1e-6


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis per layer.

    Attributes:
        basis: (L, D, r) float64, orthonormal columns, zero beyond a layer's rank.
        eigenvalues: (L, D) descending; of ``S`` (general) or of the pencil ``(S_new, S_old)`` (isolated).
        ranks: (L,) int64.
        ridge: (L,) what was added to the diagonal of ``S_old``; 0 for the general subspace.
    """

    basis: Tensor
    eigenvalues: Tensor
    ranks: Tensor
    ridge: Tensor


def fix_signs(basis_LDr: Tensor) -> Tensor:
    """Make the largest entry of each column positive: eigenvectors have no sign of their own, digests need one."""
    largest = basis_LDr.abs().argmax(dim=-2, keepdim=True)
    signs = basis_LDr.gather(-2, largest).sign()
    return basis_LDr * torch.where(signs == 0, torch.ones_like(signs), signs)


def _cut(basis_LDr: Tensor, ranks_L: Tensor) -> Tensor:
    keep_Lr = torch.arange(basis_LDr.shape[-1])[None] < ranks_L[:, None]
    return basis_LDr * keep_Lr.to(basis_LDr)[:, None]


def _with_layer_axis(matrix: Tensor) -> Tensor:
    matrix = matrix.to(torch.float64)
    return matrix if matrix.ndim == 3 else matrix[None]


def general_subspace(S_LDD: Tensor, rank: int, energy: float | None = None) -> Subspace:
    """Top eigenvectors of ``S = S_old + S_new``: maximises ``tr(UᵀSU)``.

    Args:
        S_LDD: (L, D, D) or (D, D), symmetric, positive semi-definite.
        rank: columns at most, 1..D.
        energy: see :func:`loda.energy.rank_by_energy`.
    """
    S_LDD = _with_layer_axis(S_LDD)
    eigenvalues_LD, vectors_LDD = torch.linalg.eigh(S_LDD)
    eigenvalues_LD = eigenvalues_LD.flip(-1)
    ranks_L = rank_by_energy(eigenvalues_LD, energy, rank)
    basis_LDr = fix_signs(vectors_LDD.flip(-1)[..., :rank])
    return Subspace(_cut(basis_LDr, ranks_L), eigenvalues_LD, ranks_L, torch.zeros_like(eigenvalues_LD[:, 0]))


def _ridged_cholesky(S_old_LDD: Tensor, S_new_LDD: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of ``S_old + δI``; δ grows tenfold, layer by layer, until the factorisation succeeds."""
    width = S_old_LDD.shape[-1]
    mean_old_L = S_old_LDD.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_new_L = S_new_LDD.diagonal(dim1=-2, dim2=-1).mean(-1)
    # An all-zero S_old has no scale of its own: a speck of S_new's keeps the pencil finite.
    ridge_L = torch.maximum(RELATIVE_RIDGE * mean_old_L, 1e-12 * mean_new_L).clamp_min(torch.finfo(torch.float64).tiny)
    eye_DD = torch.eye(width, dtype=torch.float64, device=S_old_LDD.device)
    for _ in range(40):
        factor_LDD, info_L = torch.linalg.cholesky_ex(S_old_LDD + ridge_L[:, None, None] * eye_DD)
        if not bool(info_L.any()):
            return factor_LDD, ridge_L
        ridge_L = torch.where(info_L != 0, ridge_L * 10, ridge_L)
    raise ValueError("S_old is not positive semi-definite: no ridge up to 1e40 times the first made Cholesky succeed")


def isolated_subspace(S_new_LDD: Tensor, S_old_LDD: Tensor, rank: int, energy: float | None = None) -> Subspace:
    """Directions rich in the new task and poor in the old ones: top generalised eigenvectors of ``(S_new, S_old)``.

    With ``S_old + δI = LLᵀ`` and ``V`` the top eigenvectors of ``L⁻¹ S_new L⁻ᵀ``, the basis is ``qr(L⁻ᵀV).Q``; it
    maximises the ratio trace ``tr((UᵀS_oldU)⁻¹ UᵀS_newU)`` and is not made orthogonal to the general subspace.
    Leading columns span the leading eigenvectors, so a smaller rank is a prefix of a larger one.

    Args:
        S_new_LDD, S_old_LDD: (L, D, D) or (D, D), symmetric, positive semi-definite.
        rank, energy: as in :func:`general_subspace`.
    """
    S_new_LDD, S_old_LDD = _with_layer_axis(S_new_LDD), _with_layer_axis(S_old_LDD)
    factor_LDD, ridge_L = _ridged_cholesky(S_old_LDD, S_new_LDD)
    half_LDD = torch.linalg.solve_triangular(factor_LDD, S_new_LDD, upper=False)
    whitened_LDD = torch.linalg.solve_triangular(factor_LDD, half_LDD.mT, upper=False)
    eigenvalues_LD, vectors_LDD = torch.linalg.eigh((whitened_LDD + whitened_LDD.mT) / 2)
    eigenvalues_LD = eigenvalues_LD.flip(-1)
    ranks_L = rank_by_energy(eigenvalues_LD, energy, rank)
    top_LDr = vectors_LDD.flip(-1)[..., :rank]
    directions_LDr = torch.linalg.solve_triangular(factor_LDD.mT, top_LDr, upper=True)
    # Columns differ in length by the spread of S_old's spectrum; QR is safer on unit columns and spans the same.
    directions_LDr = directions_LDr / directions_LDr.norm(dim=-2, keepdim=True)
    basis_LDr = fix_signs(torch.linalg.qr(directions_LDr).Q)
    return Subspace(_cut(basis_LDr, ranks_L), eigenvalues_LD, ranks_L, ridge_L)
