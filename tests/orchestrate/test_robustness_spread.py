"""Spread over orders, disparity over tasks, and the orders that a precision takes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from orchestrate.robustness.by_task import disparity, per_position
from orchestrate.robustness.precision import precision, units_needed
from orchestrate.robustness.spread import clustered_interval, spread
from tests.orchestrate.ordered import tidy

DRAWS = np.random.default_rng(5).normal(60, 3, 12)


def series(values: list[float] | np.ndarray) -> pd.Series:
    return pd.Series(list(values), index=[f"o{k}" for k in range(len(values))], dtype=float)


def alone(values: pd.Series) -> dict[str, str]:
    return {str(name): str(name) for name in values.index}


def in_roots(values: pd.Series, size: int) -> dict[str, str]:
    return {str(name): f"root-{k // size}" for k, name in enumerate(values.index)}


def test_interquartile_mean_of_the_published_example() -> None:
    # Wikipedia, "Interquartile mean", its first example: 12 values, IQM 6.5.
    values = series([5, 8, 4, 38, 8, 6, 9, 7, 7, 3, 1, 6])
    assert spread(values, alone(values), alpha=0.25, confidence=0.95)["iqm"] == pytest.approx(6.5)


def test_worst_order_and_tail_are_at_the_end_that_is_bad() -> None:
    values = series([50.0, 60.0, 70.0, 80.0])
    accuracy = spread(values, alone(values), alpha=0.5, confidence=0.95)
    assert (accuracy["worst"], accuracy["worst_order"], accuracy["best_order"]) == (50.0, "o0", "o3")
    assert accuracy["cvar"] == pytest.approx(55.0)
    forgetting = spread(values, alone(values), alpha=0.5, confidence=0.95, higher_is_better=False)
    assert (forgetting["worst"], forgetting["worst_order"], forgetting["best_order"]) == (80.0, "o3", "o0")
    assert forgetting["cvar"] == pytest.approx(75.0)


def test_interval_without_a_tree_is_the_t_interval_of_the_orders() -> None:
    found = clustered_interval(DRAWS, np.arange(12), 0.9)
    assert found == pytest.approx(DescrStatsW(DRAWS).tconfint_mean(alpha=0.1))


def test_interval_of_a_tree_is_the_t_interval_of_its_root_means() -> None:
    found = clustered_interval(DRAWS, np.repeat(np.arange(4), 3), 0.95)
    assert found == pytest.approx(stats.ttest_1samp(DRAWS.reshape(4, 3).mean(axis=1), 0).confidence_interval(0.95))


def test_orders_of_one_root_say_nothing_about_other_roots() -> None:
    values = series(DRAWS)
    found = spread(values, dict.fromkeys(alone(values), "root-0"), alpha=0.25, confidence=0.95)
    assert found["interval"] is None
    assert "one tree root" in found["reasons"]["interval"]
    assert found["std"] == pytest.approx(DRAWS.std(ddof=1))


def test_one_order_has_a_value_and_no_spread() -> None:
    values = series([61.0])
    found = spread(values, alone(values), alpha=0.25, confidence=0.95)
    assert (found["mean"], found["worst"], found["cvar"]) == (61.0, 61.0, 61.0)
    assert found["std"] is None
    assert found["interval"] is None
    assert all("one order" in found["reasons"][key] for key in ("std", "interval"))


def test_equal_orders_have_an_interval_of_no_width() -> None:
    values = series([61.0, 61.0, 61.0])
    assert spread(values, alone(values), alpha=0.25, confidence=0.95)["interval"] == [61.0, 61.0]


def test_disparity_is_the_range_of_each_tasks_final_accuracy_over_orders() -> None:
    # Yoon et al. 2020, section 4: OPD_t = max - min over task sequences; AOPD their mean, MOPD their maximum.
    forward, backward = (0, 1), (1, 0)
    frame = tidy({"a": {(forward, 0): [[99.0], [60.0, 90.0]], (backward, 0): [[98.0], [50.0, 75.0]]}})
    found = disparity(frame[frame["i"] == 1])
    assert found["per_task"] == {"t0": pytest.approx(75 - 60), "t1": pytest.approx(90 - 50)}
    assert (found["average"], found["maximum"], found["worst_task"]) == (27.5, 40.0, "t1")


def test_disparity_averages_seeds_before_it_looks_for_extremes() -> None:
    order, other = (0, 1), (1, 0)
    matrices = {(order, 0): 60.0, (order, 1): 80.0, (other, 0): 75.0, (other, 1): 65.0}
    frame = tidy({"a": {key: [[99.0], [value, value]] for key, value in matrices.items()}})
    assert disparity(frame[frame["i"] == 1])["maximum"] == pytest.approx(0.0)


def test_disparity_of_one_order_is_unknown() -> None:
    frame = tidy({"a": {((0, 1), 0): [[99.0], [60.0, 90.0]]}})
    found = disparity(frame[frame["i"] == 1])
    assert found["average"] is None
    assert "one order" in found["reasons"]["per_task"]


def test_positions_are_places_in_the_order_whatever_task_stands_there() -> None:
    frame = tidy({"a": {((0, 1), 0): [[90.0], [60.0, 80.0]], ((1, 0), 0): [[70.0], [50.0, 40.0]]}})
    first, second = per_position(frame, {name: name for name in set(frame["order_name"])}, 2, 0.95)
    assert (first["new"]["mean"], first["final"]["mean"]) == (80.0, 55.0)
    assert (second["new"]["mean"], second["final"]["mean"]) == (60.0, 60.0)
    assert first["new"]["interval"] == pytest.approx(list(DescrStatsW([90.0, 70.0]).tconfint_mean()))


@pytest.mark.parametrize(("std", "half_width"), [(1.4, 0.5), (3.0, 0.5), (0.3, 2.0), (2.0, 1.0)])
def test_orders_needed_are_the_fewest_that_reach_the_half_width(std: float, half_width: float) -> None:
    def reached(n: int) -> float:
        raw = np.linspace(-1, 1, n)
        low, high = DescrStatsW(raw / raw.std(ddof=1) * std).tconfint_mean(alpha=0.05)
        return (high - low) / 2

    needed = units_needed(std, half_width, 0.95)
    assert reached(needed) <= half_width
    assert needed == 2 or reached(needed - 1) > half_width


def test_a_tree_needs_more_roots_not_more_continuations() -> None:
    values = series(np.repeat([50.0, 60.0, 55.0, 65.0], 5) + np.tile([-0.1, 0, 0.1, 0, 0], 4))
    as_tree = precision(values, in_roots(values, 5), 2.0, 0.95)
    as_if_independent = precision(values, alone(values), 2.0, 0.95)
    assert (as_tree["roots_now"], as_tree["orders_now"]) == (4, 20)
    assert as_tree["roots_needed"] == units_needed(float(np.std([50.0, 60.0, 55.0, 65.0], ddof=1)), 2.0, 0.95)
    assert as_tree["orders_needed"] == 5 * as_tree["roots_needed"] > 3 * as_if_independent["orders_needed"]
    low, high = clustered_interval(values, list(in_roots(values, 5).values()), 0.95) or (0, 0)
    assert as_tree["half_width_now"] == pytest.approx((high - low) / 2)


def test_precision_from_one_order_is_unknown() -> None:
    values = series([60.0])
    found = precision(values, alone(values), 0.5, 0.95)
    assert found["orders_needed"] is None
    assert "one order" in found["reasons"]["orders_needed"]
