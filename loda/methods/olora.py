"""O-LoRA: a new pair a task, its rows pushed to be orthogonal to those of the earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.pairs import PairMethod, PairSettings
from loda.moments import LayerMoments


class OLoraSettings(PairSettings):
    """Published: weight of the penalty 0.5, learning rate 1e-3."""

    name: Literal["olora"] = "olora"  # type: ignore[assignment]
    orthogonality: float = Field(0.5, ge=0, description="λ₁, weight of the penalty")


class OLora(PairMethod):
    """``λ₁ Σ |A_old A_newᵀ|`` joins the loss, summed over all layers, earlier tasks and entries; ranks add up.

    Earlier pairs are merged, which freezes them; their A are kept for the penalty.
    """

    name = "olora"
    summary = "a new LoRA pair a task, pushed to be orthogonal to the earlier ones"
    source = "Wang et al. 2023, EMNLP Findings, O-LoRA (arXiv 2310.14152)"
    Settings = OLoraSettings
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"
    published: ClassVar[Mapping[str, Any]] = {
        "method.orthogonality": 0.5,
        "training.optimizer": "adamw",
        "training.lr": 1e-3,
    }

    settings: OLoraSettings

    def __init__(self, settings: OLoraSettings) -> None:
        super().__init__(settings)
        self.rows: dict[str, Tensor] = {}  # (Σr, d_in), earlier tasks' down-projections

    def adapt_reads(self, position: int) -> dict[str, Any]:
        reads = super().adapt_reads(position)
        if position == 0:
            del reads["orthogonality"]
        return reads

    def penalty(self, model: Backbone) -> Tensor | None:
        if not self.rows or self.settings.orthogonality == 0:
            return None
        overlaps = [
            (self.rows[name] @ branched.branches["lora"].down.mT).abs().sum()
            for name, branched in model.attached.items()
        ]
        return self.settings.orthogonality * torch.stack(overlaps).sum()

    def merged(self, model: Backbone, observation: Any, adapted: LayerMoments | None) -> dict[str, Tensor]:
        for name, branched in model.attached.items():
            down_rD = branched.branches["lora"].down.detach().clone()
            self.rows[name] = torch.cat([self.rows[name], down_rD]) if name in self.rows else down_rD
        return super().merged(model, observation, adapted)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.rows

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.rows = {name: tensor.to(model.device) for name, tensor in tensors.items()}
