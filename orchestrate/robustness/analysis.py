"""All statistics of a robustness study as one JSON document: null and a reason where something can't be known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrate.robustness.by_task import disparity, per_position
from orchestrate.robustness.paired import holm, paired_difference, root_means
from orchestrate.robustness.precision import precision
from orchestrate.robustness.ranks import performance_profiles, rank_agreement
from orchestrate.robustness.spread import spread
from orchestrate.robustness.tidy import METRICS, Design, Scores, score_orders
from orchestrate.robustness.variance import variance_split

COMPARED = ("a_last", "a_avg", "forgetting")
RANKED = ("a_last", "a_avg")


@dataclass(frozen=True)
class Questions:
    """What is asked of the scores.

    Attributes:
        baseline: the variant that others are subtracted from.
        alpha: share of the worst orders in the conditional value at risk.
        confidence: of all intervals; Holm's family-wise error rate is 1 less this.
        half_width: precision that ``orders needed`` asks for, in points.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    baseline: str
    alpha: float = 0.25
    confidence: float = 0.95
    half_width: float = 0.5
    resamples: int = 9999
    seed: int = 0


def analyse(frame: pd.DataFrame, design: Design, questions: Questions) -> dict[str, Any]:
    """The statistics of a tidy frame.

    A variant that lacks an order or a seed is reported as incomplete and has no other figures.

    Args:
        frame: see :data:`orchestrate.robustness.tidy.COLUMNS`.
        design: what a complete study holds.
        questions: the baseline, and how precise.
    """
    scores = score_orders(frame, design)
    whole = [name for name in design.settings if scores.complete(name)]
    return {
        "baseline": questions.baseline,
        "alpha": questions.alpha,
        "confidence": questions.confidence,
        "half_width": questions.half_width,
        "seeds": list(design.seeds),
        "roots": dict(design.roots),
        "units": _units(design),
        "metrics": {name: {"title": m.title, "better": m.better} for name, m in METRICS.items()},
        "completeness": _completeness(scores),
        "spread": {name: spreads(scores, name, questions) for name in whole},
        "per_order": {name: _per_order(scores, name) for name in whole},
        "disparity": {name: _disparity(frame, scores, name) for name in whole},
        "per_position": {name: _positions(frame, scores, name, questions) for name in whole},
        "variance": {name: _variances(scores, name) for name in whole},
        "paired": {metric: _paired(scores, whole, metric, questions) for metric in COMPARED},
        "ranks": {metric: _ranks(scores, whole, metric) for metric in RANKED},
        "profiles": {
            metric: performance_profiles({n: v for n in whole if len(v := scores.by_order(n, metric))})
            for metric in RANKED
        },
        "precision": {name: _precisions(scores, name, questions) for name in whole},
    }


def _units(design: Design) -> dict[str, Any]:
    orders, roots = len(design.orders), design.root_count
    note = (
        f"{orders} orders from {roots} tree roots: orders of one root share their first tasks, so intervals and tests "
        "treat a root as one observation"
        if design.tree
        else f"{orders} orders, each an observation of its own"
    )
    return {"orders": orders, "roots": roots, "seeds": len(design.seeds), "tree": design.tree, "note": note}


def _completeness(scores: Scores) -> dict[str, Any]:
    expected = len(scores.design.orders) * len(scores.design.seeds)
    variants: dict[str, dict[str, Any]] = {
        name: {
            "expected": expected,
            "present": expected - len(missing),
            "missing": [{"order": order, "seed": seed} for order, seed in missing],
            "reason": scores.incomplete_reason(name) if missing else None,
        }
        for name, missing in scores.missing.items()
    }
    present = sum(entry["present"] for entry in variants.values())
    total = expected * len(variants)
    return {"expected": total, "present": present, "complete": present == total, "variants": variants}


def spreads(scores: Scores, name: str, questions: Questions) -> dict[str, Any]:
    """Every metric's spread over orders for one complete setting."""
    found: dict[str, Any] = {}
    for metric, facts in METRICS.items():
        values = scores.by_order(name, metric)
        if metric in scores.undefined[name]:
            found[metric] = {"mean": None, "reasons": {"mean": scores.undefined[name][metric]}}
            continue
        found[metric] = spread(
            values,
            scores.design.roots,
            alpha=questions.alpha,
            confidence=questions.confidence,
            higher_is_better=facts.better == "higher",
        )
    return found


def _per_order(scores: Scores, name: str) -> dict[str, dict[str, float]]:
    return {
        metric: {str(order): float(value) for order, value in scores.by_order(name, metric).items()}
        for metric in METRICS
        if metric not in scores.undefined[name]
    }


def _cells(frame: pd.DataFrame, scores: Scores, name: str) -> pd.DataFrame:
    return frame[(frame["setting"] == name) & frame["order_name"].isin(scores.design.orders)]


def _disparity(frame: pd.DataFrame, scores: Scores, name: str) -> dict[str, Any]:
    if scores.design.own_tasks:
        why = "class orders: every order has tasks of its own, so there is no task to follow through them"
        return dict.fromkeys(("per_task", "average", "maximum", "worst_task")) | {"reasons": {"per_task": why}}
    cells = _cells(frame, scores, name)
    return disparity(cells[cells["i"] == cells["i"].max()])


def _positions(frame: pd.DataFrame, scores: Scores, name: str, questions: Questions) -> list[dict[str, Any]] | None:
    if name in scores.joint:
        return None
    cells = _cells(frame, scores, name)
    return per_position(cells, scores.design.roots, scores.design.tasks, questions.confidence)


def _variances(scores: Scores, name: str) -> dict[str, Any]:
    if name in scores.joint:
        why = "joint training doesn't depend on the order"
        return {metric: {"components": None, "reasons": {"components": why}} for metric in RANKED}
    return {metric: variance_split(scores.by_seed(name, metric)) for metric in RANKED}


def left_out(scores: Scores, metric: str) -> dict[str, str]:
    """Variants that can't take part, and why."""
    return {
        name: scores.incomplete_reason(name) if scores.missing[name] else scores.undefined[name][metric]
        for name in scores.design.settings
        if scores.missing[name] or metric in scores.undefined[name]
    }


def _paired(scores: Scores, whole: list[str], metric: str, questions: Questions) -> dict[str, Any]:
    out = left_out(scores, metric)
    base = questions.baseline
    found: dict[str, Any] = {"baseline": base, "differences": {}, "left_out": out, "reasons": {}}
    if base in out:
        found["reasons"]["differences"] = f"the baseline {base}: {out[base]}"
        return found
    others = [name for name in whole if name != base and name not in out]
    if not others:
        found["reasons"]["differences"] = "no other variant to compare with"
    found["differences"] = differences(
        scores.by_order(base, metric),
        {name: scores.by_order(name, metric) for name in others},
        scores.design.roots,
        questions,
        higher_is_better=METRICS[metric].better == "higher",
    )
    return found


def differences(
    base: pd.Series,
    others: Mapping[str, pd.Series],
    roots: Mapping[str, str],
    questions: Questions,
    *,
    higher_is_better: bool,
) -> dict[str, Any]:
    """``base`` minus each of the others on the same orders, with Holm's correction over all of them.

    Args:
        base: a metric by order name.
        others: the same of other variants.
        roots: root of each order.
        questions: confidence, precision and the bootstrap.
        higher_is_better: which sign counts as won.
    """
    found = {}
    for name, values in others.items():
        block = paired_difference(
            base,
            values,
            roots,
            confidence=questions.confidence,
            resamples=questions.resamples,
            seed=questions.seed,
            higher_is_better=higher_is_better,
        )
        per_order = pd.Series(block["per_order"])
        block["precision"] = precision(per_order, roots, questions.half_width, questions.confidence)
        found[name] = block
    corrected = holm({name: block["wilcoxon"]["p"] for name, block in found.items()}, 1 - questions.confidence)
    for name, block in found.items():
        adjusted, rejected = corrected.get(name, (None, None))
        block["wilcoxon"] |= {"p_holm": adjusted, "rejected": rejected}
    return found


def _ranks(scores: Scores, whole: list[str], metric: str) -> dict[str, Any]:
    out = dict.fromkeys(scores.joint, "joint training is a bound, not a contestant") | left_out(scores, metric)
    names = [name for name in whole if name not in out]
    columns: Mapping[str, pd.Series] = {
        name: root_means(scores.by_order(name, metric), scores.design.roots) for name in names
    }
    if not names:
        return {"mean_ranks": None, "reasons": {"mean_ranks": "no variant is complete"}, "left_out": out}
    return rank_agreement(pd.DataFrame(columns), METRICS[metric].better == "higher") | {"left_out": out}


def _precisions(scores: Scores, name: str, questions: Questions) -> dict[str, Any]:
    return {
        metric: precision(
            scores.by_order(name, metric), scores.design.roots, questions.half_width, questions.confidence
        )
        for metric in RANKED
        if metric not in scores.undefined[name]
    }
