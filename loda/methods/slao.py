"""SLAO (Merge before Forget): one pair fine-tuned task after task, and a running average of it that predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Observation
from loda.methods.pairs import CarriedPair, PairSettings
from loda.moments import LayerMoments


class SlaoSettings(PairSettings):
    """Published: rank 8."""

    name: Literal["slao"] = "slao"  # type: ignore[assignment]


def orthonormal_rows(down_rD: Tensor) -> Tensor:
    """The same row space with orthonormal rows, by a QR decomposition with a positive diagonal."""
    Q_Dr, R_rr = torch.linalg.qr(down_rD.double().mT)
    signs_r = R_rr.diagonal().sign()
    return (Q_Dr * torch.where(signs_r == 0, torch.ones_like(signs_r), signs_r)).mT.to(down_rD)


class Slao(CarriedPair):
    """B starts at the last fine-tuned B, A at the orthonormalised rows of the last fine-tuned A; both are trained.

    Afterwards ``A_m = A_t`` and ``B_m += (B_t - B_m) / √t``; the model predicts with ``W_0 + s B_m A_m``. The first
    merge takes the pair as it is. W_0 lies under the pair while it is trained.
    """

    name = "slao"
    summary = "one LoRA pair fine-tuned on, orthonormal restarts, up-projections averaged over time"
    source = "Qiao and Mahdavi 2026, ICLR, Merge before Forget (arXiv 2512.23017)"
    Settings = SlaoSettings
    published: ClassVar[Mapping[str, Any]] = {"method.rank": 8}

    settings: SlaoSettings

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        if not self.pair:
            return super().begin_task(model, observation)
        model.attach()
        for name, branched in model.attached.items():
            down_rD = orthonormal_rows(self.pair[f"{name}.down"])
            branched.add("lora", down_rD, self.pair[f"{name}.up"], scale=self.settings.scale, train_down=True)
        return None

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        weight = 1 / math.sqrt(observation.position + 1)
        factors: dict[str, Tensor] = {}
        for name, branched in model.attached.items():
            branch = branched.branches["lora"]
            up_Or, down_rD = branch.up.detach().clone(), branch.down.detach().clone()
            before_Or = self.pair.get(f"{name}.merged", torch.zeros_like(up_Or))
            merged_Or = torch.lerp(before_Or, up_Or, weight)
            self.pair |= {f"{name}.down": down_rD, f"{name}.up": up_Or, f"{name}.merged": merged_Or}
            factors |= {f"{name}.up": branch.number * merged_Or, f"{name}.down": down_rD}
        return factors
