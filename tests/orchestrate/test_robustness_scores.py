"""From tidy accuracies to scores: what counts as complete, and what isn't defined."""

from __future__ import annotations

import pytest

from orchestrate.robustness.tidy import METRICS, score_orders
from tests.orchestrate.ordered import design, order_name, tidy

FORWARD, BACKWARD = (0, 1, 2), (2, 1, 0)
# Rows after each task, columns in the order learned.
FIRST = [[90.0], [70.0, 80.0], [60.0, 50.0, 80.0]]
SECOND = [[80.0], [80.0, 60.0], [70.0, 60.0, 90.0]]


def test_scores_of_an_order_are_those_of_its_accuracy_matrix() -> None:
    frame = tidy({"loda": {(FORWARD, 0): FIRST}}, images=[10, 20, 10])
    row = score_orders(frame, design(frame)).table.iloc[0]
    assert row["a_last"] == pytest.approx((6 + 10 + 8) / 40 * 100)
    assert row["a_avg"] == pytest.approx((90 + 76.67 + 60) / 3)
    assert row["forgetting"] == pytest.approx((30 + 30) / 2)
    assert row["bwt"] == pytest.approx(-30)
    assert row["learning_accuracy"] == pytest.approx(250 / 3)
    assert row["worst_task_accuracy"] == 50


def test_rows_may_come_in_any_order() -> None:
    frame = tidy({"loda": {(FORWARD, 0): FIRST, (BACKWARD, 0): SECOND}}, images=[10, 20, 30])
    shuffled = frame.sample(frac=1, random_state=3)
    first, second = (score_orders(rows, design(frame)).by_order("loda", "a_last") for rows in (frame, shuffled))
    assert first.to_dict() == second.to_dict()


def test_forward_transfer_needs_the_accuracies_before_learning() -> None:
    recorded = tidy({"loda": {(FORWARD, 0): FIRST}}, before=[9.0, 20.0, 30.0], frozen=[9.0, 15.0, 5.0])
    assert score_orders(recorded, design(recorded)).table["fwt"].iloc[0] == pytest.approx((5 + 25) / 2)
    bare = tidy({"loda": {(FORWARD, 0): FIRST}})
    scores = score_orders(bare, design(bare))
    assert scores.by_order("loda", "fwt").empty
    assert "weren't recorded" in scores.undefined["loda"]["fwt"]


def test_intransigence_compares_the_last_task_when_it_is_new_with_joint_training() -> None:
    # Chaudhry et al. 2018: I_k = a*_k - a_{k,k}, here for the last task of each order.
    frame = tidy(
        {
            "loda": {(FORWARD, 0): FIRST, (BACKWARD, 0): SECOND},
            "joint": {(o, 0): [[96.0, 70.0, 85.0]] for o in (FORWARD, BACKWARD)},
        },
        joint=["joint"],
    )
    scores = score_orders(frame, design(frame))
    assert scores.by_order("loda", "intransigence").to_dict() == {
        order_name(FORWARD): pytest.approx(85 - 80),  # task 2 is last
        order_name(BACKWARD): pytest.approx(96 - 90),  # task 0 is last
    }


def test_without_joint_training_intransigence_can_not_be_known() -> None:
    frame = tidy({"loda": {(FORWARD, 0): FIRST}})
    scores = score_orders(frame, design(frame))
    assert scores.by_order("loda", "intransigence").empty
    assert "no joint variant" in scores.undefined["loda"]["intransigence"]


def test_a_joint_method_has_final_accuracies_only() -> None:
    frame = tidy({"joint": {(BACKWARD, 0): [[50.0, 60.0, 100.0]]}}, joint=["joint"], images=[20, 10, 10])
    scores = score_orders(frame, design(frame))
    assert scores.joint == {"joint"}
    assert scores.table["a_last"].iloc[0] == pytest.approx((10 + 6 + 10) / 40 * 100)
    assert scores.table["worst_task_accuracy"].iloc[0] == 50
    undefined = set(METRICS) - {"a_last", "a_last_macro", "worst_task_accuracy"}
    assert set(scores.undefined["joint"]) == undefined


@pytest.mark.parametrize("hole", ["order", "cell"])
def test_a_setting_that_lacks_an_order_has_no_means(hole: str) -> None:
    frame = tidy({"a": {(FORWARD, 0): FIRST, (BACKWARD, 0): SECOND}, "b": {(FORWARD, 0): FIRST, (BACKWARD, 0): SECOND}})
    gone = (frame["setting"] == "b") & (frame["order_name"] == order_name(BACKWARD))
    if hole == "cell":
        gone &= (frame["i"] == 2) & (frame["j"] == 1)
    scores = score_orders(frame[~gone], design(frame))
    assert scores.complete("a")
    assert scores.missing["b"] == ((order_name(BACKWARD), 0),)
    with pytest.raises(ValueError, match=order_name(BACKWARD)):
        scores.by_order("b", "a_last")


def test_several_seeds_are_averaged_within_an_order_and_a_missing_one_is_named() -> None:
    frame = tidy({"loda": {(FORWARD, 0): FIRST, (FORWARD, 1): SECOND, (BACKWARD, 0): FIRST, (BACKWARD, 1): FIRST}})
    scores = score_orders(frame, design(frame))
    by_order = scores.by_order("loda", "learning_accuracy").to_dict()
    assert by_order == {
        order_name(FORWARD): pytest.approx((250 / 3 + 230 / 3) / 2),
        order_name(BACKWARD): pytest.approx(250 / 3),
    }
    gone = (frame["order_name"] == order_name(BACKWARD)) & (frame["seed"] == 1)
    less = score_orders(frame[~gone], design(frame))
    assert less.missing["loda"] == ((order_name(BACKWARD), 1),)
    assert "1 of 4" in less.incomplete_reason("loda")
    assert "(seed 1)" in less.incomplete_reason("loda")
