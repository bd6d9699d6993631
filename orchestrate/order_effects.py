"""Why an order hurts: what the position of a task and the task just before it do to its accuracy.

The model, fitted by ordinary least squares, is additive: accuracy = mean + task + position + predecessor, with effects
of each kind that sum to zero (the first task of an order has no predecessor and gets none). It describes averages: what
one predecessor does to one task in particular isn't in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Effect:
    """Percentage points against the average level of its kind, with a 95% interval."""

    level: int  # a 0-based position, or a task's index
    value: float
    interval_95: tuple[float, float]


@dataclass(frozen=True)
class OrderEffects:
    """The fitted effects.

    Attributes:
        position: one for each place in the order.
        predecessor: one for each task, as the one learned just before.
        orders: how many orders were fitted.
        explained: share of the variance of accuracy between tasks and orders that the whole model explains (R squared).
        explained_without_order: the same of the tasks alone; the difference is what the order adds.
    """

    position: tuple[Effect, ...]
    predecessor: tuple[Effect, ...]
    orders: int
    explained: float
    explained_without_order: float


def order_effects(
    accuracies: Mapping[tuple[int, ...], Sequence[float]], roots: Mapping[tuple[int, ...], str] | None = None
) -> OrderEffects:
    """Fit the additive model.

    Args:
        accuracies: by order, the percent of its tasks in the order learned: all of them, of complete orders only.
        roots: by order, a label: orders with one label begin alike by design and count as one observation. None: every
            order is one.

    Raises:
        ValueError: too few or too similar orders to tell the effects apart and to say how sure they are.

    The intervals come from leaving one root out at a time (the jackknife over clusters, MacKinnon, Nielsen and Webb
    2023, "CV3"), with t quantiles of roots - 1 degrees of freedom: tasks of one order aren't independent of each other.
    """
    orders = sorted(accuracies)
    tasks = len(orders[0]) if orders else 0
    labels = [str(order) if roots is None else roots[order] for order in orders]
    if len(set(labels)) < 3 or tasks < 3:
        raise ValueError("their effects need at least three independent orders of at least three tasks")
    blocks = [_design(order) for order in orders]
    values = [np.asarray(accuracies[order], dtype=np.float64) for order in orders]
    y = np.concatenate(values)
    if not np.isfinite(y).all():
        raise ValueError("an accuracy is missing: only complete orders can be fitted")
    fits = [_fit(blocks, values)]
    for label in dict.fromkeys(labels):
        kept = [index for index, other in enumerate(labels) if other != label]
        fits.append(_fit([blocks[k] for k in kept], [values[k] for k in kept]))
    found = [fit for fit in fits if fit is not None]
    if len(found) < len(fits):
        raise ValueError(
            f"{len(orders)} orders are too few, or too alike, to tell {blocks[0].shape[1]} effects of {tasks} tasks "
            "apart and to say how sure they are; evaluate more orders"
        )
    size = tasks - 1
    residual = y - np.concatenate(blocks) @ found[0]
    return OrderEffects(
        _effects(found, slice(1 + size, 1 + 2 * size)),
        _effects(found, slice(1 + 2 * size, 1 + 3 * size)),
        len(orders),
        _share(y, residual),
        _share(y, _residual_of_tasks(orders, y)),
    )


def _design(order: Sequence[int]) -> np.ndarray:
    """(T, 1 + 3(T - 1)): mean, task, position, predecessor; effects of a kind sum to zero (deviation coding)."""
    tasks = len(order)
    codes = np.vstack([np.eye(tasks - 1), -np.ones((1, tasks - 1))])
    before = np.vstack([np.zeros((1, tasks - 1)), codes[list(order[:-1])]])
    return np.hstack([np.ones((tasks, 1)), codes[list(order)], codes, before])


def _fit(blocks: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> np.ndarray | None:
    """Coefficients, or None where the design doesn't determine them with something left over."""
    X = np.concatenate(blocks)
    found, _, rank, _ = np.linalg.lstsq(X, np.concatenate(values), rcond=None)
    return found if rank == X.shape[1] < len(X) else None


def _effects(fits: Sequence[np.ndarray], part: slice) -> tuple[Effect, ...]:
    """Effects of one kind: of all orders (the first fit), with intervals from the fits that leave a root out."""
    full, *others = (np.append(fit[part], -fit[part].sum()) for fit in fits)
    count = len(others)
    error = np.sqrt((count - 1) / count * ((np.array(others) - full) ** 2).sum(axis=0))
    reach = stats.t.ppf(0.975, count - 1) * error
    return tuple(Effect(k, float(v), (float(v - r), float(v + r))) for k, (v, r) in enumerate(zip(full, reach)))


def _residual_of_tasks(orders: Sequence[tuple[int, ...]], y: np.ndarray) -> np.ndarray:
    task = np.concatenate([np.asarray(order) for order in orders])
    means = np.array([y[task == index].mean() for index in range(task.max() + 1)])
    return y - means[task]


def _share(y: np.ndarray, residual: np.ndarray) -> float:
    centred = y - y.mean()
    total = float(centred @ centred)
    return 1 - float(residual @ residual) / total if total > 0 else 0.0
