"""What a search optimises: one number, or several, from the accuracies of all orders of a setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from orchestrate.study import ObjectiveSettings

Direction = Literal["max", "min"]

SINGLE = "objective"
DIRECTIONS: dict[str, Direction] = {"accuracy": "max", "worst": "max", "cost": "min"}


def _checked(values: Sequence[float | None]) -> list[float]:
    """The values as floats; one that is missing or not finite has no substitute.

    A setting that failed on an order has no mean over orders. Leaving the order out would reward settings that
    fail on the hard ones.
    """
    if not values:
        raise ValueError("no order was scored; an objective needs at least one")
    bad = [f"order {index}: {value}" for index, value in enumerate(values) if value is None or not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(values)} orders without a finite value ({', '.join(bad)}): a failed trial"
        )
    return [float(value) for value in values if value is not None]


def cvar(values: Sequence[float], alpha: float) -> float:
    """Mean of the worst share ``alpha`` of the values (conditional value at risk of the lower tail).

    With ``v_1 <= ... <= v_n`` and ``m = alpha * n``:
    ``(sum_i w_i v_i) / m`` with ``w_i = min(1, max(0, m - (i - 1)))``.
    So an order may count in part, and the result is continuous in ``alpha``: the mean at ``alpha = 1``, the minimum
    for ``alpha <= 1/n`` (Rockafellar and Uryasev 2002, for equally likely outcomes).

    Example:
        >>> cvar([70.0, 80.0, 90.0], 0.5)  # (70 + 0.5 * 80) / 1.5
        73.33333333333333
    """
    ordered = sorted(_checked(values))
    mass = alpha * len(ordered)
    weights = [min(1.0, max(0.0, mass - index)) for index in range(len(ordered))]
    return math.fsum(weight * value for weight, value in zip(weights, ordered, strict=True)) / mass


def across_orders(values: Sequence[float | None], settings: ObjectiveSettings) -> float:
    """Put the orders of one setting together.

    ``mean``; ``worst``: the minimum; ``cvar``: :func:`cvar` with ``alpha``; ``mean_minus_std``: mean less ``k`` times
    the standard deviation with n - 1 in the denominator (of one order: its value).

    Args:
        values: the metric of each order, percent.
        settings: which way, and its constants.

    Raises:
        ValueError: a value is missing or not finite, or there is none; such a setting is a failed trial.
    """
    checked = _checked(values)
    if settings.across_orders == "worst":
        return min(checked)
    if settings.across_orders == "cvar":
        return cvar(checked, settings.alpha)
    mean = statistics.fmean(checked)
    if settings.across_orders == "mean_minus_std" and len(checked) > 1:
        return mean - settings.k * statistics.stdev(checked)
    return mean


def metric_of(summary: Any, metric: str) -> float | None:
    """A metric of one order's summary, an object or a mapping; None for an order without one."""
    value = summary.get(metric) if isinstance(summary, Mapping) else getattr(summary, metric, None)
    return None if value is None else float(value)


def objective_values(
    summaries: Sequence[Any], seconds: float | Sequence[float], settings: ObjectiveSettings
) -> dict[str, float]:
    """The objectives of one setting, by the names of :func:`objective_directions`.

    Args:
        summaries: one for each order, with the metric as an attribute or key, percent; None for an order that failed.
        seconds: computing time of the setting's stages, whether run now or reused (else the order of trials would
            decide what a setting costs): one number, or one for each order, which are added up.
        settings: the study's objective.

    Returns:
        ``{"objective": ...}``, or with ``multi`` those of ``accuracy`` (mean over orders), ``worst`` (minimum over
        orders) and ``cost`` (seconds) that it names.

    Raises:
        ValueError: an order's metric, or the time where it is asked for, is missing or not finite.
    """
    values = [None if summary is None else metric_of(summary, settings.metric) for summary in summaries]
    if not settings.multi:
        return {SINGLE: across_orders(values, settings)}
    checked = _checked(values)
    found = {"accuracy": statistics.fmean(checked), "worst": min(checked)}
    if "cost" in settings.multi:
        found["cost"] = math.fsum([seconds] if isinstance(seconds, int | float) else seconds)
        if not math.isfinite(found["cost"]):
            raise ValueError(f"cost: expected seconds, but got {found['cost']}")
    return {name: found[name] for name in settings.multi}


def objective_directions(settings: ObjectiveSettings) -> list[tuple[str, Direction]]:
    """Names of the objectives, and whether each is to be large or small."""
    return [(name, DIRECTIONS[name]) for name in settings.multi] if settings.multi else [(SINGLE, "max")]


def objective_labels(settings: ObjectiveSettings) -> list[str]:
    """What the objectives are called where people read them, in the same order."""
    if settings.multi:
        unit = {"accuracy": f"mean {settings.metric}", "worst": f"worst {settings.metric}", "cost": "seconds"}
        return [unit[name] for name in settings.multi]
    constant = {"cvar": f" {settings.alpha:g}", "mean_minus_std": f" {settings.k:g}"}.get(settings.across_orders, "")
    return [f"{settings.metric} ({settings.across_orders}{constant})"]
