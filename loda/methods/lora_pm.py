"""LoRA-P&M: train each task's pair under perturbations of its size, merge it by a step of least estimated loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Batch, Learner, Observation
from loda.methods.pairs import PairMethod, PairSettings
from loda.moments import LayerMoments


class LoraPmSettings(PairSettings):
    """Published: rank 10, perturbation 0.5, AdamW with learning rate 1e-3."""

    name: Literal["lora_pm"] = "lora_pm"  # type: ignore[assignment]
    perturbation: float = Field(0.5, ge=0, description="ε: each step trains the pair times 1, 1 - ε or 1 + ε")


def merge_step(numerator: float, denominator: float) -> float:
    """``α* = -Σ_i (θ̂ - θ_i*)ᵀF_iΔ / Σ_i ΔᵀF_iΔ``; 1, the plain merge, where no Fisher information tells."""
    return -numerator / denominator if denominator > 0 else 1.0


class LoraPm(PairMethod):
    """A step multiplies the pair by ``1 + ε``, ε from {0, ±0.5} with equal chances; afterwards ``θ̂ += α* Δ``.

    θ̂ are the merged weights, Δ is what the task has changed on top of them, θ_i* = θ̂ + Δ as task i ended, F_i the
    diagonal of the empirical Fisher information there (squares of each image's gradient, images as they are), and α*
    minimises ``Σ_i ½(θ̂ + αΔ - θ_i*)ᵀ F_i (θ̂ + αΔ - θ_i*)`` over the tasks so far, all layers together. One ε a step for
    all layers. ``Σ F_i`` and ``Σ F_i θ_i*`` are all that is kept.
    """

    name = "lora_pm"
    summary = "a new pair a task, trained under perturbed size, merged by a Fisher-weighted step"
    source = "Qiu et al. 2025, Perturb-and-Merge (arXiv 2505.22389)"
    Settings = LoraPmSettings
    published: ClassVar[Mapping[str, Any]] = {
        "method.rank": 10,
        "method.perturbation": 0.5,
        "training.optimizer": "adamw",
        "training.lr": 1e-3,
    }

    settings: LoraPmSettings

    def __init__(self, settings: LoraPmSettings) -> None:
        super().__init__(settings)
        self.sums: dict[str, Tensor] = {}  # <layer>.fisher: Σ F_i; <layer>.weighted: Σ F_i (θ_i* - W_0)

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        choice = int(torch.randint(3, (), generator=learner.generator)) - 1
        branches = [branched.branches["lora"] for branched in learner.model.attached.values()]
        for branch in branches:
            branch.scale = self.settings.scale * (1 + choice * self.settings.perturbation)
        try:
            return super().training_step(learner, batch)
        finally:
            for branch in branches:
                branch.scale = self.settings.scale

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        assert observation.gradients is not None
        return {name: squares_OD.float() for name, squares_OD in observation.gradients.squared().items()}

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        numerator = denominator = 0.0
        for name, branched in model.attached.items():
            base_OD = (branched.base.weight.detach() - model.original[name]).double()
            change_OD = branched.branches["lora"].delta().detach().double()
            fisher_OD = self.trained[name].double()
            total_OD = fisher_OD + self.sums.get(f"{name}.fisher", torch.zeros_like(fisher_OD))
            weighted_OD = fisher_OD * (base_OD + change_OD)
            weighted_OD += self.sums.get(f"{name}.weighted", torch.zeros_like(fisher_OD))
            numerator += float(((total_OD * base_OD - weighted_OD) * change_OD).sum())
            denominator += float((total_OD * change_OD.square()).sum())
            self.sums |= {f"{name}.fisher": total_OD.float(), f"{name}.weighted": weighted_OD.float()}
        step = 1.0 if observation.position == 0 else merge_step(numerator, denominator)
        self.facts["merge_step"] = step
        factors = super().merged(model, observation, adapted)
        return {name: step * tensor if name.endswith(".up") else tensor for name, tensor in factors.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.sums

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.sums = {name: tensor.to(model.device) for name, tensor in tensors.items()}
