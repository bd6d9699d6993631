"""Second moments of all adapted layers, kept in one batch per layer width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loda.branch import BranchedLinear
from loda.energy import SecondMoment, pack_symmetric, unpack_symmetric


@dataclass
class LayerMoments:
    """Per-token second moments, by layer width: ``names[D]`` and ``values[D]`` of shape (L, D, D), float64."""

    names: dict[int, tuple[str, ...]]
    values: dict[int, Tensor]

    def __add__(self, other: LayerMoments) -> LayerMoments:
        return LayerMoments(self.names, {width: value + other.values[width] for width, value in self.values.items()})

    def scaled(self, factor: float) -> LayerMoments:
        """All moments times a number."""
        return LayerMoments(self.names, {width: factor * value for width, value in self.values.items()})

    def packed(self) -> dict[str, Tensor]:
        """Upper triangles by width, for safetensors."""
        return {f"moments.{width}": pack_symmetric(value) for width, value in self.values.items()}

    @classmethod
    def unpacked(cls, names: dict[int, tuple[str, ...]], tensors: Mapping[str, Tensor]) -> LayerMoments:
        """The inverse of :meth:`packed`."""
        return cls(names, {width: unpack_symmetric(tensors[f"moments.{width}"]) for width in names})

    def to(self, device: torch.device) -> LayerMoments:
        """The same moments on another device."""
        return LayerMoments(self.names, {width: value.to(device) for width, value in self.values.items()})


def by_width(modules: Mapping[str, torch.nn.Module]) -> dict[int, tuple[str, ...]]:
    """Names of linear (or branched) layers by the width of their inputs, in the order given."""
    names: dict[int, tuple[str, ...]] = {}
    for name, module in modules.items():
        linear = module.base if isinstance(module, BranchedLinear) else module
        assert isinstance(linear, torch.nn.Linear)
        width = linear.in_features
        names[width] = (*names.get(width, ()), name)
    return names


class MomentRecorder:
    """Streams the inputs of the adapted layers into :class:`SecondMoment` sums, through forward pre-hooks."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], names: dict[int, tuple[str, ...]], device: torch.device):
        self.names = names
        self.sums = {width: SecondMoment(width, len(layers), device) for width, layers in names.items()}
        self.handles = []
        for width, layers in names.items():
            for index, name in enumerate(layers):
                self.handles.append(modules[name].register_forward_pre_hook(self._hook(width, index)))

    def _hook(self, width: int, index: int):  # type: ignore[no-untyped-def]
        def record(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.sums[width].update_layer(index, inputs[0].detach())

        return record

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def value(self) -> LayerMoments:
        """The moments seen so far."""
        return LayerMoments(self.names, {width: sums.value() for width, sums in self.sums.items()})
