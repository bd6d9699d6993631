"""How many orders it takes to know a mean, or a difference, to a given precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from scipy import stats

from orchestrate.robustness.paired import root_means
from orchestrate.robustness.spread import no_interval

LIMIT = 1_000_000


def units_needed(std: float, half_width: float, confidence: float) -> int:
    """The fewest independent observations whose t interval is at most ``half_width`` on either side.

    The smallest n >= 2 with ``t(n - 1) * std / sqrt(n) <= half_width``, for a spread as measured.

    Raises:
        ValueError: a negative spread, or a half-width that isn't positive.
    """
    if std < 0 or half_width <= 0 or not math.isfinite(std):
        raise ValueError(f"units_needed: expected std >= 0 and half_width > 0, but got {std} and {half_width}")

    def enough(n: int) -> bool:
        return bool(stats.t.ppf((1 + confidence) / 2, n - 1) * std / math.sqrt(n) <= half_width)

    low, high = 2, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > LIMIT:
            raise ValueError(f"units_needed: more than {LIMIT:,}; ask for less precision")
    while low < high:  # the half-width falls with n
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def precision(values: pd.Series, roots: Mapping[str, str], half_width: float, confidence: float) -> dict[str, Any]:
    """Orders needed for an interval of the mean that reaches ``half_width`` to either side.

    In a tree the root is what counts: more continuations of the same roots would not do. The answer is in roots
    with as many continuations as now, and in orders.

    Args:
        values: a metric, or a paired difference, by order name.
        roots: root of each order.
        half_width: wanted, in points.
        confidence: of the interval.

    Returns:
        ``half_width_now``, ``roots_now``, ``roots_needed``, ``orders_needed``; null with one root.
    """
    means = root_means(values, roots)
    count, orders = len(means), len(values)
    found: dict[str, Any] = {
        "half_width": half_width,
        "half_width_now": None,
        "orders_now": orders,
        "roots_now": count,
        "roots_needed": None,
        "orders_needed": None,
        "reasons": {},
    }
    why = no_interval(count, orders)
    if why is not None:
        found["reasons"] = {"half_width_now": why, "orders_needed": why}
        return found
    std = float(means.std(ddof=1))
    found["half_width_now"] = float(stats.t.ppf((1 + confidence) / 2, count - 1) * std / math.sqrt(count))
    try:
        needed = units_needed(std, half_width, confidence)
    except ValueError as error:
        found["reasons"] = {"orders_needed": str(error)}
        return found
    return found | {"roots_needed": needed, "orders_needed": math.ceil(needed * orders / count)}
