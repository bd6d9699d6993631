from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrate.objective import (
    across_orders,
    cvar,
    objective_directions,
    objective_labels,
    objective_values,
)
from orchestrate.study import ObjectiveSettings

VALUES = [70.0, 90.0, 80.0, 60.0]
accuracies = st.lists(st.floats(0, 100), min_size=1, max_size=12)


def settings(**values: Any) -> ObjectiveSettings:
    return ObjectiveSettings(**values)


@pytest.mark.parametrize(
    ("given_settings", "expected"),
    [
        ({"across_orders": "mean"}, 75.0),
        ({"across_orders": "worst"}, 60.0),
        ({"across_orders": "cvar", "alpha": 0.5}, 65.0),
        ({"across_orders": "cvar", "alpha": 0.625}, (60 + 70 + 0.5 * 80) / 2.5),
        ({"across_orders": "mean_minus_std", "k": 2}, 75 - 2 * math.sqrt(500 / 3)),
    ],
)
def test_orders_are_put_together_as_defined(given_settings: dict[str, Any], expected: float) -> None:
    assert across_orders(VALUES, settings(**given_settings)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("way", ["mean", "worst", "cvar", "mean_minus_std"])
def test_one_order_gives_its_value(way: str) -> None:
    assert across_orders([42.5], settings(across_orders=way)) == pytest.approx(42.5)


@given(accuracies, st.floats(0.01, 1))
def test_cvar_lies_between_the_worst_and_the_mean(values: list[float], alpha: float) -> None:
    mean = math.fsum(values) / len(values)
    assert min(values) - 1e-9 <= cvar(values, alpha) <= mean + 1e-9
    assert cvar(values, 1.0) == pytest.approx(mean)
    assert cvar(values, 1 / len(values)) == pytest.approx(min(values))


@given(accuracies, st.floats(0.05, 0.95))
def test_cvar_is_the_best_value_of_its_variational_form(values: list[float], alpha: float) -> None:
    # max over c of c - E[(c - v)+] / alpha, attained at one of the values (Rockafellar and Uryasev 2002)
    def bound(level: float) -> float:
        return level - math.fsum(max(level - value, 0) for value in values) / (alpha * len(values))

    assert cvar(values, alpha) == pytest.approx(max(bound(value) for value in values), abs=1e-7)


@pytest.mark.parametrize("way", ["mean", "worst", "cvar", "mean_minus_std"])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_an_order_without_a_value_fails_the_setting(way: str, bad: float | None) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 orders .*order 1"):
        across_orders([80.0, bad, 90.0], settings(across_orders=way))


def test_no_orders_are_no_objective() -> None:
    with pytest.raises(ValueError, match="no order"):
        across_orders([], settings())


def test_single_objective_reads_the_chosen_metric_of_objects_and_mappings() -> None:
    chosen = settings(metric="a_last", across_orders="mean")
    summaries = [SimpleNamespace(a_last=50.0, a_avg=1.0), {"a_last": 70.0, "a_avg": 2.0}]
    assert objective_values(summaries, 3.0, chosen) == {"objective": 60.0}
    assert objective_directions(chosen) == [("objective", "max")]
    assert objective_labels(chosen) == ["a_last (mean)"]


def test_several_objectives_come_in_the_order_asked_for() -> None:
    chosen = settings(multi=("cost", "worst", "accuracy"))
    values = objective_values([{"a_avg": 50.0}, {"a_avg": 70.0}], [1.5, 2.0], chosen)
    assert list(values.items()) == [("cost", 3.5), ("worst", 50.0), ("accuracy", 60.0)]
    assert objective_directions(chosen) == [("cost", "min"), ("worst", "max"), ("accuracy", "max")]
    assert objective_labels(chosen) == ["seconds", "worst a_avg", "mean a_avg"]


@pytest.mark.parametrize("multi", [None, ("accuracy", "cost")])
def test_a_failed_order_fails_all_objectives(multi: tuple[str, ...] | None) -> None:
    with pytest.raises(ValueError, match="order 1: None"):
        objective_values([{"a_avg": 50.0}, None], 1.0, settings(multi=multi))


def test_cost_must_be_known_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="cost"):
        objective_values([{"a_avg": 50.0}], math.nan, settings(multi=("accuracy", "cost")))
