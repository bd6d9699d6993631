"""The report's comparison of methods, from the document that ``orchestrate robustness`` writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from orchestrate.charts import comparison
from orchestrate.charts.style import inline_svg, themed, to_svg
from orchestrate.report_robustness import incomplete

ORDERS = ("evaluate-0-1", "evaluate-1-0", "evaluate-2-0")


def block(mean: float, **more: Any) -> dict[str, Any]:
    return {
        "mean": mean, "std": 1.0, "median": mean, "iqm": mean, "worst": mean - 1, "cvar": mean - 1,
        "interval": [mean - 2, mean + 2], "reasons": {}, **more,
    }  # fmt: skip


def document() -> dict[str, Any]:
    """Two methods over three orders, and a third that lacks one of them."""
    means = {"loda": 57.25, "sequential": 51.5}
    metrics = ("a_last", "a_avg", "forgetting", "learning_accuracy", "worst_task_accuracy")
    return {
        "confidence": 0.95,
        "alpha": 0.25,
        "metrics": {metric: {"title": metric} for metric in metrics},
        "units": {"note": "3 orders, each an observation of its own"},
        "completeness": {
            "expected": 9,
            "present": 8,
            "complete": False,
            "variants": {
                "loda": {"expected": 3, "present": 3},
                "sequential": {"expected": 3, "present": 3},
                "simplecil": {"expected": 3, "present": 2},
            },
        },
        "spread": {name: {metric: block(mean) for metric in metrics} for name, mean in means.items()},
        "per_order": {
            name: {"a_last": {order: mean + k - 1 for k, order in enumerate(ORDERS)}} for name, mean in means.items()
        },
        "paired": {
            "a_last": {
                "baseline": "loda",
                "left_out": {"simplecil": "incomplete: 1 of 3 orders x seeds is missing"},
                "differences": {
                    "sequential": {
                        "mean": 5.75, "interval_bca": [5.5, 6.0], "interval_t": [5.25, 6.25], "won": 3, "tied": 0,
                        "lost": 0, "wilcoxon": {"p": 0.25, "p_holm": None}, "notes": ["3 roots: trust the t interval"],
                        "per_order": dict(zip(ORDERS, (5.5, 5.75, 6.0), strict=True)),
                        "reasons": {"p_holm": "one comparison"},
                    }
                },
            }
        },
        "per_position": {
            "loda": [{"position": k, "new": block(60.0), "final": block(50.0 + k)} for k in range(3)],
            "sequential": [{"position": k, "new": {"mean": None}, "final": {"mean": None}} for k in range(3)],
        },
        "profiles": {"a_last": {"tau": [49.0, 52.0, 58.0], "share": {"loda": [1, 1, 0.4], "sequential": [1, 0.5, 0]}}},
        "variance": {"loda": {"a_last": {"shares": {"order": 0.25, "residual": 0.75, "seed": None}}}},
        "disparity": {"loda": {"average": 4.0, "maximum": 6.5, "worst_task": "t1"}, "sequential": None},
        "precision": {
            "loda": {"a_last": {"orders_now": 3, "half_width_now": 2.0, "half_width": 0.5, "orders_needed": 33}},
            "sequential": {"a_last": {"orders_needed": None}},
        },
        "ranks": {"a_last": {"kendall_w": None, "friedman": None, "reasons": {"friedman": "2 variants only"}}},
    }  # fmt: skip


@pytest.mark.parametrize("draw", [comparison.spread, comparison.differences, comparison.profiles, comparison.positions])
def test_figures_can_be_drawn_and_described(draw: Any) -> None:
    with themed():
        chart = draw(document())
        assert chart is not None
        page = inline_svg(to_svg(chart.figure, chart.title), chart.name, chart.alt)
    assert chart.reading.endswith(".")
    assert "var(--ink)" in page
    assert "nan" not in (page + chart.alt).lower()


def test_numbers_of_the_document_stand_in_the_tables() -> None:
    with themed():
        spread, paired = comparison.spread(document()), comparison.differences(document())
    assert spread.table is not None
    assert spread.table.rows[0][:2] == ("loda", "57.25 [55.25, 59.25]")
    assert paired is not None and paired.table is not None
    row = ("sequential", "+5.75", "[+5.50, +6.00]", "[+5.25, +6.25]", "3 / 0 / 0", "0.2500", "–")
    assert paired.table.rows == (row,)
    tables = {table.header[1]: table for table in comparison.tables(document())}
    assert tables["average"].rows == (("loda", "4.00", "6.50", "t1"),)
    assert tables["orders now"].rows == (("loda", "3", "±2.00", "±0.5", "33"),)
    assert tables["order"].rows == (("loda", "25%", "75%", "–"),)


def test_what_cannot_be_known_is_said() -> None:
    with themed():
        chart = comparison.differences(document())
    assert chart is not None
    for part in ("simplecil: incomplete: 1 of 3", "trust the t interval", "one comparison"):
        assert part in chart.note
    assert comparison.ranking(document()) == "Ranks: 2 variants only."


def test_methods_that_lack_orders_are_named_and_left_out() -> None:
    values = document()
    text = incomplete(values, "`orchestrate robustness tiny`")
    assert "8 of 9" in text
    assert "simplecil has 2 of 3" in text
    with themed():
        table = comparison.spread(values).table
    assert table is not None
    assert {row[0] for row in table.rows} == {"loda", "sequential"}
    whole = copy.deepcopy(values)
    whole["completeness"]["complete"] = True
    assert incomplete(whole, "") == ""


def test_ranks_are_told_with_their_tests() -> None:
    values = document()
    values["ranks"]["a_last"] = {
        "roots": 24, "mean_ranks": {"b": 1.8, "a": 1.2}, "friedman": {"p": 0.00001}, "kendall_w": 0.8,
    }  # fmt: skip
    text = comparison.ranking(values)
    assert "a 1.20, b 1.80" in text
    assert "Friedman p < 0.0001" in text
    assert "W 0.80" in text
