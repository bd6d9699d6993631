"""CoSO: full weights trained by low-rank steps in subspaces that follow the gradient, off those of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.memory import SubspaceMemory
from loda.methods.base import Batch, Learner, Method, MethodSettings, Observation, rank_problems
from loda.moments import LayerMoments
from loda.sketch import FrequentDirections
from loda.subspace import fix_signs

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's usual values


class CosoSettings(MethodSettings):
    """Published: rank 15 to 70, a new subspace every 1 to 20 steps, protected share 0.98."""

    name: Literal["coso"] = "coso"
    rank: PositiveInt = Field(16, description="of each step; as many directions as LoDA's two branches of 8")
    refresh: PositiveInt = Field(10, description="steps from one subspace to the next")
    sketch: PositiveInt = Field(64, description="rows of the sketch of a task's updates")
    energy: float = Field(0.98, gt=0, le=1, description="share of the updates' energy that is protected afterwards")


@dataclass
class LayerState:
    """One layer's subspace, Adam's averages in it, and what its updates have spanned so far."""

    free_Df: Tensor
    sketch: FrequentDirections
    basis_Dr: Tensor
    mean_Or: Tensor
    square_Or: Tensor
    moved_rr: Tensor  # Σ stepᵀstep since the last refresh


class Coso(Method):
    """``G ← G (I - MMᵀ)``; every K steps its r leading right singular vectors V; Adam on GV; ``W -= lr · step Vᵀ``.

    A Frequent-Directions sketch of the updates grows M after the task, so ``(W_t - W_{t-1}) M = 0``, for any optimiser
    that works in V: Adam's averages are turned along with V (ours: the mean by ``VᵀV'``, the squares by its entries
    squared), and there is no weight decay on the weights. There is no LoRA: a task's change has any rank, and is
    merged as it is. The head is trained by the run's optimiser, the weights always by Adam.
    """

    name = "coso"
    summary = "full weights, by low-rank Adam steps off the subspaces of earlier tasks' updates"
    source = "Cheng et al. 2025, NeurIPS, CoSO (arXiv 2505.11816)"
    Settings = CosoSettings
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "bounded"
    # The low ends of the published ranges, 15 to 70 and 1 to 20, which differ by benchmark.
    published: ClassVar[Mapping[str, Any]] = {"method.rank": 15, "method.refresh": 1, "method.energy": 0.98}

    settings: CosoSettings

    def __init__(self, settings: CosoSettings) -> None:
        super().__init__(settings)
        self.memory = SubspaceMemory()
        self.layers: dict[str, LayerState] = {}
        self.steps = 0

    def adapt_reads(self, position: int) -> dict[str, Any]:
        return self.settings.model_dump(exclude={"name", "energy"})

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return {"energy": self.settings.energy}

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        return rank_problems("rank", self.settings.rank, widths)

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for name, branched in model.attached.items():
            d_in, d_out = branched.base.in_features, branched.base.out_features
            branched.add_change()

            def zeros(*shape: int) -> Tensor:
                return torch.zeros(*shape, dtype=torch.float64, device=model.device)

            free_Df = self.memory.free(name) if name in self.memory.bases else torch.eye(d_in).to(zeros(1))
            sketch = FrequentDirections(d_in, self.settings.sketch, model.device)
            self.layers[name] = LayerState(
                free_Df, sketch, zeros(d_in, 0), zeros(d_out, 0), zeros(d_out, 0), zeros(0, 0)
            )

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        loss = batch.loss_of(batch.indices)
        weights, heads = learner.branch_parameters, learner.head_parameters
        gradients = list(torch.autograd.grad(loss, [*weights, *heads], materialize_grads=True))
        learner.reduce_gradients(gradients)
        self.steps += 1
        for layer, weight, gradient in zip(self.layers.values(), weights, gradients[: len(weights)], strict=True):
            if (self.steps - 1) % self.settings.refresh == 0:
                self._refresh(layer, gradient)
            with torch.no_grad():
                weight -= (self._step(layer, gradient, learner.lr()) @ layer.basis_Dr.mT).to(weight)
        for weight in weights:
            weight.grad = None  # the run's optimiser passes them over
        for head, gradient in zip(heads, gradients[len(weights) :], strict=True):
            head.grad = gradient
        learner.step()
        return loss.detach()

    def _refresh(self, layer: LayerState, gradient_OD: Tensor) -> None:
        """The leading right singular vectors of the projected gradient; Adam's averages follow."""
        self._note(layer)
        projected_Of = gradient_OD.double() @ layer.free_Df
        vectors_ff = torch.linalg.eigh(projected_Of.mT @ projected_Of).eigenvectors.flip(1)
        basis_Dr = fix_signs(layer.free_Df @ vectors_ff[:, : self.settings.rank])
        turn_rr = layer.basis_Dr.mT @ basis_Dr
        layer.mean_Or, layer.square_Or = layer.mean_Or @ turn_rr, layer.square_Or @ turn_rr.square()
        layer.basis_Dr, layer.moved_rr = basis_Dr, basis_Dr.new_zeros(basis_Dr.shape[1], basis_Dr.shape[1])

    def _step(self, layer: LayerState, gradient_OD: Tensor, lr: float) -> Tensor:
        """Adam's step (d_out, r) on the gradient's coordinates in the subspace."""
        inside_Or = gradient_OD.double() @ layer.basis_Dr
        layer.mean_Or = torch.lerp(inside_Or, layer.mean_Or, BETAS[0])
        layer.square_Or = torch.lerp(inside_Or.square(), layer.square_Or, BETAS[1])
        mean_Or = layer.mean_Or / (1 - BETAS[0] ** self.steps)
        square_Or = layer.square_Or / (1 - BETAS[1] ** self.steps)
        step_Or = lr * mean_Or / (square_Or.sqrt() + EPSILON)
        layer.moved_rr = layer.moved_rr + step_Or.mT @ step_Or
        return step_Or

    def _note(self, layer: LayerState) -> None:
        """Bring the updates since the last refresh into the sketch: as rows, ``(Σ stepᵀstep)^½ Vᵀ`` are all of them."""
        if layer.moved_rr.shape[0]:
            values_r, vectors_rr = torch.linalg.eigh(layer.moved_rr)
            root_rr = values_r.clamp_min(0).sqrt()[:, None] * vectors_rr.mT
            layer.sketch.update(root_rr @ layer.basis_Dr.mT)

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        for layer in self.layers.values():
            self._note(layer)
        return {name: layer.sketch.sketch_lD for name, layer in self.layers.items()}

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        for name, sketch_lD in self.trained.items():
            self.memory.grow(name, sketch_lD.mT @ sketch_lD, self.settings.energy)
            self.facts.setdefault("free", {})[name] = int(self.memory.free(name).shape[1])

    def state_tensors(self) -> dict[str, Tensor]:
        return self.memory.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.memory.load_state_tensors(tensors, model.device)
