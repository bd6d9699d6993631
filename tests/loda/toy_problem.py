"""A problem of two non-square branched layers under a cosine head, small enough for exact comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loda.branch import BranchedLinear
from loda.gao import class_halves, gradient_aligned_step
from loda.head import CosineHead, cosface_loss

WIDTH, HIDDEN, OUT, CLASSES, BATCH = 7, 11, 5, 4, 16


def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies that later steps don't touch."""
    return [parameter.detach().clone() for parameter in parameters]


@dataclass
class Problem:
    """Two non-square branched layers under a cosine head, in float64, with all that an optimiser step sees recorded."""

    train_down: bool = False
    scales: tuple[float, float] = (0.25, 0.5)
    down_scale: float = 1 / math.sqrt(3)
    start_up: float = 0.3
    calls: list[tuple[list[int], list[Tensor], list[Tensor]]] = field(default_factory=list)
    steps: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        draws = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws, dtype=torch.float64)

        self.layers = []
        for d_in, d_out in ((WIDTH, HIDDEN), (HIDDEN, OUT)):
            base = nn.Linear(d_in, d_out, dtype=torch.float64).requires_grad_(False)
            base.weight.copy_(randn(d_out, d_in) / d_in**0.5)
            base.bias.copy_(randn(d_out) / 10)
            layer = BranchedLinear(base)
            for name, rank, scale in (("general", 3, self.scales[0]), ("isolated", 2, self.scales[1])):
                down_rD = torch.linalg.qr(randn(d_in, rank)).Q.mT * self.down_scale
                # B as it would be with scale 1 and orthonormal A, brought to this scale: equal functions at the start.
                up_Or = self.start_up * randn(d_out, rank) / (scale * self.down_scale)
                layer.add(name, down_rD, up_Or, scale=scale, train_down=self.train_down)
            self.layers.append(layer)
        self.head = CosineHead(randn(CLASSES, OUT))
        self.images_BD = randn(BATCH, WIDTH)
        self.labels_B = torch.arange(BATCH) % CLASSES
        self.branch = [p for layer in self.layers for p in layer.branches.parameters() if p.requires_grad]
        self.halves = class_halves(self.labels_B, torch.Generator().manual_seed(1))

    def loss(self, indices: Tensor) -> Tensor:
        hidden = torch.tanh(self.layers[0](self.images_BD[indices]))
        cosines = self.head(self.layers[1](hidden))
        return cosface_loss(cosines, self.labels_B[indices], scale=5.0) / len(indices)

    def recorded_loss(self, indices: Tensor) -> Tensor:
        self.calls.append((indices.tolist(), snapshot(self.branch), snapshot(self.head.parameters())))
        return self.loss(indices)

    def sgd(self, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-2) -> Callable[[], None]:
        optimizer = torch.optim.SGD(
            [*self.branch, *self.head.parameters()], lr=lr, momentum=momentum, weight_decay=weight_decay
        )

        def step() -> None:
            self.steps.append((snapshot(self.branch), [p.grad.clone() for p in self.branch]))  # type: ignore[union-attr]
            optimizer.step()

        return step

    def gao_step(self, rho: float, step: Callable[[], None], **options: object) -> float:
        head = list(self.head.parameters())
        loss = gradient_aligned_step(self.recorded_loss, self.halves, rho, self.branch, head, step, **options)  # type: ignore[arg-type]
        return float(loss)
