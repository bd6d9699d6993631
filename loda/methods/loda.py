"""LoDA: low-rank decomposition and adaptation (He et al. 2026, arXiv 2603.00191)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.gao import RhoScale, class_halves, gradient_aligned_step
from loda.methods.base import Batch, Learner, Method, MethodSettings, Observation
from loda.moments import LayerMoments
from loda.recalibration import RecalibrationKind, recalibration
from loda.subspace import Subspace, general_subspace, isolated_subspace

# Published. They change the effective learning rate (by 48x and 12x), so they are not folded into it.
GAMMA_GENERAL = 0.25
GAMMA_ISOLATED = 0.5
DOWN_SCALE = 1 / math.sqrt(3)

# Of the 10-task CIFAR-100 experiment.
PUBLISHED_TRAINING = {
    "training.epochs": 20,
    "training.batch_size": 48,
    "training.lr": 0.005,
    "training.weight_decay": 5e-4,
    "training.augmentation.crop_scale": 0.05,
    "training.augmentation.flip": True,
    # Crops and flips are all, whatever a study adds.
    **{f"training.augmentation.{key}": 0.0 for key in ("rotation", "shear", "zoom", "shift")},
    "training.augmentation.stretch": 1.0,
    "head.margin": 0.0,
    "backbone.normalization": "none",
}


class LodaSettings(MethodSettings):
    """Published values are the defaults of everything but the ranks (published: 32 on ViT-B/16)."""

    name: Literal["loda"] = "loda"
    rank_general: PositiveInt = 8
    rank_isolated: PositiveInt = 8
    energy_general: float | None = Field(None, gt=0, le=1, description="rank per layer by energy, capped by the rank")
    energy_isolated: float | None = Field(None, gt=0, le=1)
    gao: bool = True
    rho_max: float = Field(0.3, ge=0)
    rho_scale: RhoScale = Field("absolute", description="published: absolute; relative: times each tensor's norm")
    recalibration: RecalibrationKind = "diagonal"
    gamma_m: PositiveFloat = 3.0
    old_count: PositiveFloat = Field(1.0, description="how often a finished task counts; the published code has 2")


class Loda(Method):
    """General branch along what all tasks use, isolated branch along what only the new task uses; both merged.

    Departures, each a setting with the published value as default: energy thresholds, ``recalibration: full``,
    ``rho_scale: relative``; ``old_count`` defaults to 1 where the published code adds each old task twice.
    """

    name = "loda"
    summary = "general and isolated low-rank subspaces, gradient-aligned steps, recalibrated merge"
    source = "He et al. 2026, ICML (arXiv 2603.00191)"
    Settings = LodaSettings
    reobserves: ClassVar[bool] = True
    remembers_moments: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Any]] = {
        "method.rank_general": 32,
        "method.rank_isolated": 32,
        "method.rho_max": 0.3,
        "method.old_count": 2.0,
        **PUBLISHED_TRAINING,
    }

    settings: LodaSettings

    def __init__(self, settings: LodaSettings) -> None:
        super().__init__(settings)
        self.old: LayerMoments | None = None

    def adapt_reads(self, position: int) -> dict[str, Any]:
        read = self.settings
        reads: dict[str, Any] = {"rank_general": read.rank_general, "energy_general": read.energy_general}
        if position > 0:
            reads |= {"rank_isolated": read.rank_isolated, "energy_isolated": read.energy_isolated}
        if read.gao and read.rho_max > 0:
            reads |= {"rho_max": read.rho_max, "rho_scale": read.rho_scale}
        return reads | {"gao": read.gao}

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        reads: dict[str, Any] = {"old_count": self.settings.old_count}
        if position > 0:
            reads["recalibration"] = self.settings.recalibration
            if self.settings.recalibration != "none":
                reads["gamma_m"] = self.settings.gamma_m
        return reads

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        found = []
        for key in ("rank_general", "rank_isolated"):
            rank = getattr(self.settings, key)
            layer, (width, _) = min(widths.items(), key=lambda item: item[1][0])
            if rank > width:
                found.append(f"method.{key}: {rank} exceeds the width {width} of layer {layer!r}; use at most {width}")
        return found

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for width, names in observation.moments.names.items():
            new = observation.moments.values[width]
            old = self.old.values[width] if self.old is not None else None
            general = general_subspace(
                new if old is None else old + new, self.settings.rank_general, self.settings.energy_general
            )
            # Task 1 has no old inputs to stay clear of: one branch, and its down-projection is trained as well.
            self._add(model, "general", names, general, GAMMA_GENERAL, train_down=old is None)
            if old is not None:
                isolated = isolated_subspace(new, old, self.settings.rank_isolated, self.settings.energy_isolated)
                self._add(model, "isolated", names, isolated, GAMMA_ISOLATED, train_down=False)

    def _add(
        self, model: Backbone, kind: str, names: tuple[str, ...], found: Subspace, scale: float, train_down: bool
    ) -> None:
        for index, name in enumerate(names):
            rank = int(found.ranks[index])
            down_rD = found.basis[index, :, :rank].mT * DOWN_SCALE
            model.attached[name].add(kind, down_rD, scale=scale, train_down=train_down)
            values = found.eigenvalues[index].clamp_min(0)
            self.facts.setdefault(f"rank_{kind}", {})[name] = rank
            share = float(values[:rank].sum() / values.sum().clamp_min(torch.finfo(torch.float64).tiny))
            self.facts.setdefault(f"energy_{kind}", {})[name] = share
            if kind == "isolated":
                self.facts.setdefault("ridge", {})[name] = float(found.ridge[index])

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        if not self.settings.gao:
            return super().training_step(learner, batch)
        halves = class_halves(batch.labels, learner.generator)
        rho = self.settings.rho_max * float(torch.rand((), generator=learner.generator))
        return gradient_aligned_step(
            batch.loss_of,
            halves,
            rho,
            learner.branch_parameters,
            learner.head_parameters,
            learner.step,
            learner.reduce_gradients,
            self.settings.rho_scale,
        )

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        factors = super().merged(model, observation, adapted)
        if self.old is None:
            return factors
        assert adapted is not None
        for width, names in observation.moments.names.items():
            for index, name in enumerate(names):
                branches = model.attached[name].branches
                general, isolated = branches["general"], branches["isolated"]
                matrix_rr = recalibration(
                    general.down.detach(),
                    self.old.values[width][index],
                    adapted.values[width][index],
                    self.settings.gamma_m,
                    self.settings.recalibration,
                )
                self.facts.setdefault("recalibration_mean", {})[name] = float(matrix_rr.diagonal().mean())
                up_Or = (general.up.detach().to(torch.float64) @ matrix_rr).to(general.up.dtype)
                factors[f"{name}.up"] = torch.cat([general.scale * up_Or, isolated.scale * isolated.up.detach()], dim=1)
                factors[f"{name}.down"] = torch.cat([general.down.detach(), isolated.down.detach()])
        return factors

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        assert merged is not None
        finished = merged.scaled(self.settings.old_count)
        self.old = finished if self.old is None else self.old + finished

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self.old is None else self.old.packed()

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.old = LayerMoments.unpacked(model.layers_by_width, tensors).to(model.device)
