"""What is to be done: orders under one setting, their stages in the store, and counts of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loda.graph import StepNode, sequence_nodes
from loda.methods import build_method
from loda.workbench import Workbench
from orchestrate.study import Study


@dataclass(frozen=True)
class OrderWork:
    """One order to walk: its name is stable across runs and unique in its study."""

    name: str
    order: tuple[int, ...]
    split: str  # what its stages are scored on


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
        orders = tuple(OrderWork(o["name"], tuple(o["order"]), o["split"]) for o in values["orders"])
        return cls(dict(values["settings"]), orders)

    def nodes(self, bench: Workbench, study: Study) -> dict[str, list[StepNode]]:
        """The steps of each order, by order name, for the setting of this list."""
        settings = study.with_values(self.settings).run_settings()
        return {work.name: sequence_nodes(bench, settings, work.order, work.split) for work in self.orders}


def name_orders(kind: str, orders: Iterable[Sequence[int]], split: str) -> tuple[OrderWork, ...]:
    """Orders with names such as ``evaluate-2-0-1``: the order itself, so that a name never changes its meaning."""
    return tuple(OrderWork(f"{kind}-{'-'.join(map(str, order))}", tuple(order), split) for order in orders)


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
