"""The document of a robustness study: nothing is averaged over missing orders, and nothing is NaN."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from orchestrate.robustness.analysis import Questions, analyse
from orchestrate.robustness.tidy import Design
from tests.orchestrate.ordered import design, order_name, tidy

ORDERS = [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)]
LEVELS = {"loda": 70.0, "sequential": 60.0, "simplecil": 50.0}
QUESTIONS = Questions("loda", resamples=999)


def made_up(seeds: tuple[int, ...] = (0, 1), orders: list[tuple[int, ...]] = ORDERS) -> pd.DataFrame:
    draws = np.random.default_rng(1)
    settings: dict[str, Any] = {
        name: {
            (order, seed): [[level + draws.normal() for _ in range(i + 1)] for i in range(3)]
            for order in orders
            for seed in seeds
        }
        for name, level in LEVELS.items()
    }
    settings["joint"] = {(order, seed): [[80.0, 82.0, 84.0]] for order in orders for seed in seeds}
    return tidy(settings, joint=["joint"])


def nulls_without_reason(node: Any, path: str = "") -> list[str]:
    """Statistics that are null in a block that doesn't say why."""
    if isinstance(node, list):
        return [text for k, inner in enumerate(node) for text in nulls_without_reason(inner, f"{path}[{k}]")]
    if not isinstance(node, dict):
        return []
    found = [text for key, inner in node.items() for text in nulls_without_reason(inner, f"{path}.{key}")]
    if "reasons" in node and any(value is None for value in node.values()) and not node["reasons"]:
        found.append(path)
    return found


def test_the_whole_document_of_a_complete_study() -> None:
    frame = made_up()
    found = analyse(frame, design(frame), QUESTIONS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["completeness"]["complete"]
    assert nulls_without_reason(found) == []
    paired = found["paired"]["a_last"]["differences"]
    assert list(paired) == ["sequential", "simplecil", "joint"]
    loda = found["per_order"]["loda"]["a_last"]
    for name, block in paired.items():
        other = found["per_order"][name]["a_last"]
        assert block["per_order"] == {order: pytest.approx(loda[order] - other[order]) for order in loda}
        assert block["mean"] == pytest.approx(np.mean(list(loda.values())) - np.mean(list(other.values())))
        assert block["wilcoxon"]["p_holm"] >= block["wilcoxon"]["p"]
    assert found["ranks"]["a_last"]["mean_ranks"] == {"loda": 1.0, "sequential": 2.0, "simplecil": 3.0}
    assert "joint" in found["ranks"]["a_last"]["left_out"]
    assert set(found["paired"]["a_avg"]["left_out"]) == {"joint"}
    assert found["spread"]["loda"]["intransigence"]["mean"] > 5
    assert found["per_position"]["joint"] is None


def test_means_are_over_orders_not_over_rows() -> None:
    frame = made_up()
    found = analyse(frame, design(frame), QUESTIONS)
    last = frame[(frame["setting"] == "loda") & (frame["i"] == 2)]
    by_order = last.groupby("order_name")["accuracy"].mean()
    block = found["spread"]["loda"]["a_last_macro"]
    assert block["orders"] == len(ORDERS)
    assert block["mean"] == pytest.approx(by_order.mean())
    assert block["std"] == pytest.approx(by_order.std(ddof=1))


def test_a_method_that_misses_an_order_is_left_out_and_the_order_named() -> None:
    frame = made_up()
    gone = (frame["setting"] == "sequential") & (frame["order_name"] == order_name(ORDERS[1]))
    found = analyse(frame[~gone], design(frame), QUESTIONS)
    whole = found["completeness"]
    assert (whole["present"], whole["expected"], whole["complete"]) == (30, 32, False)
    missing = whole["variants"]["sequential"]["missing"]
    assert missing == [{"order": order_name(ORDERS[1]), "seed": seed} for seed in (0, 1)]
    for part in ("spread", "per_order", "disparity", "variance", "precision", "per_position"):
        assert set(found[part]) == {"loda", "simplecil", "joint"}, part
    for part in ("paired", "ranks"):
        assert order_name(ORDERS[1]) in found[part]["a_last"]["left_out"]["sequential"]
    assert set(found["paired"]["a_last"]["differences"]) == {"simplecil", "joint"}
    assert "sequential" not in found["profiles"]["a_last"]["share"]


def test_an_incomplete_baseline_leaves_no_differences_and_says_so() -> None:
    frame = made_up()
    gone = (frame["setting"] == "loda") & (frame["order_name"] == order_name(ORDERS[1])) & (frame["seed"] == 0)
    found = analyse(frame[~gone], design(frame), QUESTIONS)
    assert found["paired"]["a_last"]["differences"] == {}
    assert "1 of 8" in found["paired"]["a_last"]["reasons"]["differences"]


def test_nothing_at_all_is_a_document_too() -> None:
    frame = made_up()
    found = analyse(frame.iloc[:0], design(frame), QUESTIONS)
    assert found["completeness"]["present"] == 0
    assert found["spread"] == {}
    json.dumps(found, allow_nan=False)


def test_one_order_gives_values_and_reasons_but_no_interval() -> None:
    frame = made_up(seeds=(0,), orders=ORDERS[:1])
    found = analyse(frame, design(frame), QUESTIONS)
    json.dumps(found, allow_nan=False)
    assert nulls_without_reason(found) == []
    block = found["spread"]["loda"]["a_last"]
    assert block["interval"] is None and block["std"] is None
    difference = found["paired"]["a_last"]["differences"]["sequential"]
    assert difference["mean"] == pytest.approx(10, abs=3)
    assert difference["interval_bca"] is None
    assert found["variance"]["loda"]["a_last"]["components"] is None
    assert found["ranks"]["a_last"]["friedman"] is None
    assert found["precision"]["loda"]["a_last"]["orders_needed"] is None


def test_a_tree_of_two_roots_counts_as_two() -> None:
    frame = made_up()
    roots = {order_name(order): "a" if order[0] == 2 else "b" for order in ORDERS}
    found = analyse(frame, design(frame, roots), QUESTIONS)
    assert found["units"]["tree"] and found["units"]["roots"] == 2
    difference = found["paired"]["a_last"]["differences"]["sequential"]
    assert difference["roots"] == difference["wilcoxon"]["roots"] == 2
    assert difference["wilcoxon"]["smallest_p"] == 0.5
    assert set(found["variance"]["loda"]["a_last"]["components"]) == {"root", "order", "seed", "residual"}
    alone = analyse(frame, design(frame), QUESTIONS)
    assert set(alone["variance"]["loda"]["a_last"]["components"]) == {"order", "seed", "residual"}


def test_class_orders_have_no_task_to_follow() -> None:
    frame = made_up()
    own = design(frame)
    found = analyse(frame, Design(own.settings, own.roots, own.seeds, own.tasks, own_tasks=True), QUESTIONS)
    assert found["disparity"]["loda"]["average"] is None
    assert "class orders" in found["disparity"]["loda"]["reasons"]["per_task"]
    assert found["spread"]["loda"]["intransigence"]["mean"] is not None
