"""How much of the spread is due to the order, how much to the training seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def variance_split(scores: pd.DataFrame) -> dict[str, Any]:
    """Variance components of one variant's scores: tree root, order, training seed, residual.

    Orders and seeds are crossed and both random; orders are nested in roots. The components equate the mean squares of
    the analysis of variance (statsmodels) to what is expected of them, which for complete data is what REML gives
    as long as none is negative. One that comes out negative is 0. The residual holds what depends on order and seed
    together. ``root`` is left out where orders don't come from a tree.

    Args:
        scores: columns order_name, root, seed, value: each order under each seed, once.

    Returns:
        ``components`` (variances in squared points) and ``shares`` of their sum, by source; ``std`` by source; null
        with the reason where sources can't be told apart.
    """
    orders, seeds = scores["order_name"].nunique(), scores["seed"].nunique()
    roots = scores["root"].nunique()
    found: dict[str, Any] = {"orders": orders, "seeds": seeds, "roots": roots}
    found |= {"components": None, "std": None, "shares": None, "notes": [], "reasons": {}}
    if len(scores) != orders * seeds:
        found["reasons"] = {"components": "incomplete: not every order has every seed"}
        return found
    if orders < 2:
        found["reasons"] = {"components": "one order: its effect can't be told from that of the method"}
        return found
    tree = roots < orders
    if tree and roots < 2:
        found["reasons"] = {"components": "one tree root: how roots differ can't be known"}
        return found
    if np.ptp(scores["value"]) < 1e-9:
        found["reasons"] = {"components": "all scores are equal: there is no variance to split"}
        return found
    squares = _mean_squares(scores, tree)
    # Every root has this many orders; where the numbers differ, it is the usual weighted mean of them.
    sizes = scores.groupby("root")["order_name"].nunique().to_numpy()
    per_root = (orders - (sizes**2).sum() / orders) / (roots - 1) if tree else 1.0
    if seeds < 2:
        parts = {"order_and_residual": squares["order"]}
        if tree:
            parts = {"root": (squares["root"] - squares["order"]) / per_root} | parts
        found["reasons"] = {"seed": "one training seed: what is due to it, and to chance, is part of the order's"}
    else:
        residual = squares["residual"]
        parts = {"order": (squares["order"] - residual) / seeds, "seed": (squares["seed"] - residual) / orders}
        if tree:
            parts = {"root": (squares["root"] - squares["order"]) / (seeds * per_root)} | parts
        parts["residual"] = residual
    negative = [name for name, value in parts.items() if value < 0]
    if negative:
        found["notes"] = [
            f"the estimate for {', '.join(negative)} is negative and shown as 0: too small to be seen here"
        ]
    components = {name: max(0.0, float(value)) for name, value in parts.items()}
    total = sum(components.values())
    return found | {
        "components": components,
        "std": {name: value**0.5 for name, value in components.items()},
        "shares": {name: value / total for name, value in components.items()},
    }


def _mean_squares(scores: pd.DataFrame, tree: bool) -> dict[str, float]:
    """Mean squares by source; ``order`` is within roots for a tree."""
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    if scores["seed"].nunique() < 2:  # no degrees of freedom are left for a model of every order
        if not tree:
            return {"order": float(scores["value"].var(ddof=1))}
        table = anova_lm(smf.ols("value ~ C(root)", scores).fit())
        return {"root": float(table["mean_sq"]["C(root)"]), "order": float(table["mean_sq"]["Residual"])}
    table = anova_lm(smf.ols("value ~ C(order_name) + C(seed)", scores).fit())
    sums, degrees = table["sum_sq"], table["df"]
    found = {
        "order": float(table["mean_sq"]["C(order_name)"]),
        "seed": float(table["mean_sq"]["C(seed)"]),
        "residual": float(table["mean_sq"]["Residual"]),
    }
    if tree:
        above = anova_lm(smf.ols("value ~ C(root)", scores).fit())
        found["root"] = float(above["mean_sq"]["C(root)"])
        within = degrees["C(order_name)"] - above["df"]["C(root)"]
        found["order"] = float((sums["C(order_name)"] - above["sum_sq"]["C(root)"]) / within)
    if not np.isfinite(list(found.values())).all():
        raise ValueError(f"variance_split: mean squares must be finite, but are {found}")
    return found
