"""Second moments of a layer's inputs, streamed, and what is read off them (He et al. 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SecondMoment:
    """Streaming ``S = XᵀX / n`` for several layers of one width; rows of ``X`` are tokens.

    Products and sums are in float64, so the order of batches matters only by float64 rounding, and two halves merge
    to the whole. Ours, because the error of float32 products exceeds the isolated subspace's ridge where a layer's
    spectrum is steep: on DeiT-tiny's first layer it turned the subspace by 0.1.

    Args:
        width: D, the number of input features of each layer.
        layers: L, the number of layers.
        device: where the sums live; inputs are expected there.
    """

    def __init__(self, width: int, layers: int = 1, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.layers = layers
        self.sums_LDD = torch.zeros(layers, width, width, dtype=torch.float64, device=device)
        self.tokens_L = torch.zeros(layers, dtype=torch.float64, device=device)

    def update_layer(self, layer: int, x: Tensor) -> None:
        """Add one layer's inputs, shape (..., D)."""
        x_ND = x.reshape(-1, self.width).double()
        self.sums_LDD[layer] += x_ND.mT @ x_ND
        self.tokens_L[layer] += x_ND.shape[0]

    def update(self, x: Tensor | Sequence[Tensor]) -> None:
        """Add a batch: (B, N, D) for a single layer, or one tensor (..., D) per layer.

        Raises:
            ValueError: the number of tensors isn't the number of layers.
        """
        per_layer = [x] if isinstance(x, Tensor) and self.layers == 1 else list(x)
        if len(per_layer) != self.layers:
            raise ValueError(f"expected {self.layers} tensors, one a layer, but got {len(per_layer)}")
        for layer, x_layer in enumerate(per_layer):
            self.update_layer(layer, x_layer)

    def merge(self, other: SecondMoment) -> None:
        """Add what another accumulator has seen."""
        if (other.width, other.layers) != (self.width, self.layers):
            raise ValueError(
                f"cannot merge second moments of {other.layers} layers of width {other.width} "
                f"into {self.layers} layers of width {self.width}"
            )
        self.sums_LDD += other.sums_LDD.to(self.sums_LDD.device)
        self.tokens_L += other.tokens_L.to(self.tokens_L.device)

    def value(self) -> Tensor:
        """(L, D, D) float64, per token, exactly symmetric.

        Raises:
            ValueError: nothing was added yet.
        """
        if bool((self.tokens_L == 0).any()):
            raise ValueError("no tokens were added to the second moment; call update() first")
        mean_LDD = self.sums_LDD / self.tokens_L[:, None, None]
        return (mean_LDD + mean_LDD.mT) / 2


def projection_energy(second_moment_DD: Tensor, basis_Dr: Tensor) -> Tensor:
    """Share of the energy ``tr(S)`` that an orthonormal basis captures: ``tr(UᵀSU) / tr(S)``; leading axes allowed."""
    captured = (basis_Dr * (second_moment_DD @ basis_Dr)).sum(dim=(-2, -1))
    return captured / second_moment_DD.diagonal(dim1=-2, dim2=-1).sum(-1)


def rank_by_energy(eigenvalues_LD: Tensor, energy: float | None, rank: int) -> Tensor:
    """Smallest rank whose leading eigenvalues hold ``energy`` of their sum, at least 1, at most ``rank``.

    Ours: the published method fixes one rank for all layers. ``energy=None`` does the same.

    Args:
        eigenvalues_LD: (L, D), descending; rounding below zero counts as zero.
        energy: share in (0, 1], or None.
        rank: the cap.

    Returns:
        (L,) int64.
    """
    if not 1 <= rank <= eigenvalues_LD.shape[-1]:
        raise ValueError(f"rank must be from 1 to the layer's width {eigenvalues_LD.shape[-1]}, but got {rank}")
    if energy is None:
        return torch.full((eigenvalues_LD.shape[0],), rank, dtype=torch.int64)
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1] or None, but got {energy}")
    values_LD = eigenvalues_LD.clamp_min(0)
    total_L1 = values_LD.sum(-1, keepdim=True)
    # A relative slack of one rounding error: energy=1 must not ask for more directions than carry any energy.
    reached_LD = values_LD.cumsum(-1) >= energy * total_L1 * (1 - 1e-12)
    needed_L = reached_LD.to(torch.int64).argmax(-1) + 1
    return needed_L.clamp(1, rank).cpu()


def pack_symmetric(matrix_LDD: Tensor) -> Tensor:
    """Upper triangles (L, D(D+1)/2) of symmetric matrices: half the bytes on disk."""
    row, column = torch.triu_indices(matrix_LDD.shape[-1], matrix_LDD.shape[-1])
    return matrix_LDD[:, row, column]


def unpack_symmetric(packed_LP: Tensor) -> Tensor:
    """The inverse of :func:`pack_symmetric`."""
    width = int(((8 * packed_LP.shape[-1] + 1) ** 0.5 - 1) / 2)
    row, column = torch.triu_indices(width, width)
    matrix_LDD = packed_LP.new_zeros(packed_LP.shape[0], width, width)
    matrix_LDD[:, row, column] = packed_LP
    matrix_LDD[:, column, row] = packed_LP
    return matrix_LDD
