"""BiLoRA: each task changes the weights at a few spatial frequencies of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.methods.base import Method, MethodSettings, Observation
from loda.seeds import generator


class BiLoraSettings(MethodSettings):
    """Published: 3000 frequencies a layer."""

    name: Literal["bilora"] = "bilora"
    frequencies: PositiveInt = Field(3000, description="a layer and task; a layer that has fewer gives all")
    scale: PositiveFloat = Field(1.0, description="s of the change")
    frequency_seed: int = Field(0, ge=0, description="draws which frequencies a task gets")


class SpectralChange(nn.Module):
    """One layer's ``ΔW x`` with ``ΔW = s · Re ifft2`` of a spectrum that is zero but at the given frequencies.

    Args:
        spectrum_n: real coefficients.
        frequencies_n2: (n, 2) row and column of each in the spectrum.
        shape: of ΔW, (d_out, d_in).
    """

    def __init__(self, spectrum_n: Tensor, frequencies_n2: Tensor, shape: tuple[int, int], scale: float) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(spectrum_n.clone())
        self.frequencies_n2 = frequencies_n2
        self.shape = shape
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_out)."""
        return F.linear(x, dense(self.scale * self.spectrum, self.frequencies_n2, self.shape))


class BiLora(Method):
    """``ΔW = s · Re ifft2(F)``, F real, trained at 3000 frequencies that are drawn afresh for each task; merged.

    A frequency and its conjugate have the same real part, so they are drawn from a half-plane that holds one of the
    two; any two others are orthogonal. Each layer's half-plane is shuffled once and dealt task by task, so the changes
    of different tasks are exactly orthogonal until all are dealt; then it starts again from the first.

    Ours: the transform is scaled to keep lengths (``norm="ortho"``), so that one learning rate fits layers of any size;
    what a task leaves is its coefficients, not the dense change.
    """

    name = "bilora"
    summary = "a few spatial frequencies of the weights for each task, drawn afresh and orthogonal"
    source = "Zhu et al. 2025, CVPR, BiLoRA"
    Settings = BiLoraSettings
    published: ClassVar[Mapping[str, Any]] = {"method.frequencies": 3000}

    settings: BiLoraSettings

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for name, branched in model.attached.items():
            shape = (branched.base.out_features, branched.base.in_features)
            draws = generator(self.settings.frequency_seed, "frequencies", name)
            frequencies_n2 = dealt_frequencies(shape, self.settings.frequencies, observation.position, draws)
            self.facts.setdefault("frequencies", {})[name] = len(frequencies_n2)
            change = SpectralChange(torch.zeros(len(frequencies_n2)), frequencies_n2, shape, self.settings.scale)
            branched.extra = _on(change, model)

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, branched in model.attached.items():
            assert isinstance(branched.extra, SpectralChange)
            found[f"{name}.coefficients"] = branched.extra.spectrum.detach()
            found[f"{name}.frequencies"] = branched.extra.frequencies_n2
        return found

    def attach_trained(self, model: Backbone) -> None:
        for name, branched in model.attached.items():
            shape = (branched.base.out_features, branched.base.in_features)
            spectrum_n, frequencies_n2 = self.trained[f"{name}.coefficients"], self.trained[f"{name}.frequencies"]
            branched.extra = _on(SpectralChange(spectrum_n, frequencies_n2, shape, self.settings.scale), model)

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for name, branched in model.attached.items():
            factors[f"{name}.coefficients"] = self.settings.scale * self.trained[f"{name}.coefficients"]
            factors[f"{name}.frequencies"] = self.trained[f"{name}.frequencies"]
            factors[f"{name}.shape"] = torch.tensor([branched.base.out_features, branched.base.in_features])
        return factors

    def weights_at_rest(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        return [
            {
                f"{name.removesuffix('.shape')}.delta": _dense_factor(task, name.removesuffix(".shape"))
                for name in task
                if name.endswith(".shape")
            }
            for task in factors
        ]


def half_plane(shape: tuple[int, int]) -> Tensor:
    """(H, 2) rows and columns of one of each pair of conjugate frequencies, and of those that are their own."""
    rows, columns = shape
    flat_F = torch.arange(rows * columns)
    row_F, column_F = flat_F // columns, flat_F % columns
    conjugate_F = (-row_F % rows) * columns + (-column_F % columns)
    kept_F = flat_F <= conjugate_F
    return torch.stack([row_F[kept_F], column_F[kept_F]], dim=1)


def dealt_frequencies(shape: tuple[int, int], count: int, position: int, draws: torch.Generator) -> Tensor:
    """(n, 2) frequencies of the task at this position: the next of the shuffled half-plane, at most all of it."""
    plane_H2 = half_plane(shape)
    plane_H2 = plane_H2[torch.randperm(len(plane_H2), generator=draws)]
    count = min(count, len(plane_H2))
    return plane_H2[(position * count + torch.arange(count)) % len(plane_H2)]


def dense(spectrum_n: Tensor, frequencies_n2: Tensor, shape: tuple[int, int]) -> Tensor:
    """``Re ifft2`` (d_out, d_in) of a spectrum that is zero elsewhere, scaled to keep lengths."""
    spectrum_OD = spectrum_n.new_zeros(shape).index_put((frequencies_n2[:, 0], frequencies_n2[:, 1]), spectrum_n)
    return torch.fft.ifft2(spectrum_OD, norm="ortho").real


def _dense_factor(factors: Mapping[str, Tensor], layer: str) -> Tensor:
    rows, columns = factors[f"{layer}.shape"].tolist()
    return dense(factors[f"{layer}.coefficients"], factors[f"{layer}.frequencies"], (rows, columns))


def _on(change: SpectralChange, model: Backbone) -> SpectralChange:
    change.frequencies_n2 = change.frequencies_n2.to(model.device)
    return change.to(model.device)
