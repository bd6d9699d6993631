"""Ortho-LoRA: joint training in which tasks whose gradients conflict step around each other, matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loda.methods.base import Batch, Learner
from loda.methods.joint import Joint, JointSettings


class OrthoLoraSettings(JointSettings):
    """As joint LoRA."""

    name: Literal["ortholora"] = "ortholora"  # type: ignore[assignment]


class OrthoLora(Joint):
    """Joint LoRA; in each matrix (each A, each B) a task's gradient loses what opposes another task's.

    For each task i of a batch, and each other task j: if ``⟨g_i', g_j⟩ < 0`` then ``g_i' -= ⟨g_i', g_j⟩/‖g_j‖² g_j``;
    the step is on the sum over tasks. ``g_i`` is the gradient of the task's share of the batch's mean loss, so without
    a conflict the step is plain joint training's, to the bit: changes are added to the gradient of the whole batch.
    The head takes the plain gradient. Ours, where the rule leaves it open: j runs through the tasks in ascending order.
    """

    name = "ortholora"
    summary = "joint LoRA; conflicting task gradients are projected, for each A and each B alone"
    source = "Yang et al. 2026, Ortho-LoRA (arXiv 2601.09684)"
    Settings = OrthoLoraSettings
    knows_tasks: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Any]] = {}  # language models: nothing that carries over

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        assert batch.tasks is not None
        parameters = [*learner.branch_parameters, *learner.head_parameters]
        of_tasks: list[list[Tensor]] = []
        for task in torch.unique(batch.tasks):
            own = batch.indices[batch.tasks == task]
            share = batch.loss_of(own) * (len(own) / len(batch.indices))
            of_tasks.append(list(torch.autograd.grad(share, learner.branch_parameters, materialize_grads=True)))
        loss = batch.loss_of(batch.indices)
        whole = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
        learner.reduce_gradients([*whole, *(gradient for gradients in of_tasks for gradient in gradients)])
        for index, gradients in enumerate(zip(*of_tasks, strict=True)):
            change = surgery(gradients)
            if change is not None:
                whole[index] = whole[index] + change
        for parameter, gradient in zip(parameters, whole, strict=True):
            parameter.grad = gradient
        learner.step()
        return loss.detach()


def surgery(gradients: Sequence[Tensor]) -> Tensor | None:
    """What projecting away conflicts adds to the sum of the tasks' gradients; None: there are none.

    Args:
        gradients: of one matrix, one a task.
    """
    change: Tensor | None = None
    squares = [float(gradient.double().square().sum()) for gradient in gradients]
    for i, gradient in enumerate(gradients):
        kept, moved = gradient.double(), False
        for j, other in enumerate(gradients):
            inner = float((kept * other).sum())
            if j != i and inner < 0:
                kept, moved = kept - inner / squares[j] * other, True
        if moved:
            difference = (kept - gradient).to(gradient.dtype)
            change = difference if change is None else change + difference
    return change
