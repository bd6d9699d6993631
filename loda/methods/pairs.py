"""What methods with one LoRA pair a task share: its settings and its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Method, MethodSettings, Observation, rank_problems
from loda.seeds import generator


class PairSettings(MethodSettings):
    """LoRA with PEFT's start: A uniform in ±1/√d_in, B zero."""

    rank: PositiveInt = Field(16, description="as many directions as LoDA's two branches of 8")
    scale: PositiveFloat = Field(1.0, description="α / r")
    start_seed: int = Field(0, ge=0)


def random_down(rank: int, width: int, seed: int, *names: object) -> Tensor:
    """(r, d_in) uniform in ±1/√d_in, drawn by name."""
    draws = generator(seed, "lora start", *names)
    return (torch.rand(rank, width, generator=draws) * 2 - 1) / width**0.5


class PairMethod(Method):
    """A fresh pair for each task on top of the merged earlier ones."""

    Settings = PairSettings

    settings: PairSettings

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        return rank_problems("rank", self.settings.rank, widths)

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for name, branched in model.attached.items():
            width = branched.base.in_features
            down_rD = random_down(self.settings.rank, width, self.settings.start_seed, name, observation.position)
            branched.add("lora", down_rD, scale=self.settings.scale, train_down=True)


class CarriedPair(PairMethod):
    """A method that carries one pair from task to task: ``<layer>.down``, ``<layer>.up`` and what else it keeps.

    Its weights are ``W_0`` and the newest task's change, never a sum over tasks; W_0 lies under the pair in training.
    """

    def __init__(self, settings: PairSettings) -> None:
        super().__init__(settings)
        self.pair: dict[str, Tensor] = {}

    def weights_at_rest(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        return factors[-1:]

    def weights_in_training(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        return ()

    def state_tensors(self) -> dict[str, Tensor]:
        return self.pair

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.pair = {name: tensor.to(model.device) for name, tensor in tensors.items()}
