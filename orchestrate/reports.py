"""What a trial reports: stages as they finish, orders as they finish, and its end. Light: no torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from loda.errors import StageError
from orchestrate.objective import SINGLE, objective_values

Events = Sequence[Mapping[str, Any]]


class TrialLedger:
    """The orders of one setting that are through, and the reports that follow from them.

    Args:
        objective: the study's ``search.objective``, as plain values.
        orders: names of all orders of the setting, in the order in which results are put together.
    """

    def __init__(self, objective: Mapping[str, Any], orders: Sequence[str]) -> None:
        self.settings = cast(Any, SimpleNamespace(**objective))
        self.orders = tuple(orders)
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._stages: set[tuple[str, int]] = set()
        self._curve: dict[int, Mapping[str, float]] = {}  # of the first order, by position
        self._names: tuple[str, ...] = tuple(objective["multi"] or (SINGLE,))

    @property
    def complete(self) -> bool:
        """Whether every order has its outcome."""
        return len(self.outcomes) == len(self.orders)

    def add(self, order: str, outcome: Mapping[str, Any]) -> None:
        """An order is through (:func:`orchestrate.worker.walk_order`)."""
        self.outcomes[order] = dict(outcome)

    def progress(self, events: Events) -> dict[str, Any]:
        """A report on the way: stages just finished, and the objectives over the orders that are through."""
        for event in events:
            self._stages.add((event["order"], event["position"]))
            if event["order"] == self.orders[0]:
                self._curve[event["position"]] = event["accuracy"]
        values: Mapping[str, Any] = dict.fromkeys(self._names)
        if self.outcomes:
            values = self._objectives()
        # No mapping inside: Tune flattens those before it shows a report to searcher and scheduler.
        report = {"finished": False, "events": list(events), "orders": self._orders()}
        report |= {"stages_done": len(self._stages), "first_order_tasks": len(self._curve)}
        return report | {"first_order_so_far": self._so_far()} | dict(values)

    def _so_far(self) -> float | None:
        """The metric of the first order over the tasks that it has behind it."""
        if not self._curve:
            return None
        metric = self.settings.metric
        if metric == "a_avg":
            return sum(point["a_last"] for point in self._curve.values()) / len(self._curve)
        return self._curve[max(self._curve)][metric]

    def final(self, events: Events = ()) -> dict[str, Any]:
        """The last report. It rests on stored results alone, so it can always be repeated.

        Args:
            events: stages that no report has told of yet.

        Raises:
            StageError: the objective isn't finite.
        """
        try:
            values = self._objectives()
        except ValueError as error:
            raise StageError(f"the objective can't be computed: {error}") from error
        return {"finished": True, "events": list(events), "orders": self._orders()} | values

    def _through(self) -> list[tuple[str, dict[str, Any]]]:
        return [(name, self.outcomes[name]) for name in self.orders if name in self.outcomes]

    def _objectives(self) -> dict[str, float]:
        through = [outcome for _, outcome in self._through()]
        seconds = [outcome["seconds"] for outcome in through]
        return objective_values([outcome["summary"] for outcome in through], seconds, self.settings)

    def _orders(self) -> list[dict[str, Any]]:
        kept = ("a_last", "a_last_macro", "a_avg", "forgetting")
        return [
            {
                "name": name,
                "order": outcome["order"],
                "state_digest": outcome["state_digest"],
                **{key: outcome["summary"][key] for key in kept},
            }
            for name, outcome in self._through()
        ]
