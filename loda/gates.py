"""Gated stacks: one frozen branch a task in every layer, each weighed by a gate that reads the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loda.backbone import Backbone


class Gate(nn.Module):
    """``g(x) = |2σ(b) - 1|`` in [0, 1), b from a small network without biases on the mean patch embedding.

    Args:
        weights: of the linear layers, each (out, in), SiLU between them; the last has a single row.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight_OD in weights:
            linear = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=False)
            linear.weight = nn.Parameter(weight_OD.clone())
            self.layers.append(linear)

    def weights(self) -> list[Tensor]:
        """The linear layers' weights."""
        return [layer.get_parameter("weight") for layer in self.layers]

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """(B,) gate values."""
        hidden_BH = pooled_BD
        for layer in self.layers[:-1]:
            hidden_BH = F.silu(layer(hidden_BH))
        return (2 * torch.sigmoid(self.layers[-1](hidden_BH)[:, 0]) - 1).abs()


class Gates(nn.Module):
    """The gates of all tasks so far, computed once a pass and shared by all layers.

    Args:
        gates: in the order of every layer's branches.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)
        self.values_BT: Tensor | None = None

    def read(self, tokens: Tensor) -> None:
        """Compute the gates from the frozen patch embedding (B, ..., D)."""
        pooled_BD = tokens.flatten(1, -2).mean(1)
        self.values_BT = torch.stack([gate(pooled_BD) for gate in self.gates], dim=1)

    def weigh(self, x: Tensor) -> Tensor:
        """(B, T), whatever the layer's own input."""
        assert self.values_BT is not None
        return self.values_BT

    def attach(self, model: Backbone) -> None:
        """Weigh the branches that are attached to ``model``."""
        model.shared["gates"] = self.to(model.device)
        model.on_patch_tokens(self.read)
        for branched in model.attached.values():
            branched.weigh = self.weigh


def random_gate(width: int, hidden: int, generator: torch.Generator) -> list[Tensor]:
    """Weights of a gate with one hidden layer, uniform in ±1/√(inputs)."""
    shapes = ((hidden, width), (1, hidden))
    return [(torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5 for shape in shapes]


def off_span(weight_OD: Tensor, basis_Dk: Tensor) -> Tensor:
    """The rows of a weight without their part in the span of orthonormal columns (D, k), in the weight's dtype."""
    weight64_OD = weight_OD.double()
    return (weight64_OD - (weight64_OD @ basis_Dk) @ basis_Dk.mT).to(weight_OD.dtype)
