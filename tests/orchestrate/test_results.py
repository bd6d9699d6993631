"""Intervals of a mean over orders, which orders of one tree root must not narrow."""

from __future__ import annotations

import pytest
from scipy import stats

from orchestrate.results import mean_interval

VALUES = [50.0, 50.2, 49.9, 60.0, 60.1, 59.8, 55.0, 55.2, 54.9]
ROOTS = ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_orders_of_their_own_have_the_usual_t_interval() -> None:
    expected = stats.t.interval(0.95, len(VALUES) - 1, loc=sum(VALUES) / len(VALUES), scale=stats.sem(VALUES))
    assert mean_interval(VALUES) == pytest.approx(expected)
    assert mean_interval(VALUES, [str(index) for index in range(len(VALUES))]) == pytest.approx(expected)


def test_orders_of_a_tree_have_the_t_interval_of_their_roots() -> None:
    means = [sum(VALUES[start : start + 3]) / 3 for start in (0, 3, 6)]
    expected = stats.t.interval(0.95, 2, loc=sum(means) / 3, scale=stats.sem(means))
    assert mean_interval(VALUES, ROOTS) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "roots"), [([50.0], None), ([50.0, 51.0, 52.0], ["a", "a", "a"])])
def test_one_order_or_one_root_says_nothing_about_others(values: list[float], roots: list[str] | None) -> None:
    assert mean_interval(values, roots) is None
