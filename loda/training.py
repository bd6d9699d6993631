"""The one training loop that all methods share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loda.augment import augment
from loda.backbone import Backbone
from loda.distributed import WorkerGroup
from loda.errors import StageError
from loda.head import CosineHead, cosface_loss
from loda.losses import EpochLosses
from loda.methods.base import Batch, Learner, Method
from loda.seeds import generator
from loda.settings import HeadSettings, TrainingSettings

EpochCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainingLog:
    """Mean loss of each epoch, and the seconds that each took."""

    losses: list[float]
    seconds: list[float]


def trainable_parameters(model: Backbone) -> list[Tensor]:
    """The attached tensors that are trained, layer after layer, then those that all layers share."""
    tensors = [tensor for branched in model.attached.values() for tensor in branched.trainable()]
    return [*tensors, *(parameter for parameter in model.shared.parameters() if parameter.requires_grad)]


def build_optimizer(
    branch_parameters: list[Tensor], head_parameters: list[Tensor], training: TrainingSettings
) -> torch.optim.Optimizer:
    """The run's optimiser, the branches' parameters first; Adam's other values are torch's defaults."""
    groups = [
        {"params": branch_parameters, "lr": training.lr},
        {"params": head_parameters, "lr": training.head_lr or training.lr},
    ]
    options: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay, "foreach": True}
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, **options)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[training.optimizer](groups, **options)


def train_task(
    model: Backbone,
    method: Method,
    head: CosineHead,
    images_NCHW: Tensor,
    labels_N: Tensor,
    training: TrainingSettings,
    head_settings: HeadSettings,
    draw_names: tuple[object, ...],
    group: WorkerGroup,
    on_epoch: EpochCallback | None = None,
    tasks_N: Tensor | None = None,
) -> TrainingLog:
    """Train the attached branches and the task's head: learning rate cosine per epoch.

    Args:
        images_NCHW: uint8 training images of the task.
        labels_N: 0-based within the task.
        draw_names: what, beside ``training.seed``, names this task's random draws.
        group: data-parallel workers; each computes its share of every batch (or half batch, under GAO), so the
            batches are those of a single worker and gradients agree with its up to rounding.
        tasks_N: each image's task, for the joint methods that know it.

    Raises:
        StageError: the loss is no longer finite.
    """
    branch_parameters = trainable_parameters(model)
    head_parameters: list[Tensor] = list(head.parameters())
    optimizer = build_optimizer(branch_parameters, head_parameters, training)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / training.epochs))
    )
    order_draws = generator(training.seed, "batches", *draw_names)
    view_draws = generator(training.seed, "augmentation", *draw_names)
    learner = Learner(
        branch_parameters=branch_parameters,
        head_parameters=head_parameters,
        step=optimizer.step,
        reduce_gradients=group.sum_,
        generator=generator(training.seed, "method", *draw_names),
        model=model,
        lr=lambda: float(optimizer.param_groups[0]["lr"]),
    )
    losses, seconds = [], []
    for epoch in range(training.epochs):
        started = time.perf_counter()
        epoch_losses = EpochLosses(epoch, training.epochs, model.device, group)
        for index_B in torch.randperm(len(labels_N), generator=order_draws).split(training.batch_size):
            views_BCHW = augment(images_NCHW[index_B].to(model.device).float() / 255, training.augmentation, view_draws)
            inputs_BCHW, tasks_B = model.normalize(views_BCHW), None if tasks_N is None else tasks_N[index_B]
            batch = _batch(model, method, head, inputs_BCHW, labels_N[index_B], head_settings, group, tasks_B)
            epoch_losses.add(method.training_step(learner, batch))
        losses.append(epoch_losses.mean())
        schedule.step()
        # The loss is taken before the step: what the last step led to is only seen in the weights.
        finite = [torch.isfinite(tensor).all() for tensor in (*branch_parameters, *head_parameters)]
        if not bool(torch.stack(finite).all()):
            raise StageError(
                f"the weights are no longer finite after epoch {epoch + 1} of {training.epochs}: training diverged; "
                "lower training.lr (or, for LoDA, method.rho_max)"
            )
        seconds.append(time.perf_counter() - started)
        if on_epoch is not None:
            on_epoch(epoch + 1, training.epochs)
    return TrainingLog(losses, seconds)


def _batch(
    model: Backbone,
    method: Method,
    head: CosineHead,
    inputs_BCHW: Tensor,
    labels_B: Tensor,
    settings: HeadSettings,
    group: WorkerGroup,
    tasks_B: Tensor | None = None,
) -> Batch:
    own_labels_B = labels_B.to(model.device)
    own_tasks_B = None if tasks_B is None else tasks_B.to(model.device)
    parameters = [*trainable_parameters(model), *head.parameters()] if group.size > 1 else []

    def loss_of(indices: Tensor) -> Tensor:
        loss, penalty = data_loss(indices), method.penalty(model)
        return loss if penalty is None else loss + penalty / group.size

    def data_loss(indices: Tensor) -> Tensor:
        share = group.share(indices)
        if (
            len(share) == 0 and not method.exchanges_in_forward
        ):  # more workers than images: an empty share still has a (zero) gradient to sum
            return torch.stack([(parameter * 0).sum() for parameter in parameters]).sum()
        whole = len(share) == len(labels_B)
        share = share.to(model.device)
        tasks = own_tasks_B if own_tasks_B is None or whole else own_tasks_B[share]
        features = model.features(inputs_BCHW if whole else inputs_BCHW[share], tasks)
        labels = own_labels_B if whole else own_labels_B[share]
        return cosface_loss(head(features), labels, settings.scale, settings.margin) / len(indices)

    return Batch(labels=labels_B, loss_of=loss_of, tasks=tasks_B)
