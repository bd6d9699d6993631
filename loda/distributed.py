"""A group of data-parallel workers, or one worker alone; torch.distributed must be initialised by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class WorkerGroup:
    """Which share of each batch this process takes. ``WorkerGroup()`` is a single process."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> WorkerGroup:
        """The group that torch.distributed was initialised with, or a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, indices: Tensor) -> Tensor:
        """This worker's share of the given indices, strided so that shares differ by one item at most."""
        return indices[self.rank :: self.size] if self.size > 1 else indices

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the workers, in place, in one message per dtype."""
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):  # the same order on every worker
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))
