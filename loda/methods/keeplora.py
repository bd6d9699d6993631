"""KeepLoRA: LoRA that starts along the task's gradient, off what the backbone and earlier tasks rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.memory import SubspaceMemory
from loda.methods.base import Method, MethodSettings, Observation, rank_problems
from loda.moments import LayerMoments
from loda.subspace import fix_signs


class KeepLoraSettings(MethodSettings):
    """Published: rank 16, shares 0.85 of the pre-trained weight and 0.99 of the features."""

    name: Literal["keeplora"] = "keeplora"
    rank: PositiveInt = Field(16, description="as many directions as LoDA's two branches of 8")
    scale: PositiveFloat = Field(1.0, description="α / r")
    energy_weights: float = Field(0.85, gt=0, le=1, description="protected share of the pre-trained weight's energy")
    energy_features: float = Field(0.99, gt=0, le=1, description="protected share of each task's input energy")


class KeepLora(Method):
    """A frozen along the leading right singular vectors of ``Ĝ = G - G M'M'ᵀ``, B trained from ``B₀ = U S``.

    G is the mean gradient of the task's loss at its start; M' = [W_p, M] holds the leading right singular vectors of
    the pre-trained weight and the inputs of earlier tasks, so ``(W_t - W_{t-1}) M' = 0``. ``W' = W - s B₀A`` lies
    under the pair, so that the outputs start unchanged; the branch computes the sum of both, ``s (B - B₀) A``, which
    is also what is merged. Departure from the authors' code [code]: it projects on the output side, where protected
    inputs don't lie.
    """

    name = "keeplora"
    summary = "B alone is trained, along the task's gradient off protected input directions"
    source = "Luo et al. 2026, ICLR, KeepLoRA (arXiv 2601.19659)"
    Settings = KeepLoraSettings
    remembers_moments: ClassVar[bool] = True
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "bounded"
    published: ClassVar[Mapping[str, Any]] = {
        "method.rank": 16,
        "method.energy_weights": 0.85,
        "method.energy_features": 0.99,
        "training.optimizer": "adamw",
        "training.lr": 1e-3,
    }

    settings: KeepLoraSettings

    def __init__(self, settings: KeepLoraSettings) -> None:
        super().__init__(settings)
        self.memory = SubspaceMemory()

    def adapt_reads(self, position: int) -> dict[str, Any]:
        reads = {"rank": self.settings.rank, "scale": self.settings.scale}
        # Later tasks find the weight's directions in the memory that the first one left.
        return reads | ({"energy_weights": self.settings.energy_weights} if position == 0 else {})

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return {"energy_features": self.settings.energy_features}

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        return rank_problems("rank", self.settings.rank, widths)

    def _protect_weights(self, model: Backbone) -> None:
        """M' of the first task: W_p alone."""
        if not self.memory.bases:
            for name in model.layers:
                weight_OD = model.original[name].double()
                self.memory.grow(name, weight_OD.mT @ weight_OD, self.settings.energy_weights)

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        assert observation.gradients is not None, "KeepLoRA starts along the gradient of the task's loss"
        self._protect_weights(model)
        gradients = observation.gradients.mean()
        model.attach()
        for name, branched in model.attached.items():
            free_Df = self.memory.free(name)
            # Ĝ = G FFᵀ with F the free directions: its right singular vectors are F times those of GF.
            U, values, Vh = torch.linalg.svd(gradients[name] @ free_Df, full_matrices=False)
            rank = min(self.settings.rank, len(values))
            down_Dr = free_Df @ Vh[:rank].mT
            signs = (fix_signs(down_Dr) * down_Dr).sum(0).sign()
            start_Or = U[:, :rank] * values[:rank] * signs
            down_rD = (down_Dr * signs).mT
            branched.add("lora", down_rD, start_Or, scale=self.settings.scale, train_down=False, anchor_Or=start_Or)
            self.facts.setdefault("rank", {})[name] = rank

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        self._protect_weights(model)
        return super().merged(model, observation, adapted)

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        assert merged is not None
        for width, names in merged.names.items():
            for index, name in enumerate(names):
                self.memory.grow(name, merged.values[width][index], self.settings.energy_features)
                self.facts.setdefault("free", {})[name] = int(self.memory.free(name).shape[1])

    def state_tensors(self) -> dict[str, Tensor]:
        return self.memory.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.memory.load_state_tensors(tensors, model.device)
