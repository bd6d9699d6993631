"""Sequential LoRA: one pair (A, B), trained on task after task with nothing to protect the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Observation
from loda.methods.loda import PUBLISHED_TRAINING
from loda.methods.pairs import CarriedPair, PairSettings, random_down


class SequentialSettings(PairSettings):
    """As of any LoRA pair."""

    name: Literal["sequential"] = "sequential"  # type: ignore[assignment]


class Sequential(CarriedPair):
    """The usual lower bound: A and B at the start of a task equal those at the end of the task before.

    Its weights are always ``W_0 + scale · B A`` with the newest pair, never a sum over tasks.
    """

    name = "sequential"
    summary = "one LoRA pair, warm-started from task to task"
    source = "Hu et al. 2022, LoRA (arXiv 2106.09685), trained sequentially"
    Settings = SequentialSettings
    published: ClassVar[Mapping[str, Any]] = {"method.rank": 32, **PUBLISHED_TRAINING}  # as LoDA's

    settings: SequentialSettings

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for name, branched in model.attached.items():
            if self.pair:
                down_rD, up_Or = self.pair[f"{name}.down"], self.pair[f"{name}.up"]
            else:
                width = branched.base.in_features
                down_rD = random_down(self.settings.rank, width, self.settings.start_seed, name)
                up_Or = None
            branched.add("lora", down_rD, up_Or, scale=self.settings.scale, train_down=True)

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        for name, branched in model.attached.items():
            branch = branched.branches["lora"]
            self.pair[f"{name}.down"] = branch.down.detach().clone()
            self.pair[f"{name}.up"] = branch.up.detach().clone()
        return super().merged(model, observation, adapted)
