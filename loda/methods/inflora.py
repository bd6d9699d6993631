"""InfLoRA: train B alone, with A chosen inside what earlier tasks' inputs leave free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.memory import SubspaceMemory
from loda.methods.base import Method, MethodSettings, Observation, rank_problems
from loda.moments import LayerMoments
from loda.subspace import fix_signs

DOWN_SCALE = 1 / math.sqrt(3)  # published


class InfLoraSettings(MethodSettings):
    """Published: rank 10; the protected share rises from 0.95-0.98 towards 1 over the tasks."""

    name: Literal["inflora"] = "inflora"
    rank: PositiveInt = Field(16, description="as many directions as LoDA's two branches of 8")
    energy: float = Field(0.98, gt=0, le=1, description="protected share of the inputs' energy after the first task")
    energy_tasks: PositiveInt = Field(10, description="tasks over which the protected share rises to 1")


class InfLora(Method):
    """``A`` = top r left singular vectors of ``(I - MMᵀ) S``, over √3, frozen; B starts at zero; BA is merged.

    M holds the inputs of earlier tasks (:class:`loda.memory.SubspaceMemory`): ``ΔW M = 0``. Where most of a layer's
    width is protected the memory keeps the free directions in M's stead, and ΔW lives in those. A layer with fewer than
    r free directions gets as many as it has. S is per token, as LoDA's is, where the authors' code sums.
    """

    name = "inflora"
    summary = "B alone is trained, along input directions that earlier tasks left free"
    source = "Liang and Li 2024, CVPR, InfLoRA (arXiv 2404.00228)"
    Settings = InfLoraSettings
    remembers_moments: ClassVar[bool] = True
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "bounded"
    published: ClassVar[Mapping[str, Any]] = {
        "method.rank": 10,
        "method.energy": 0.98,
        "training.optimizer": "adam",
        "training.lr": 5e-4,
        "training.batch_size": 128,
    }

    settings: InfLoraSettings

    def __init__(self, settings: InfLoraSettings) -> None:
        super().__init__(settings)
        self.memory = SubspaceMemory()

    def adapt_reads(self, position: int) -> dict[str, Any]:
        return {"rank": self.settings.rank}

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return {"threshold": self.threshold(position)}

    def threshold(self, position: int) -> float:
        """The share of a task's input energy that the memory holds after it."""
        rise = (1 - self.settings.energy) * position / self.settings.energy_tasks
        return min(1.0, self.settings.energy + rise)

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        return rank_problems("rank", self.settings.rank, widths)

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for width, names in observation.moments.names.items():
            for index, name in enumerate(names):
                down_rD = self._down(name, observation.moments.values[width][index])
                model.attached[name].add("inflora", down_rD, scale=1.0, train_down=False)
                self.facts.setdefault("rank", {})[name] = len(down_rD)

    def _down(self, name: str, S_DD: Tensor) -> Tensor:
        if name not in self.memory.bases:
            vectors_Df = torch.linalg.eigh(S_DD).eigenvectors.flip(1)
        else:  # inside the free directions F: the left singular vectors of FFᵀS are F times those of FᵀS
            free_Df = self.memory.free(name)
            vectors_Df = free_Df @ torch.linalg.svd(free_Df.mT @ S_DD, full_matrices=False).U
        return fix_signs(vectors_Df[:, : self.settings.rank]).mT * DOWN_SCALE

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        assert merged is not None
        for width, names in merged.names.items():
            for index, name in enumerate(names):
                self.memory.grow(name, merged.values[width][index], self.threshold(observation.position))
                self.facts.setdefault("free", {})[name] = int(self.memory.free(name).shape[1])

    def state_tensors(self) -> dict[str, Tensor]:
        return self.memory.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.memory.load_state_tensors(tensors, model.device)
