"""Frequent Directions: the row space of a long matrix in a few rows (Ghashami et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from loda.subspace import fix_signs


class FrequentDirections:
    """A sketch of ℓ rows with ``0 ≤ XᵀX - BᵀB ≤ ‖X‖²_F / ℓ`` (in every direction) for all rows X that were added.

    Args:
        width: D.
        rows: ℓ; ranks below it are kept exactly.
    """

    def __init__(self, width: int, rows: int, device: torch.device | str = "cpu") -> None:
        self.rows = rows
        self.sketch_lD = torch.zeros(0, width, dtype=torch.float64, device=device)

    def update(self, x_ND: Tensor) -> None:
        """Add rows (N, D)."""
        stacked_ND = torch.cat([self.sketch_lD, x_ND.to(self.sketch_lD)])
        _, values, Vh = torch.linalg.svd(stacked_ND, full_matrices=False)
        if len(values) > self.rows:  # the largest energy that is dropped is taken off all that stay
            values = (values.square() - values[self.rows].square()).clamp_min(0).sqrt()[: self.rows]
        self.sketch_lD = values[:, None] * fix_signs(Vh[: len(values)].mT).mT

    def energy(self) -> Tensor:
        """``BᵀB``, (D, D) float64."""
        return self.sketch_lD.mT @ self.sketch_lD
