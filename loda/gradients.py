"""Gradients of a task's loss with respect to the adapted weights, over all its training images, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.distributed import WorkerGroup
from loda.head import CosineHead, cosface_loss

_SAMPLES_AT_ONCE = 16  # of per-image gradients, each as large as the layer's weight


@dataclass(frozen=True)
class LossGradients:
    """The loss of a task's images under the backbone and the head as they are when a method asks.

    Args:
        images_NCHW: uint8, as they are: no augmentation, so nothing is drawn.
        labels_N: 0-based within the task.
        scale, margin: of the loss, as in training.
        batch_size: images a pass; sums are in float64, so it matters only by rounding.
        group: workers take a share of each batch.
    """

    model: Backbone
    head: CosineHead
    images_NCHW: Tensor
    labels_N: Tensor
    scale: float
    margin: float
    batch_size: int
    group: WorkerGroup

    def mean(self) -> dict[str, Tensor]:
        """``∂L/∂W`` of the mean loss by layer, (d_out, d_in) float64."""
        return self._over_images(lambda x_BND, delta_BNO: torch.einsum("bno,bnd->od", delta_BNO, x_BND).double())

    def squared(self) -> dict[str, Tensor]:
        """Mean over images of ``(∂ℓ_i/∂W)²`` by layer, (d_out, d_in) float64: the diagonal of the empirical Fisher."""

        def squares(x_BND: Tensor, delta_BNO: Tensor) -> Tensor:
            total_OD = torch.zeros(delta_BNO.shape[-1], x_BND.shape[-1], dtype=torch.float64, device=x_BND.device)
            for x, delta in zip(x_BND.split(_SAMPLES_AT_ONCE), delta_BNO.split(_SAMPLES_AT_ONCE)):
                total_OD += (delta.mT @ x).square().sum(0)
            return total_OD

        return self._over_images(squares)

    def _over_images(self, reduce: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """The mean over images of ``reduce(inputs (B, n, d_in), ∂ℓ/∂outputs (B, n, d_out))``."""
        sums = {
            name: torch.zeros(d_out, d_in, dtype=torch.float64, device=self.model.device)
            for name, (d_in, d_out) in self.model.widths.items()
        }
        handles = []
        for name in self.model.layers:
            # Branches add to the layer's output, so the gradient is the same before and after them.
            module = self.model.model.get_submodule(name)
            handles.append(module.register_forward_hook(self._hook(sums[name], reduce)))
        try:
            for batch in torch.arange(len(self.labels_N)).split(self.batch_size):
                share = self.group.share(batch)
                if len(share):
                    inputs = self.model.normalize(self.images_NCHW[share].to(self.model.device).float() / 255)
                    # An input that wants a gradient makes every layer's output want one; the weights stay frozen.
                    features_BD = self.model.features(inputs.requires_grad_(True))
                    labels_B = self.labels_N[share].to(self.model.device)
                    loss = cosface_loss(self.head(features_BD), labels_B, self.scale, self.margin)
                    torch.autograd.grad(loss, inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.group.sum_(list(sums.values()))
        return {name: total / len(self.labels_N) for name, total in sums.items()}

    @staticmethod
    def _hook(total_OD: Tensor, reduce: Callable[[Tensor, Tensor], Tensor]):  # type: ignore[no-untyped-def]
        def watch(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_BND = inputs[0].detach().float()  # bfloat16 under autocast

            def add(gradient: Tensor) -> None:
                total_OD.add_(reduce(x_BND, gradient.detach().float()))

            output.register_hook(add)

        return watch
