"""How one variant's scores spread over orders."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from orchestrate.objective import cvar

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def no_interval(roots: int, orders: int) -> str | None:
    """Why there is no interval over orders; None if there is one."""
    if roots >= 2:
        return None
    if orders < 2:
        return "one order: how results vary over orders can't be known"
    return f"{orders} orders of one tree root: they share their first tasks, so other roots may differ by any amount"


def clustered_interval(
    values: Sequence[float] | np.ndarray, roots: Sequence[Hashable] | np.ndarray, confidence: float
) -> tuple[float, float] | None:
    """t interval of the mean over orders whose errors may be alike within a root.

    Cluster-robust standard error with the number of roots less one as degrees of freedom (Liang and Zeger 1986;
    statsmodels). Where every root has as many orders it is the t interval of the root means; where orders don't come
    from a tree it is the usual one.

    Returns:
        Lower and upper end; None with fewer than two roots.
    """
    import statsmodels.api as sm

    groups = np.unique(np.asarray(roots), return_inverse=True)[1]
    if len(values) < 2 or groups.max() < 1:
        return None
    y = np.asarray(values, dtype=float)
    if np.ptp(y) == 0:
        return float(y[0]), float(y[0])
    fit = sm.OLS(y, np.ones_like(y)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    low, high = fit.conf_int(alpha=1 - confidence)[0]
    return float(low), float(high)


def spread(
    values: pd.Series, roots: Mapping[str, str], *, alpha: float, confidence: float, higher_is_better: bool = True
) -> dict[str, Any]:
    """Summary of a metric over orders.

    Args:
        values: by order name, mean over seeds; not empty.
        roots: root of each order.
        alpha: share of the worst orders that ``cvar`` averages.
        confidence: of the interval.
        higher_is_better: which end is the worst.

    Returns:
        ``mean``, ``std`` (n - 1), ``median``, ``iqm`` (mean of the middle half: scipy's 25% trimmed mean), ``worst``
        and its ``worst_order``, ``best`` and ``best_order``, ``quantiles``, ``cvar``, ``interval``; null where it can't
        be known, with the reason under ``reasons``.
    """
    sign = 1 if higher_is_better else -1
    data = values.to_numpy(dtype=float)
    units = [roots[str(order)] for order in values.index]
    interval = clustered_interval(data, units, confidence)
    reasons = {}
    why = no_interval(len(set(units)), len(data))
    if why is not None:
        reasons["interval"] = why
    if len(data) < 2:
        reasons["std"] = "one order: how results vary over orders can't be known"
    worst, best = int(np.argmin(sign * data)), int(np.argmax(sign * data))
    return {
        "orders": len(data),
        "roots": len(set(units)),
        "mean": float(data.mean()),
        "std": float(data.std(ddof=1)) if len(data) > 1 else None,
        "median": float(np.median(data)),
        "iqm": float(stats.trim_mean(data, 0.25)),
        "worst": float(data[worst]),
        "worst_order": str(values.index[worst]),
        "best": float(data[best]),
        "best_order": str(values.index[best]),
        "quantiles": {f"{q:g}": float(np.quantile(data, q)) for q in QUANTILES},
        "cvar": sign * cvar((sign * data).tolist(), alpha),
        "interval": list(interval) if interval is not None and why is None else None,
        "reasons": reasons,
    }
