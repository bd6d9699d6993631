"""The one interface of all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.gao import plain_step
from loda.gradients import LossGradients
from loda.moments import LayerMoments
from loda.strict import StrictModel


class MethodSettings(StrictModel):
    """Base of every method's settings."""

    name: str


@dataclass
class Observation:
    """What a pass over the task's training images has shown before it is trained.

    Attributes:
        moments: of the inputs of the adapted layers.
        position: 0 for the first task of an order.
        gradients: of the task's loss, computed when a method asks; None while consolidating.
        tasks: learned at once; more than one for joint methods.
        of_tasks: moments of each task's images alone, for the joint methods that ask (``observes_tasks``).
    """

    moments: LayerMoments
    position: int
    gradients: LossGradients | None = None
    of_tasks: tuple[LayerMoments, ...] = ()
    tasks: int = 1


@dataclass
class Learner:
    """What a training step works with.

    Attributes:
        branch_parameters, head_parameters: leaf tensors that are trained.
        step: the optimiser's step on their ``.grad``.
        reduce_gradients: sums gradients over data-parallel workers, in place.
        generator: the method's own draws.
        model: the backbone with the branches attached.
        lr: the branches' learning rate at this step.
    """

    branch_parameters: list[Tensor]
    head_parameters: list[Tensor]
    step: Callable[[], None]
    reduce_gradients: Callable[[Sequence[Tensor]], None]
    generator: torch.Generator
    model: Backbone
    lr: Callable[[], float]


@dataclass
class Batch:
    """One batch: ``labels`` (B,) are 0-based within the task; ``loss_of`` gives the mean loss of batch indices.

    Labels, tasks and indices are on the CPU: grouping a batch by them doesn't wait for an accelerator.
    ``tasks`` (B,) says which task each image is of, for the joint methods that know it (``knows_tasks``).
    """

    labels: Tensor
    loss_of: Callable[[Tensor], Tensor]
    tasks: Tensor | None = None
    indices: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.indices = torch.arange(len(self.labels), device=self.labels.device)


class Method(ABC):
    """A continual-learning method: what it attaches, how it steps, what it merges and remembers.

    A method is built afresh for each step of a stage; all that survives from task to task goes through
    :meth:`state_tensors` and :meth:`load_state_tensors`, and what training leaves beside the branches goes through
    :meth:`finish_training` and :attr:`trained`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every stage key: raise it when the numbers change
    summary: ClassVar[str]
    source: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]
    trains: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    prediction: ClassVar[Literal["merged", "stacked", "gated", "routed", "by task"]] = "merged"
    needs_task_id: ClassVar[bool] = False  # evaluation tells it the task of each image
    knows_tasks: ClassVar[bool] = False  # joint methods only: training tells it the task of each image
    observes_tasks: ClassVar[bool] = False  # joint methods only: begin_task reads the moments of each task alone
    exchanges_in_forward: ClassVar[bool] = False  # workers with no image of a batch must make the pass all the same
    joint: ClassVar[bool] = False  # all classes in one stage, whatever the order
    reobserves: ClassVar[bool] = False  # end_task reads moments with the branches attached
    remembers_moments: ClassVar[bool] = False  # end_task reads moments after merging
    # With the number of tasks: constant; bounded (grows up to a size that the layers' widths give); linear.
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "constant"
    reconstructed: ClassVar[bool] = False  # by us, where the paper leaves it open and no code is published
    export_refusal: ClassVar[str] = ""  # why the result isn't one plain model with a linear head
    published: ClassVar[Mapping[str, Any]] = {}  # the paper's own values by key path (``loda.methods.preset``)

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.facts: dict[str, Any] = {}  # what the method chose and wants recorded, JSON
        self.trained: Mapping[str, Tensor] = {}  # while consolidating: what finish_training gave

    def adapt_reads(self, position: int) -> dict[str, Any]:
        """The settings that training the task at this position reads: they enter its key, others don't."""
        return self.settings.model_dump(exclude={"name"})

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        """The settings that only merging and remembering read."""
        return {}

    def stream_problems(self, tasks: int) -> list[str]:
        """What is wrong with the settings for a stream of this many tasks."""
        return []

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        """What is wrong with the settings for layers of these (d_in, d_out), by layer name."""
        return []

    @abstractmethod
    def begin_task(self, model: Backbone, observation: Observation) -> None:
        """Attach this task's branches to ``model``."""

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        """Learn from one batch; returns the loss, a detached scalar where it was computed."""
        parameters = [*learner.branch_parameters, *learner.head_parameters]
        return plain_step(batch.loss_of, batch.indices, parameters, learner.step, learner.reduce_gradients)

    def penalty(self, model: Backbone) -> Tensor | None:
        """A term that is added to every loss, whatever the batch."""
        return None

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        """What merging and remembering need of the training beside the branches; the branches are still attached."""
        return {}

    def attach_trained(self, model: Backbone) -> None:
        """Attach again what :meth:`finish_training` gave and the output depends on; the branches are there already."""

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        """The trained branches as factors to merge: ``<layer>.up`` (d_out, k) and ``<layer>.down`` (k, d_in), or a
        change of full rank as ``<layer>.delta`` (d_out, d_in)."""
        factors: dict[str, Tensor] = {}
        for layer, branched in model.attached.items():
            branches = list(branched.branches.values())
            if branches:
                factors[f"{layer}.up"] = torch.cat([branch.scaled_up() for branch in branches], dim=1)
                factors[f"{layer}.down"] = torch.cat([branch.down.detach() for branch in branches])
            if branched.change is not None:
                factors[f"{layer}.delta"] = branched.change.detach()
        return factors

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        """Update the memory after merging; moments are given where the class attributes ask for them."""

    def classifier(self) -> str | None:
        """The method's own final classifier; None: the head section's."""
        return None

    def learn_classifier(self, features_ND: Tensor, labels_N: Tensor) -> None:
        """Update a classifier of the method's own; features after merging, labels 0-based within the task."""

    def logits(self, features_ND: Tensor) -> Tensor:
        """(n, C) over all seen classes, where :meth:`classifier` names something that is no linear head."""
        raise NotImplementedError(f"{self.name} has no classifier of its own")

    def weights_at_rest(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """Which of the tasks' merged factors make up the weights between tasks: all of them."""
        return factors

    def weights_in_training(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """Which of the earlier tasks' factors lie under the branches while a task is trained."""
        return self.weights_at_rest(factors)

    def recorded_modules(self, model: Backbone) -> Mapping[str, nn.Module]:
        """The modules whose inputs' moments ``end_task`` wants: the adapted layers, and its own if it has any."""
        return {name: model.model.get_submodule(name) for name in model.layers}

    def attach_for_prediction(self, model: Backbone) -> None:
        """Put on the weights at rest what can't be merged into them, frozen: gated stacks, routers; by default nothing.

        Called wherever features are computed between tasks, so that class statistics, drift maps, probes and
        predictions are all of the features that the method predicts with.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that must survive to the next task, for safetensors."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        """Take up what :meth:`state_tensors` gave after the task before; not called for the first task."""


def rank_problems(key: str, rank: int, widths: Mapping[str, tuple[int, int]]) -> list[str]:
    """Whether a LoRA pair of this rank is wider than the narrowest side of a layer."""
    layer, width = min(((name, min(size)) for name, size in widths.items()), key=lambda item: item[1])
    if rank <= width:
        return []
    return [f"method.{key}: {rank} exceeds the width {width} of layer {layer!r}; use at most {width}"]
