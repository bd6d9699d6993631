"""Whether the variants rank alike under every order, and how often each gets above a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

MAX_POINTS = 201


def rank_agreement(table: pd.DataFrame, higher_is_better: bool = True) -> dict[str, Any]:
    """Friedman's test and Kendall's W of the variants' ranks.

    Args:
        table: a row for each root (mean of its orders), a column for each variant; no gaps.
        higher_is_better: rank 1 is the best.

    Returns:
        ``mean_ranks``; ``friedman`` (statistic, p: that all variants are alike), corrected for ties (scipy); and
        ``kendall_w`` = statistic / (roots x (variants - 1)): 1 where all orders rank the variants alike, 0 where they
        don't agree at all (Kendall and Babington Smith 1939).
    """
    roots, variants = table.shape
    data = table.to_numpy(dtype=float).round(9)
    ranks = stats.rankdata(-data if higher_is_better else data, axis=1)
    found: dict[str, Any] = {
        "variants": variants,
        "roots": roots,
        "mean_ranks": {str(name): float(rank) for name, rank in zip(table.columns, ranks.mean(axis=0), strict=True)}
        if variants > 1
        else None,
        "friedman": None,
        "kendall_w": None,
        "reasons": {},
    }
    why = None
    if variants < 3:
        why = f"{variants} variant{'s' if variants != 1 else ''}: Friedman's test compares three or more"
    elif roots < 2:
        why = "one root: ranks under other orders can't be known"
    elif (ranks == ranks[:, :1]).all():
        why = "all variants are tied under every order"
    if why is not None:
        found["reasons"] = {"friedman": why, "kendall_w": why}
        return found
    tested = stats.friedmanchisquare(*data.T)
    return found | {
        "friedman": {"statistic": float(tested.statistic), "p": float(tested.pvalue)},
        "kendall_w": float(tested.statistic / (roots * (variants - 1))),
    }


def performance_profiles(values: Mapping[str, pd.Series]) -> dict[str, Any]:
    """Share of orders with a score above tau, by variant (Dolan and More 2002; for scores Agarwal et al. 2021).

    Args:
        values: scores by order name, by variant.

    Returns:
        ``tau``, ascending, and ``share``, by variant: the survival function of the scores (scipy's ecdf), which steps
        down at each score.
    """
    if not values:
        return {"tau": [], "share": {}}
    every = np.unique(np.concatenate([series.to_numpy(dtype=float) for series in values.values()]))
    if len(every) > MAX_POINTS:
        every = np.linspace(every[0], every[-1], MAX_POINTS)
    tau = np.concatenate([[math.floor(every[0]) - 1.0], every])
    share = {
        name: stats.ecdf(series.to_numpy(dtype=float)).sf.evaluate(tau).tolist() for name, series in values.items()
    }
    return {"tau": tau.tolist(), "share": share}
