"""The losses of an epoch's batches, kept where they were computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loda.distributed import WorkerGroup
from loda.errors import StageError


class EpochLosses:
    """Collects an epoch's losses and looks whether they are finite.

    Reading a number from an accelerator makes the host wait for all that is queued there. So there the losses are
    read once, at the end of the epoch, and the batch at which training diverged is found in them afterwards; on the
    CPU each is looked at as it comes, which costs nothing and ends a lost epoch at once.

    Args:
        epoch: from 0.
        epochs: of the whole training.
        device: where the losses come from.
        group: each worker has its share of a loss.
    """

    def __init__(self, epoch: int, epochs: int, device: torch.device, group: WorkerGroup) -> None:
        self.epoch, self.epochs, self.group = epoch, epochs, group
        self.waits = device.type == "cpu"
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """One batch's loss, a detached scalar.

        Raises:
            StageError: on the CPU, it is not finite.
        """
        loss = loss.to(torch.float64, copy=True)
        self.group.sum_([loss])
        self.losses.append(loss)
        if self.waits:
            self._check([float(loss)], len(self.losses))

    def mean(self) -> float:
        """The mean over the batches; to be asked once, at the end.

        Raises:
            StageError: a loss was not finite; names the epoch and the first such batch.
        """
        losses: list[float] = torch.stack(self.losses).tolist()
        self._check(losses, 1)
        total = 0.0
        for loss in losses:  # plain float64 sums: ``sum`` compensates from Python 3.12 on
            total += loss
        return total / len(losses)

    def _check(self, losses: list[float], first_batch: int) -> None:
        for batch, loss in enumerate(losses, first_batch):
            if not math.isfinite(loss):
                raise StageError(
                    f"the loss is {loss} in epoch {self.epoch + 1} of {self.epochs}, batch {batch}: training "
                    "diverged; lower training.lr (or, for LoDA, method.rho_max)"
                )
