"""What is to be done: orders under one setting, their stages in the store, and counts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from loda.graph import StepNode, sequence_nodes
from loda.methods import build_method
from loda.stream import Task, cut_published
from loda.workbench import Workbench, canonical_digest
from orchestrate.orders import OrderPlan
from orchestrate.study import Study


@dataclass(frozen=True)
class OrderWork:
    """One order to walk: its name is stable across runs and unique in its study."""

    name: str
    order: tuple[int, ...]
    split: str  # what its stages are scored on
    root: str = ""  # orders with one label begin alike by design
    classes: tuple[tuple[int, ...], ...] | None = None  # of a class order: the tasks that it has for itself

    def bench(self, bench: Workbench) -> Workbench:
        """The workbench with this order's tasks."""
        if self.classes is None:
            return bench
        tasks = tuple(Task(task.name, classes) for task, classes in zip(bench.tasks, self.classes, strict=True))
        return replace(bench, tasks=tasks)

    def nodes(self, bench: Workbench, study: Study) -> list[StepNode]:
        """The steps of this order under a study's settings.

        Without sharing, keys are also of this order and these settings, so that nothing is found that another computed.
        What the steps compute, and its digests, don't depend on keys.
        """
        settings = study.run_settings()
        nodes = sequence_nodes(self.bench(bench), settings, self.order, self.split)
        if study.resources.sharing:
            return nodes
        chosen = settings.model_dump(mode="json", include={"method", "training", "head"})  # the rest is in every key
        own = canonical_digest([self.name, chosen])
        return [_private(node, own) for node in nodes]


def _private(node: StepNode, own: str) -> StepNode:
    def key(shared: str) -> str:
        return canonical_digest([own, shared])

    inputs = {step: key(shared) for step, shared in node.inputs.items()}
    return replace(node, key=key(node.key), inputs=inputs, chain=tuple(key(shared) for shared in node.chain))


@dataclass(frozen=True)
class WorkList:
    """Orders of one setting, walked stage after stage."""

    settings: dict[str, Any]  # key path -> value, on top of the study file
    orders: tuple[OrderWork, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, to hand to a worker."""
        return {"settings": self.settings, "orders": [asdict(order) for order in self.orders]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WorkList:
        """The inverse of :meth:`to_dict`."""
        return cls(dict(values["settings"]), tuple(_order_from_dict(order) for order in values["orders"]))

    def nodes(self, bench: Workbench, study: Study) -> dict[str, list[StepNode]]:
        """The steps of each order, by order name, for the setting of this list."""
        chosen = study.with_values(self.settings)
        return {work.name: work.nodes(bench, chosen) for work in self.orders}


def _order_from_dict(values: Mapping[str, Any]) -> OrderWork:
    classes = values["classes"]
    return OrderWork(
        values["name"],
        tuple(values["order"]),
        values["split"],
        values["root"],
        None if classes is None else tuple(tuple(labels) for labels in classes),
    )


def name_orders(plan: OrderPlan, part: str, split: str) -> tuple[OrderWork, ...]:
    """A plan's "tune" or "evaluate" orders with names such as ``evaluate-2-0-1`` or ``evaluate-class-1993``.

    A name is the order itself, or what it is drawn from: it never changes its meaning.
    """
    works = []
    for number, (order, root) in enumerate(zip(getattr(plan, part), plan.roots(part), strict=True)):
        if plan.class_seeds is None:
            works.append(OrderWork(f"{part}-{'-'.join(map(str, order))}", tuple(order), split, root))
        else:
            name = f"{part}-class-{plan.class_seeds[part][number]}"
            classes = tuple(task.classes for task in cut_published(order, plan.tasks))
            works.append(OrderWork(name, tuple(range(plan.tasks)), split, root, classes))
    return tuple(works)


@dataclass
class StageCounts:
    """Stages asked for, and what became of them. A stage is one task at one position of one order under one setting.

    A stage counts as reused when none of its steps had to be computed for it, and as run otherwise; ``steps_*`` count
    the four cached steps one by one. A stage that several orders or settings share is asked for by each, and run once.
    """

    stages_requested: int = 0
    stages_run: int = 0
    stages_reused: int = 0
    steps_requested: int = 0
    steps_run: int = 0
    steps_reused: int = 0
    stage_seconds: float = 0.0  # computing time of the steps run, without the platform's own
    by_step: dict[str, int] = field(default_factory=dict)

    def add(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Count one finished stage, from the records of its steps (``step``, ``ran``, ``seconds``)."""
        ran = [step for step in steps if step["ran"]]
        self.stages_requested += 1
        self.stages_run += bool(ran)
        self.stages_reused += not ran
        self.steps_requested += len(steps)
        self.steps_run += len(ran)
        self.steps_reused += len(steps) - len(ran)
        self.stage_seconds += sum(step["seconds"] for step in ran)
        for step in ran:
            self.by_step[step["step"]] = self.by_step.get(step["step"], 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def stages_of(study: Study, tasks: int) -> int:
    """How many stages one order has: one a task, a single one for a joint method."""
    return 1 if build_method(study.method).joint else tasks
