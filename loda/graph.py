"""Stage keys: what each cached step is a pure function of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loda.errors import ConfigError
from loda.methods import build_method
from loda.settings import RunSettings
from loda.stream import Task
from loda.workbench import Workbench, canonical_digest

Step = Literal["observe", "adapt", "consolidate", "evaluate"]
STEPS: tuple[Step, ...] = ("observe", "adapt", "consolidate", "evaluate")


@dataclass(frozen=True)
class StepNode:
    """One cached step of one stage.

    Attributes:
        step: which of the four.
        key: SHA-256, its name in the store.
        prefix: the tasks learned so far, this one last (all of them, for a joint method).
        inputs: keys of this stage's earlier steps that it reads, by step.
        chain: keys of the consolidated earlier stages, first task first.
        split: what ``evaluate`` scores on.
    """

    step: Step
    key: str
    prefix: tuple[int, ...]
    inputs: dict[Step, str]
    chain: tuple[str, ...]
    split: str | None = None

    @property
    def position(self) -> int:
        """0 for the first task of an order."""
        return len(self.chain)

    @property
    def merged_only(self) -> tuple[str, ...]:
        """Keys of earlier stages of which only the merged factors are read: all but the last, whose memory goes on."""
        return self.chain[:-1]

    @property
    def reads(self) -> tuple[str, ...]:
        """Every key that must be there before this step can run."""
        return (*self.chain, *self.inputs.values())


def stage_tasks(settings: RunSettings, tasks: Sequence[Task], order: Sequence[int]) -> list[tuple[int, ...]]:
    """The prefix of each stage of an order: growing, or a single one with all tasks for a joint method."""
    if build_method(settings.method).joint:
        return [tuple(range(len(tasks)))]
    return [tuple(order[: position + 1]) for position in range(len(order))]


def stage_classes(settings: RunSettings, tasks: Sequence[Task], prefix: Sequence[int]) -> tuple[int, ...]:
    """The classes that the last stage of a prefix learns."""
    if build_method(settings.method).joint:
        return tuple(sorted(label for index in prefix for label in tasks[index].classes))
    return tasks[prefix[-1]].classes


def sequence_nodes(bench: Workbench, settings: RunSettings, order: Sequence[int], split: str) -> list[StepNode]:
    """The steps of one order under one setting, in the order in which they run.

    Keys depend only on what a step reads: orders that begin alike share their first stages, settings that differ in
    something a step doesn't read share that step.
    """
    if len(bench.splits[split]) == 0:
        raise ConfigError(f"stream.validation: no images to score on in the {split} split; set it above 0")
    method = build_method(settings.method)
    training, head = settings.training.model_dump(), settings.head
    if training["optimizer"] == "sgd":  # the only one that there was when keys were first given out
        del training["optimizer"]
    nodes: list[StepNode] = []
    chain: tuple[str, ...] = ()
    for prefix in stage_tasks(settings, bench.tasks, order):
        position = len(chain)
        parent = chain[-1] if chain else bench.root_key
        classes = stage_classes(settings, bench.tasks, prefix)
        observe = canonical_digest({"step": "observe", "parent": parent, "classes": classes})
        adapt_reads: dict[str, object] = {}
        if method.trains:
            adapt_reads = {
                "settings": method.adapt_reads(position),
                "training": training,
                "head": {"start": head.start, "scale": head.scale, "margin": head.margin},
            }
        groups = [bench.tasks[index].classes for index in prefix]
        if method.knows_tasks:  # to other joint methods it doesn't matter how classes are cut into tasks
            adapt_reads["tasks"] = groups
        adapt = canonical_digest(
            {"step": "adapt", "observe": observe, "method": [method.name, method.version], **adapt_reads}
        )
        head_reads: dict[str, object] = {"alignment": head.alignment}
        if position > 0:
            head_reads["drift"] = head.drift
            if head.drift != "none":
                head_reads["drift_ridge"] = head.drift_ridge
            if head.alignment:
                values = (settings.training.seed, head.alignment_epochs, head.alignment_samples, head.logit_norm)
                head_reads["alignment_values"] = values
        consolidate = canonical_digest(
            {
                "step": "consolidate",
                "adapt": adapt,
                "settings": method.consolidate_reads(position),
                "head": head_reads,
            }
        )
        classifier = classifier_choice(settings)
        evaluate = canonical_digest(
            {
                "step": "evaluate",
                "consolidate": consolidate,
                "tasks": groups,
                "split": split,
                "classifier": classifier,
                "shrinkage": head.shrinkage if classifier == "lda" else None,
            }
        )
        steps: list[tuple[Step, str, dict[Step, str]]] = [
            ("observe", observe, {}),
            ("adapt", adapt, {"observe": observe}),
            ("consolidate", consolidate, {"observe": observe, "adapt": adapt}),
            ("evaluate", evaluate, {"observe": observe, "consolidate": consolidate}),
        ]
        nodes += [
            StepNode(step, key, prefix, inputs, chain, split if step == "evaluate" else None)
            for step, key, inputs in steps
        ]
        chain = (*chain, consolidate)
    return nodes


def classifier_choice(settings: RunSettings) -> str:
    """The final classifier: the head section's, unless the method has its own."""
    return build_method(settings.method).classifier() or settings.head.classifier
