"""The adapted layers' weights along a chain of tasks, at a cost that doesn't grow with its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]


class MergedWeights:
    """``W_0 + Σ up @ down`` (or ``+ delta``, where a task left a change of full rank), summed task after task.

    The sum is always taken in the tasks' order, so its bits never depend on where a run was taken up. The weights
    after all tasks but the last are kept: the next task of the same chain adds to them, another chain starts again
    from ``W_0``. A chain goes on where its factors are the very tensors of the last call, so factors must not be
    changed in place. Beside ``W_0`` that is one more copy of the adapted weights, whatever the number of tasks.

    Args:
        original: the frozen weights (d_out, d_in) by layer name.
    """

    def __init__(self, original: Mapping[str, Tensor]) -> None:
        self.original = original
        self._base: list[Factors] = []  # the tasks that _weights hold
        self._weights: Mapping[str, Tensor] = original

    @torch.no_grad()
    def after(self, merges: Sequence[Factors]) -> Mapping[str, Tensor]:
        """The weights after these tasks, by layer name, to be read only.

        Args:
            merges: of each task, first task first: ``<layer>.up`` (d_out, k) and ``<layer>.down`` (k, d_in), or
                ``<layer>.delta`` (d_out, d_in).
        """
        if len(merges) < 2:  # costs next to nothing, and what is kept of a longer chain stays
            return self._plus(self.original, merges)
        if not self._begins(merges):
            self._base, self._weights = [], self.original
        for factors in merges[len(self._base) : -1]:
            self._weights = self._plus(self._weights, [factors])
            self._base.append(dict(factors))
        return self._plus(self._weights, merges[len(self._base) :])

    def _begins(self, merges: Sequence[Factors]) -> bool:
        """Whether the tasks that are summed already are the first of these."""
        return len(self._base) <= len(merges) and all(map(_same, self._base, merges))

    def _plus(self, weights: Mapping[str, Tensor], merges: Sequence[Factors]) -> Mapping[str, Tensor]:
        if not merges:
            return weights
        found = {name: weight_OD.clone() for name, weight_OD in weights.items()}
        for factors in merges:
            for name, weight_OD in found.items():
                if f"{name}.up" in factors:
                    weight_OD += factors[f"{name}.up"].to(weight_OD.device) @ factors[f"{name}.down"].to(
                        weight_OD.device
                    )
                if f"{name}.delta" in factors:
                    weight_OD += factors[f"{name}.delta"].to(weight_OD.device)
        return found


def _same(one: Factors, other: Factors) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)
