"""MTL-LoRA: one shared down-projection, a mixing matrix for each task, several up-projections that tasks weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.methods.base import Observation
from loda.methods.pairs import PairMethod, PairSettings, random_down
from loda.seeds import generator

PARTS = ("down", "ups", "mixing", "weighing")


class MtlLoraSettings(PairSettings):
    """Published: three up-projections."""

    name: Literal["mtllora"] = "mtllora"  # type: ignore[assignment]
    ups: PositiveInt = Field(3, description="up-projections that the tasks share")
    temperature: PositiveFloat = Field(1.0, description="τ of the tasks' weights on them")


class TaskMixture(nn.Module):
    """One layer's ``s Σ_i softmax(w_t/τ)_i B_i Λ_t A x``, for images of several tasks at once.

    Args:
        down_rD: (r, d_in) A.
        ups_nOr: (n, d_out, r) B_1..B_n.
        mixing_Trr: (T, r, r) Λ_t.
        weighing_Tn: (T, n) w_t.
        tasks: gives the passing images' tasks (B,).
    """

    def __init__(
        self,
        down_rD: Tensor,
        ups_nOr: Tensor,
        mixing_Trr: Tensor,
        weighing_Tn: Tensor,
        scale: float,
        temperature: float,
        tasks: Callable[[], Tensor | None],
    ) -> None:
        super().__init__()
        self.down, self.ups = nn.Parameter(down_rD.clone()), nn.Parameter(ups_nOr.clone())
        self.mixing, self.weighing = nn.Parameter(mixing_Trr.clone()), nn.Parameter(weighing_Tn.clone())
        self.scale = scale
        self.temperature = temperature
        self.tasks = tasks

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, d_out)."""
        tasks_B = self.tasks()
        if tasks_B is None:
            raise ValueError("mtllora needs each image's task; pass tasks_B to Backbone.features")
        # A product with one-hot rows, not a look-up: its gradient is summed in a fixed order on every device.
        chosen_BT = F.one_hot(tasks_B, len(self.mixing)).to(x_BND)
        mixing_Brr = torch.einsum("bt,tsr->bsr", chosen_BT, self.mixing)
        weights_Bn = chosen_BT @ (self.weighing / self.temperature).softmax(-1)
        up_BOr = torch.einsum("bn,nor->bor", weights_Bn, self.ups)
        narrow_BNr = F.linear(x_BND, self.down) @ mixing_Brr.mT
        return self.scale * (narrow_BNr @ up_BOr.mT)


class MtlLora(PairMethod):
    """Joint training with the task of each image known, and needed again to predict.

    Λ_t starts at the identity and the B_i at zero; with one up-projection and Λ = I it is plain LoRA. Evaluation
    tells it each image's task and chooses among all classes; ``correct_without_task_id`` in an evaluation's meta is
    the figure without: the largest logit over tasks, each for its own classes.

    Ours, where the rule leaves it open: w_t starts standard normal, or the B_i, which start alike, would stay alike for
    ever; τ is 1.
    """

    name = "mtllora"
    summary = "joint LoRA with a mixing matrix a task and shared, weighed up-projections"
    source = "Yang et al. 2024, MTL-LoRA (arXiv 2410.09437)"
    Settings = MtlLoraSettings
    mergeable: ClassVar[bool] = False
    export_refusal: ClassVar[str] = "its weights depend on each image's task"
    prediction = "by task"
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"
    joint: ClassVar[bool] = True
    knows_tasks: ClassVar[bool] = True
    needs_task_id: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Any]] = {"method.ups": 3}

    settings: MtlLoraSettings

    def __init__(self, settings: MtlLoraSettings) -> None:
        super().__init__(settings)
        self.tensors: dict[str, Tensor] = {}

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        read, tasks = self.settings, observation.tasks
        for name, branched in model.attached.items():
            down_rD = random_down(read.rank, branched.base.in_features, read.start_seed, name)
            ups_nOr = torch.zeros(read.ups, branched.base.out_features, read.rank)
            mixing_Trr = torch.eye(read.rank).repeat(tasks, 1, 1)
            weighing_Tn = torch.randn(tasks, read.ups, generator=generator(read.start_seed, "weighing", name))
            self._add(model, name, down_rD, ups_nOr, mixing_Trr, weighing_Tn)

    def _add(
        self, model: Backbone, layer: str, down_rD: Tensor, ups_nOr: Tensor, mixing_Trr: Tensor, weighing_Tn: Tensor
    ) -> TaskMixture:
        scale, temperature = self.settings.scale, self.settings.temperature
        mixture = TaskMixture(down_rD, ups_nOr, mixing_Trr, weighing_Tn, scale, temperature, lambda: model.tasks_B).to(
            model.device
        )
        model.attached[layer].extra = mixture
        return mixture

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        return {
            f"{layer}.{part}": getattr(branched.extra, part).detach()
            for layer, branched in model.attached.items()
            for part in PARTS
        }

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        self.tensors = dict(self.trained)
        return {}

    def attach_for_prediction(self, model: Backbone) -> None:
        if not self.tensors:
            return
        model.attach()
        for layer in model.attached:
            down_rD, ups_nOr, mixing_Trr, weighing_Tn = (self.tensors[f"{layer}.{part}"] for part in PARTS)
            self._add(model, layer, down_rD, ups_nOr, mixing_Trr, weighing_Tn).requires_grad_(False)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
