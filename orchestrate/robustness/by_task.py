"""What the order does to single tasks: disparity of their final accuracy, and accuracy by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from orchestrate.robustness.spread import clustered_interval, no_interval


def disparity(final: pd.DataFrame) -> dict[str, Any]:
    """Order-normalised performance disparity (Yoon et al. 2020, arXiv 1902.09432).

    For each task, the largest minus the smallest final accuracy over orders; its average (AOPD) and maximum (MOPD) over
    tasks. With several training seeds the accuracies are means over seeds, so that what is left is due to the order.

    Args:
        final: columns task, order_name, seed, accuracy (%): after the last task of each order.

    Returns:
        ``per_task``, ``average``, ``maximum``, ``worst_task``; null with one order.
    """
    by_order = final.groupby(["task", "order_name"], sort=False)["accuracy"].mean().unstack("order_name")
    if by_order.shape[1] < 2:
        reason = "one order: there is no other to differ from"
        return dict.fromkeys(("per_task", "average", "maximum", "worst_task")) | {"reasons": {"per_task": reason}}
    per_task = (by_order.max(axis=1) - by_order.min(axis=1)).round(9)
    same = per_task.max() == 0
    return {
        "per_task": {str(task): float(value) for task, value in per_task.items()},
        "average": float(per_task.mean()),
        "maximum": float(per_task.max()),
        "worst_task": None if same else str(per_task.idxmax()),
        "reasons": {"worst_task": "no task's final accuracy depends on the order"} if same else {},
    }


def per_position(cells: pd.DataFrame, roots: Mapping[str, str], tasks: int, confidence: float) -> list[dict[str, Any]]:
    """Accuracy on whichever task stands at each position, when it was new and at the end.

    Args:
        cells: columns order_name, seed, i, j, accuracy of a method that learns task after task.
        roots: root of each order.
        tasks: how many.
        confidence: of the intervals.

    Returns:
        For each 0-based position: ``new`` (the diagonal) and ``final`` (the last row), each mean, std and interval.
    """
    found = []
    for position in range(tasks):
        column = cells[cells["j"] == position]
        entry: dict[str, Any] = {"position": position}
        for name, row in (("new", position), ("final", tasks - 1)):
            values = column[column["i"] == row].groupby("order_name", sort=False)["accuracy"].mean()
            units = [roots[str(order)] for order in values.index]
            why = no_interval(len(set(units)), len(values))
            interval = None if why else clustered_interval(values.to_numpy(), units, confidence)
            entry[name] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else None,
                "interval": list(interval) if interval else None,
                "reasons": {"interval": why} if why else {},
            }
        found.append(entry)
    return found
