"""What earlier tasks' inputs span, layer by layer: a memory of directions that later tasks leave alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loda.energy import rank_by_energy
from loda.subspace import fix_signs


def complement(basis_Dk: Tensor) -> Tensor:
    """An orthonormal basis (D, D - k) of what is orthogonal to orthonormal columns (D, k)."""
    width, rank = basis_Dk.shape
    if rank == 0:
        return torch.eye(width, dtype=basis_Dk.dtype, device=basis_Dk.device)
    return torch.linalg.qr(basis_Dk, mode="complete").Q[:, rank:]


class SubspaceMemory:
    """Per layer, an orthonormal basis M of protected input directions, grown until it holds a share of an energy.

    Where more than half of a layer's width is protected, the smaller rest is kept in its stead (``dual``): gradient
    projection memory in its dual form (Liang and Li 2023, DualGPM, as InfLoRA uses it). Protected and free directions
    are the same either way; only what is stored differs, so no memory exceeds half of a square matrix a layer.

    Args:
        dual: keep the smaller side; else always the protected one.
    """

    def __init__(self, dual: bool = True) -> None:
        self.dual = dual
        self.bases: dict[str, Tensor] = {}  # (D, k) float64, of the protected or of the free directions
        self.retaining: set[str] = set()  # the layers whose free directions are kept

    def protected(self, layer: str) -> Tensor:
        """M, (D, k) float64 with orthonormal columns."""
        basis = self.bases[layer]
        return complement(basis) if layer in self.retaining else basis

    def free(self, layer: str) -> Tensor:
        """The rest, (D, D - k) float64 with orthonormal columns."""
        basis = self.bases[layer]
        return basis if layer in self.retaining else complement(basis)

    def grow(self, layer: str, S_DD: Tensor, energy: float) -> int:
        """Add the fewest directions with which M holds a share of ``tr(S)``; returns how many.

        They are the leading eigenvectors of ``(I - MMᵀ) S (I - MMᵀ)``, found inside the free directions so that they
        stay orthogonal to M to the last bit that float64 has.

        Args:
            S_DD: (D, D) symmetric, positive semi-definite: inputs' second moment, or any other energy.
            energy: share in (0, 1].
        """
        S_DD = S_DD.to(torch.float64)
        if layer not in self.bases:
            self.bases[layer] = S_DD.new_zeros(S_DD.shape[0], 0)
        free_Df = self.free(layer)
        if free_Df.shape[1] == 0:
            return 0
        values_f, vectors_ff = torch.linalg.eigh(free_Df.mT @ S_DD @ free_Df)
        values_f, turned_Df = values_f.flip(0), fix_signs(free_Df @ vectors_ff.flip(1))
        total = S_DD.diagonal().sum()
        held = (total - values_f.clamp_min(0).sum()).clamp_min(0)
        missing = energy * total - held
        if not float(missing) > 1e-12 * float(total):
            return 0
        share = float((missing / values_f.clamp_min(0).sum()).clamp(max=1))
        added = int(rank_by_energy(values_f[None], share, len(values_f))[0])
        protected_Dk = torch.cat([self.protected(layer), turned_Df[:, :added]], dim=1)
        if self.dual and protected_Dk.shape[1] > len(S_DD) / 2:
            self.bases[layer] = turned_Df[:, added:]
            self.retaining.add(layer)
        else:
            self.bases[layer] = protected_Dk
        return added

    def state_tensors(self) -> dict[str, Tensor]:
        """``<layer>.protected`` or ``<layer>.free``, for safetensors."""
        kind = {layer: "free" if layer in self.retaining else "protected" for layer in self.bases}
        return {f"{layer}.{kind[layer]}": basis.contiguous() for layer, basis in self.bases.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of :meth:`state_tensors`; other names are left alone."""
        for name, tensor in tensors.items():
            layer, _, kind = name.rpartition(".")
            if kind in ("protected", "free"):
                self.bases[layer] = tensor.to(device)
                if kind == "free":
                    self.retaining.add(layer)
