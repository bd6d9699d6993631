"""Differences between variants, order by order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from orchestrate.robustness.spread import clustered_interval, no_interval

LEAST_ROOTS, FEW_ROOTS = 3, 6  # for a bootstrap at all; for one that can be trusted


def root_means(values: pd.Series, roots: Mapping[str, str]) -> pd.Series:
    """Mean of each root's orders: orders of one root share tasks, so a root is one observation of a rank test."""
    return values.groupby([roots[str(order)] for order in values.index], sort=False).mean()


def cluster_bootstrap(
    values: Sequence[float] | np.ndarray, roots: Sequence[str], *, confidence: float, resamples: int, seed: int
) -> tuple[float, float] | None:
    """BCa bootstrap interval of the mean over orders that draws whole roots (Efron 1987; scipy).

    Args:
        values: (n,) one for each order.
        roots: (n,) the root of each.
        confidence: of the interval.
        resamples: how many draws of roots.
        seed: of the draws.

    Returns:
        Lower and upper end; None with fewer than two roots, or where all roots have the same mean, so that a draw
        changes nothing.
    """
    frame = pd.DataFrame({"value": np.asarray(values, dtype=float), "root": list(roots)})
    by_root = frame.groupby("root", sort=False)["value"].agg(["sum", "count"])
    sums, counts = by_root["sum"].to_numpy(), by_root["count"].to_numpy()
    if len(sums) < 2 or np.ptp(sums / counts) < 1e-12:
        return None

    def mean_of(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums[drawn].sum(axis=axis) / counts[drawn].sum(axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # answered with NaN, below
        found = stats.bootstrap(
            (np.arange(len(sums)),),
            mean_of,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if np.isfinite(low) and np.isfinite(high) else None


def wilcoxon(differences: pd.Series, roots: Mapping[str, str]) -> dict[str, Any]:
    """Wilcoxon's signed-rank test that the differences are symmetric around zero, two-sided, a root one observation.

    Args:
        differences: by order name.
        roots: root of each order.

    Returns:
        ``statistic``, ``p``, ``roots``, and ``smallest_p``, below which so few roots can't get; null with a reason
        where there is nothing to test.
    """
    means = root_means(differences, roots).to_numpy()
    means = means[np.abs(means) > 1e-12]  # zeros have no sign: left out, as Wilcoxon did
    count = len(means)
    found: dict[str, Any] = {"statistic": None, "p": None, "roots": count, "smallest_p": None, "reasons": {}}
    if count < 2:
        why = "all differences are zero" if count == 0 else "one root with a difference: ranks say nothing"
        found["reasons"]["p"] = why
        return found
    # Rounding errors would break ties between differences that are equal.
    tested = stats.wilcoxon(np.round(means, 9), zero_method="wilcox", alternative="two-sided")
    return found | {
        "statistic": float(tested.statistic),
        "p": float(tested.pvalue),
        "smallest_p": 2.0 ** (1 - count),
    }


def holm(p_values: Mapping[str, float | None], level: float) -> dict[str, tuple[float, bool]]:
    """Holm's step-down correction over the tests that gave a p value (statsmodels).

    Args:
        p_values: by name.
        level: family-wise error rate.

    Returns:
        Adjusted p and whether it is at most ``level``, by name.
    """
    from statsmodels.stats.multitest import multipletests

    known = {name: p for name, p in p_values.items() if p is not None}
    if not known:
        return {}
    rejected, adjusted, *_ = multipletests(list(known.values()), alpha=level, method="holm")
    return {name: (float(p), bool(r)) for name, p, r in zip(known, adjusted, rejected, strict=True)}


def paired_difference(
    first: pd.Series,
    second: pd.Series,
    roots: Mapping[str, str],
    *,
    confidence: float,
    resamples: int,
    seed: int,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """``first`` minus ``second`` on the same orders.

    Args:
        first: by order name, mean over seeds.
        second: on the same orders.
        roots: root of each order.
        confidence: of both intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        higher_is_better: which sign counts as won.

    Returns:
        ``mean``, ``std``, ``median``; ``interval_bca`` (whole roots drawn) and ``interval_t`` (cluster-robust); orders
        ``won``, ``tied`` and ``lost`` by the first; ``wilcoxon``; ``per_order``.

    Raises:
        ValueError: the orders differ, or there are none.
    """
    if set(first.index) != set(second.index) or len(first) == 0:
        raise ValueError("paired_difference: both must have the same orders, at least one")
    differences = (first - second.reindex(first.index)).rename("difference")
    data = differences.to_numpy()
    units = [roots[str(order)] for order in differences.index]
    count = len(set(units))
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    bca = cluster_bootstrap(data, units, **options)  # type: ignore[arg-type]
    interval = clustered_interval(data, units, confidence)
    reasons, notes = {}, []
    unit = "roots" if count < len(data) else "orders"
    why = no_interval(count, len(data))
    if why is not None:
        bca = interval = None
        reasons = {"interval_bca": why, "interval_t": why}
    elif count < LEAST_ROOTS:
        bca = None
        reasons["interval_bca"] = f"{count} {unit}: too few to draw from; see the t interval"
    elif bca is None:
        reasons["interval_bca"] = "the roots differ too little for a bootstrap: drawing them again changes nothing"
    if len(data) < 2:
        reasons["std"] = "one order: how the difference varies over orders can't be known"
    if bca is not None and count < FEW_ROOTS:
        notes.append(f"{count} {unit}: a bootstrap of so few is too narrow; trust the t interval")
    gain = data if higher_is_better else -data
    tied = np.abs(gain) <= 1e-9
    return {
        "orders": len(data),
        "roots": count,
        "mean": float(data.mean()),
        "std": float(data.std(ddof=1)) if len(data) > 1 else None,
        "median": float(np.median(data)),
        "interval_bca": list(bca) if bca else None,
        "interval_t": list(interval) if interval else None,
        "won": int((~tied & (gain > 0)).sum()),
        "tied": int(tied.sum()),
        "lost": int((~tied & (gain < 0)).sum()),
        "wilcoxon": wilcoxon(differences, roots),
        "per_order": {str(order): float(value) for order, value in differences.items()},
        "notes": notes,
        "reasons": reasons,
    }
