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
from loda.moments import LayerMoments
from loda.strict import StrictModel


class MethodSettings(StrictModel):
    """Base of every method's settings."""

    name: str


@dataclass
class Observation:
    """What a pass over the task's training images has shown before it is trained."""

    moments: LayerMoments
    position: int  # 0 for the first task of an order
    of_tasks: tuple[LayerMoments, ...] = ()  # each task's alone, for methods that ask (``observes_tasks``)


@dataclass
class Learner:
    """What a training step works with.

    Attributes:
        branch_parameters, head_parameters: leaf tensors that are trained.
        step: the optimiser's step on their ``.grad``.
        reduce_gradients: sums gradients over data-parallel workers, in place.
        generator: the method's own draws.
    """

    branch_parameters: list[Tensor]
    head_parameters: list[Tensor]
    step: Callable[[], None]
    reduce_gradients: Callable[[Sequence[Tensor]], None]
    generator: torch.Generator


@dataclass
class Batch:
    """One batch: ``labels`` (B,) are 0-based within the task; ``loss_of`` gives the mean loss of batch indices.

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
    :meth:`state_tensors` and :meth:`load_state_tensors`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every stage key: raise it when the numbers change
    summary: ClassVar[str]
    source: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]
    trains: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    unmergeable_because: ClassVar[str] = ""  # the reason, where it isn't
    prediction: ClassVar[Literal["merged", "stacked", "gated", "routed", "by task"]] = "merged"
    memory_growth: ClassVar[Literal["none", "linear"]] = "none"  # of what is remembered, with the number of tasks
    reconstructed: ClassVar[bool] = False  # our reading of a method whose details aren't published
    published: ClassVar[dict[str, Any]] = {}  # its paper's own values, by key path of a study file
    needs_task_id: ClassVar[bool] = False  # evaluation tells it the task of each image
    knows_tasks: ClassVar[bool] = False  # joint methods only: training tells it the task of each image
    observes_tasks: ClassVar[bool] = False  # joint methods only: begin_task reads the moments of each task alone
    joint: ClassVar[bool] = False  # all classes in one stage, whatever the order
    reobserves: ClassVar[bool] = False  # end_task reads moments with the branches attached
    remembers_moments: ClassVar[bool] = False  # end_task reads moments after merging

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.facts: dict[str, Any] = {}  # what the method chose and wants recorded, JSON

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

    def training_step(self, learner: Learner, batch: Batch) -> float:
        """Learn from one batch; returns the loss."""
        parameters = [*learner.branch_parameters, *learner.head_parameters]
        return plain_step(batch.loss_of, batch.indices, parameters, learner.step, learner.reduce_gradients)

    def trained_tensors(self, model: Backbone) -> dict[str, Tensor]:
        """What training has left on ``model``; :meth:`load_trained` takes it up."""
        return {f"branch/{name}": tensor for name, tensor in model.branch_tensors().items()}

    def load_trained(self, model: Backbone, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Attach what was trained again, from :meth:`trained_tensors` and the branches' scales in their order."""
        branches = {name.removeprefix("branch/"): t for name, t in tensors.items() if name.startswith("branch/")}
        model.attach_tensors(branches, scales)

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        """The trained branches as factors to merge: ``<layer>.up`` (d_out, k) and ``<layer>.down`` (k, d_in)."""
        factors: dict[str, Tensor] = {}
        for layer, branched in model.attached.items():
            branches = list(branched.branches.values())
            factors[f"{layer}.up"] = torch.cat([branch.scale * branch.up.detach() for branch in branches], dim=1)
            factors[f"{layer}.down"] = torch.cat([branch.down.detach() for branch in branches])
        return factors

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        """Update the memory after merging; moments are given where the class attributes ask for them."""

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
