"""Figures from the accuracy matrix, against hand-worked examples and a slow loop."""

from __future__ import annotations

import json
import math
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loda.metrics import accuracy_matrix_summary

NAN = float("nan")
HAND: list[list[float]] = [[80.0, NAN, NAN], [70.0, 90.0, NAN], [75.0, 60.0, 50.0]]


def test_hand_worked_example() -> None:
    summary = accuracy_matrix_summary(HAND, [100, 300, 100])
    # after task 2: (70 + 270) / 400 = 85; after task 3: (75 + 180 + 50) / 500 = 61
    assert summary.curve == (80.0, 85.0, 61.0)
    assert summary.a_last == 61.0
    assert summary.a_avg == pytest.approx((80 + 85 + 61) / 3)
    assert summary.a_last_macro == pytest.approx((75 + 60 + 50) / 3)
    assert summary.a_avg_macro == pytest.approx((80 + 80 + 185 / 3) / 3)
    assert summary.bwt == pytest.approx(((75 - 80) + (60 - 90)) / 2) == -17.5
    assert summary.forgetting == pytest.approx(((80 - 75) + (90 - 60)) / 2) == 17.5
    assert summary.learning_accuracy == pytest.approx((80 + 90 + 50) / 3)
    assert summary.per_position == (80.0, 90.0, 50.0)
    assert summary.by_position == (75.0, 60.0, 50.0)
    assert (summary.worst_task, summary.worst_task_accuracy) == (2, 50.0)
    assert summary.fwt is None


def test_forgetting_is_negative_where_the_last_task_helped() -> None:
    summary = accuracy_matrix_summary([[50.0, NAN], [60.0, 70.0]])
    assert summary.forgetting == -10 and summary.bwt == 10


def test_forgetting_counts_from_the_best_and_bwt_from_the_diagonal() -> None:
    summary = accuracy_matrix_summary([[50, 0, 0], [80, 60, 0], [70, 60, 90]])
    assert summary.forgetting == pytest.approx((10 + 0) / 2)
    assert summary.bwt == pytest.approx((20 + 0) / 2)


def test_forward_transfer_leaves_the_first_task_out() -> None:
    summary = accuracy_matrix_summary(HAND, zero_shot_T=[NAN, 20, 30], baseline_T=[NAN, 10, 35])
    assert summary.fwt == pytest.approx((10 - 5) / 2)


def test_one_task_has_nothing_to_forget() -> None:
    summary = accuracy_matrix_summary([[73.5]], [20], zero_shot_T=[5.0], baseline_T=[5.0])
    assert (summary.a_last, summary.a_avg, summary.learning_accuracy) == (73.5, 73.5, 73.5)
    assert (summary.bwt, summary.forgetting, summary.fwt) == (None, None, None)
    assert "NaN" not in json.dumps(summary.to_dict())


def test_each_step_is_rounded_before_averaging_as_published() -> None:
    # 100/3 -> 33.33 and 200/6 -> 33.33: the published mean is 33.33, not 33.333...
    assert accuracy_matrix_summary([[100 / 3, NAN], [100 / 3, 100 / 3]], [3, 3]).a_avg == pytest.approx(
        33.33, abs=1e-12
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=6), st.data())
def test_matches_a_slow_loop_over_images(counts: list[int], data: st.DataObject) -> None:
    """Exact arithmetic over right answers; percentages reach the function as rounded floats."""
    T = len(counts)
    right = [[data.draw(st.integers(0, counts[j])) for j in range(i + 1)] for i in range(T)]
    R = np.full((T, T), NAN)
    for i in range(T):
        for j in range(i + 1):
            R[i, j] = 100 * right[i][j] / counts[j]
    summary = accuracy_matrix_summary(R, counts)
    exact = [[Fraction(100 * right[i][j], counts[j]) for j in range(i + 1)] for i in range(T)]
    for i in range(T):
        micro = Fraction(100 * sum(right[i]), sum(counts[: i + 1]))
        assert abs(summary.curve[i] - micro) <= 0.005 + 1e-9
        if (micro * 1000).denominator != 1:  # not on a tie, where binary floats may go either way
            two_places = Decimal(micro.numerator) / Decimal(micro.denominator)
            assert summary.curve[i] == float(two_places.quantize(Decimal("0.01"), ROUND_HALF_EVEN))
    assert summary.a_last == summary.curve[-1]
    assert math.isclose(summary.a_avg, sum(summary.curve) / T, abs_tol=1e-9)
    assert math.isclose(summary.a_last_macro, sum(exact[-1]) / T, abs_tol=1e-9)
    assert math.isclose(summary.a_avg_macro, sum(sum(row) / len(row) for row in exact) / T, abs_tol=1e-9)
    assert math.isclose(summary.learning_accuracy, sum(exact[j][j] for j in range(T)) / T, abs_tol=1e-9)
    if T == 1:
        assert summary.bwt is None and summary.forgetting is None
        return
    bwt = forgetting = Fraction(0)
    for j in range(T - 1):
        best = exact[j][j]
        for i in range(j, T - 1):
            if exact[i][j] > best:
                best = exact[i][j]
        bwt += exact[-1][j] - exact[j][j]
        forgetting += best - exact[-1][j]
    assert summary.bwt is not None and math.isclose(summary.bwt, bwt / (T - 1), abs_tol=1e-9)
    assert summary.forgetting is not None and math.isclose(summary.forgetting, forgetting / (T - 1), abs_tol=1e-9)
    assert summary.by_position[summary.worst_task] == min(summary.by_position) == summary.worst_task_accuracy


def test_equal_counts_make_micro_and_macro_agree() -> None:
    assert accuracy_matrix_summary(HAND).a_last == pytest.approx(accuracy_matrix_summary(HAND).a_last_macro, abs=0.005)


def test_the_upper_triangle_is_not_read() -> None:
    filled = np.where(np.isnan(HAND), 99.0, HAND)
    assert accuracy_matrix_summary(filled, [1, 2, 3]) == accuracy_matrix_summary(HAND, [1, 2, 3])


@pytest.mark.parametrize("value", [NAN, float("inf"), -1.0, 100.5])
@pytest.mark.parametrize("place", [(0, 0), (2, 0), (2, 2)])
def test_entries_that_are_no_percentages_are_refused(value: float, place: tuple[int, int]) -> None:
    R = np.array(HAND)
    R[place] = value
    with pytest.raises(ValueError, match=rf"R\[{place[0]}, {place[1]}\]"):
        accuracy_matrix_summary(R)


def test_wrong_shapes_counts_and_half_of_forward_transfer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(T, T\)"):
        accuracy_matrix_summary([[1.0, 2.0]])
    with pytest.raises(ValueError, match="test_counts_T"):
        accuracy_matrix_summary(HAND, [1, 2])
    with pytest.raises(ValueError, match="at least one test image"):
        accuracy_matrix_summary(HAND, [1, 0, 2])
    with pytest.raises(ValueError, match="only one was given"):
        accuracy_matrix_summary(HAND, zero_shot_T=[0, 1, 2])
    with pytest.raises(ValueError, match="baseline_T"):
        accuracy_matrix_summary(HAND, zero_shot_T=[0, 1, 2], baseline_T=[0, NAN, 2])


def test_ties_of_the_second_decimal_fall_as_in_the_published_code() -> None:
    right, counts = np.array([16, 2474, 607]), np.array([40, 3088, 872])  # 3,097 of 4,000: 77.425 %
    R = np.tile(100 * right / counts, (3, 1))
    assert accuracy_matrix_summary(R, counts).a_last == np.around(3097 * 100 / 4000, 2) == 77.42
