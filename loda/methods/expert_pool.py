"""A pool of rank-1 experts: each batch learns with the few that its class tokens vote for; the most used are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.methods.base import Batch, Learner, Method, MethodSettings, Observation, rank_problems
from loda.seeds import generator


class ExpertPoolSettings(MethodSettings):
    """Published values are the defaults: 12 experts, 8 at work, 4 merged, orthogonality weight 0.1."""

    name: Literal["expert_pool"] = "expert_pool"
    rank: PositiveInt = Field(12, description="experts, of rank 1 each")
    active: PositiveInt = Field(8, description="experts that a batch uses; capped by rank")
    merged: PositiveInt = Field(4, description="most used experts that a finished task merges; capped by active")
    scale: PositiveFloat = Field(1.0, description="s of the experts' sum")
    orthogonality: float = Field(0.1, ge=0, description="weight of ‖B_currentᵀ B_past‖")
    router_grad: Literal["none", "ste"] = Field("none", description="published code: none; ste: straight-through")
    start_seed: int = Field(0, ge=0, description="experts and router")


class ClassTokenRouter(nn.Module):
    """Chooses one layer's experts for a whole batch: each image votes for its top ones by its class token.

    Args:
        weight_KD: (K, d_in), a row an expert.
        active: experts that win, 1..K.
        straight_through: whether the router gets the gradient that the experts' soft weights would have.
    """

    def __init__(self, weight_KD: Tensor, active: int, straight_through: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_KD.clone(), requires_grad=straight_through)
        self.active = active
        self.reduce: Callable[[Sequence[Tensor]], None] = lambda votes: None
        self.working_1K = weight_KD.new_ones(1, len(weight_KD))  # in the last pass
        self.usage_K = weight_KD.new_zeros(len(weight_KD), dtype=torch.float64)  # batches that each expert served
        self.counting = False

    def forward(self, x_BND: Tensor) -> Tensor:
        """(1, K) ones for the experts at work and zeros for the others."""
        logits_BK = nn.functional.linear(x_BND[:, 0], self.weight)
        chosen_BK = logits_BK.detach().topk(self.active, dim=-1).indices
        votes_K = torch.zeros_like(self.usage_K).scatter_add_(
            0, chosen_BK.flatten(), torch.ones_like(chosen_BK.flatten(), dtype=torch.float64)
        )
        self.reduce([votes_K])  # over the workers that share the batch: all must use the same experts
        # A stable sort: of two experts with as many votes the first one wins, on every device.
        winners_a = votes_K.sort(descending=True, stable=True).indices[: self.active]
        weights_1K = torch.zeros_like(votes_K).index_fill_(0, winners_a, 1).to(x_BND)[None]
        self.working_1K = weights_1K
        if self.counting:
            self.usage_K += weights_1K[0].double()
        if self.weight.requires_grad and torch.is_grad_enabled() and len(logits_BK):
            soft_1K = logits_BK.softmax(-1).mean(0, keepdim=True) * weights_1K
            return weights_1K + soft_1K - soft_1K.detach()
        return weights_1K


class ExpertPool(Method):
    """``ΔW = s Σ_{i in K} b_i a_iᵀ`` over the 8 of 12 experts that a batch votes for; after the task the 4 most used
    are merged into the backbone and a fresh pool starts, so the model between tasks is plain.

    The loss has ``0.1 · Σ_layers ‖B_currentᵀ B_past‖_F``, with ``B_past`` the unit-length columns of the experts merged
    so far. The router gets no gradient in the published code; ``router_grad: ste`` is a straight-through estimate.

    Ours, where the rule leaves it open: the current columns are those of the batch's experts, so one that isn't chosen
    has a gradient of exactly zero; past columns have unit length, so that the penalty reads directions; the router's
    rows start random, seeded; usage counts the batches of the task's training. The votes of data-parallel workers are
    summed. Merging four of the experts changes the outputs: the head and the class
    means that a task leaves are not those of the eight that a batch was trained with.
    """

    name = "expert_pool"
    summary = "rank-1 experts chosen by the batch's class tokens; the four most used are merged"
    source = "Fa et al. 2026, rank-1 expert pool in a single LoRA (arXiv 2601.22828)"
    Settings = ExpertPoolSettings
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"
    exchanges_in_forward: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Any]] = {
        "method.rank": 12,
        "training.optimizer": "adamw",
        "training.lr": 2e-3,
    }

    settings: ExpertPoolSettings

    def __init__(self, settings: ExpertPoolSettings) -> None:
        super().__init__(settings)
        self.past: dict[str, Tensor] = {}

    def adapt_reads(self, position: int) -> dict[str, Any]:
        exclude = {"name", "merged"} | (set() if position else {"orthogonality"})
        return self.settings.model_dump(exclude=exclude)

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return {"merged": self.settings.merged}

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        return rank_problems("rank", self.settings.rank, widths)

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        read = self.settings
        for name, branched in model.attached.items():
            width = branched.base.in_features
            draws = generator(read.start_seed, "experts", name, observation.position)
            down_KD = (torch.rand(read.rank, width, generator=draws) * 2 - 1) / width**0.5
            for index in range(read.rank):
                branched.add(f"expert{index}", down_KD[index : index + 1], scale=read.scale, train_down=True)
            router_KD = torch.randn(read.rank, width, generator=draws) / width**0.5
            active = min(read.active, read.rank)
            branched.weigh = ClassTokenRouter(router_KD.to(model.device), active, read.router_grad == "ste")

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        for router in _routers(learner.model).values():
            router.reduce, router.counting = learner.reduce_gradients, True
        try:
            return super().training_step(learner, batch)
        finally:
            for router in _routers(learner.model).values():
                router.counting = False

    def penalty(self, model: Backbone) -> Tensor | None:
        if not self.past or not self.settings.orthogonality:
            return None
        terms = []
        for name, branched in model.attached.items():
            assert isinstance(branched.weigh, ClassTokenRouter)
            current_OK = torch.cat([branch.up for branch in branched.branches.values()], dim=1)
            # At B = 0 a norm has no gradient (PyTorch's is zero there), which is the minimum anyway.
            terms.append(torch.linalg.norm((current_OK * branched.weigh.working_1K).mT @ self.past[name]))
        return self.settings.orthogonality * torch.stack(terms).sum()

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        return {f"{name}.usage": router.usage_K for name, router in _routers(model).items()}

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        count = min(self.settings.merged, self.settings.active, self.settings.rank)
        for name, branched in model.attached.items():
            usage_K = self.trained[f"{name}.usage"]
            kept = usage_K.sort(descending=True, stable=True).indices[:count].sort().values.tolist()
            branches = [branched.branches[f"expert{index}"] for index in kept]
            self.facts.setdefault("merged_experts", {})[name] = kept
            factors[f"{name}.up"] = torch.cat([branch.scaled_up() for branch in branches], dim=1)
            factors[f"{name}.down"] = torch.cat([branch.down.detach() for branch in branches])
            columns_Ok = nn.functional.normalize(factors[f"{name}.up"], dim=0)
            self.past[name] = torch.cat([self.past[name], columns_Ok], dim=1) if name in self.past else columns_Ok
        return factors

    def state_tensors(self) -> dict[str, Tensor]:
        return self.past

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.past = {name: tensor.to(model.device) for name, tensor in tensors.items()}


def _routers(model: Backbone) -> dict[str, ClassTokenRouter]:
    return {n: b.weigh for n, b in model.attached.items() if isinstance(b.weigh, ClassTokenRouter)}
