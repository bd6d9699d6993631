"""What follows from the accuracy matrix of one order of tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class AccuracySummary:
    """Figures of one order, all in percent or percentage points; positions j = 0..T-1 are places in that order.

    None where a figure isn't defined (one task has nothing to forget), never NaN.

    Attributes:
        a_last: micro accuracy after the last task: over all seen test images, two decimals, as published.
        a_last_macro: mean over tasks of the last row.
        a_avg: mean over i of the micro accuracy after task i, each rounded to two decimals first, as published.
        a_avg_macro: mean over i of the mean of row i over the tasks seen.
        bwt: backward transfer, mean over j < T-1 of R[T-1, j] - R[j, j]. **Negative = forgetting**, positive =
            later tasks helped.
        forgetting: mean over j < T-1 of max over j <= i < T-1 of R[i, j], minus R[T-1, j]. **Positive = forgetting**.
            The maximum leaves the last row out, so it is negative where the last task helped.
        fwt: forward transfer, mean over j >= 1 of zero_shot[j] - baseline[j]. **Positive = earlier tasks helped**.
        learning_accuracy: mean of the diagonal: how well each task was learned when it was new.
        per_position: the diagonal, (T,).
        by_position: the last row, (T,).
        curve: micro accuracy after each task, two decimals, (T,); its mean is ``a_avg``, its end ``a_last``.
        worst_task: position of the lowest entry of the last row (the first, if several).
        worst_task_accuracy: that entry.
    """

    a_last: float
    a_last_macro: float
    a_avg: float
    a_avg_macro: float
    bwt: float | None
    forgetting: float | None
    fwt: float | None
    learning_accuracy: float
    per_position: tuple[float, ...]
    by_position: tuple[float, ...]
    curve: tuple[float, ...]
    worst_task: int
    worst_task_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def accuracy_matrix_summary(
    R_TT: ArrayLike,
    test_counts_T: ArrayLike | None = None,
    zero_shot_T: ArrayLike | None = None,
    baseline_T: ArrayLike | None = None,
) -> AccuracySummary:
    """Summarise ``R_TT[i, j]``: accuracy **in percent** on task j after learning task i.

    Args:
        R_TT: (T, T); only the lower triangle with its diagonal is read, the rest may be NaN.
        test_counts_T: (T,) test images of each task; None: all alike, so that micro equals macro but for rounding.
        zero_shot_T: (T,) percent on task j just before it is learned; the first entry isn't read.
        baseline_T: (T,) percent on task j of the model before any task; the first entry isn't read.

    Raises:
        ValueError: wrong shapes, an entry that is missing, not finite or outside 0..100, a count below 1, or only one
            of ``zero_shot_T`` and ``baseline_T``.

    Example:
        >>> accuracy_matrix_summary([[80, 0], [60, 90]], [100, 300]).a_last
        82.5
    """
    R = np.asarray(R_TT, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or len(R) == 0:
        raise ValueError(f"the accuracy matrix must be (T, T) with T >= 1, but is {R.shape}")
    T = len(R)
    rows, columns = np.tril_indices(T)
    wrong = ~((R[rows, columns] >= 0) & (R[rows, columns] <= 100))  # NaN compares false, so it is wrong too
    if wrong.any():
        i, j = int(rows[wrong][0]), int(columns[wrong][0])
        raise ValueError(f"accuracy R[{i}, {j}] must be a percentage from 0 to 100, but is {R[i, j]}")
    counts = np.ones(T) if test_counts_T is None else _vector("test_counts_T", test_counts_T, T)
    if not (counts >= 1).all() or not np.isfinite(counts).all():
        raise ValueError(f"every task needs at least one test image, but counts are {counts.tolist()}")
    curve = [_micro(R[i, : i + 1], counts[: i + 1]) for i in range(T)]
    last, diagonal = R[-1], np.diagonal(R)
    bwt = forgetting = None
    if T > 1:
        best = np.array([R[j : T - 1, j].max() for j in range(T - 1)])
        bwt = float(np.mean(last[:-1] - diagonal[:-1]))
        forgetting = float(np.mean(best - last[:-1]))
    worst = int(np.argmin(last))
    return AccuracySummary(
        a_last=curve[-1],
        a_last_macro=float(last.mean()),
        a_avg=float(np.mean(curve)),
        a_avg_macro=float(np.mean([R[i, : i + 1].mean() for i in range(T)])),
        bwt=bwt,
        forgetting=forgetting,
        fwt=_forward_transfer(zero_shot_T, baseline_T, T),
        learning_accuracy=float(diagonal.mean()),
        per_position=tuple(diagonal.tolist()),
        by_position=tuple(last.tolist()),
        curve=tuple(curve),
        worst_task=worst,
        worst_task_accuracy=float(last[worst]),
    )


def _vector(name: str, values: ArrayLike, T: int) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (T,):
        raise ValueError(f"{name} must have shape ({T},), but has {vector.shape}")
    return vector


def _micro(accuracies: np.ndarray, counts: np.ndarray) -> float:
    """Percent over all images of these tasks, two decimals.

    Right answers are whole numbers: taking them as such keeps rounding errors of the percentages from tipping the
    second decimal the other way.
    """
    right = accuracies * counts / 100
    whole = np.round(right)
    right = np.where(np.abs(right - whole) < 1e-6, whole, right)
    return float(np.round(right.sum() * 100 / counts.sum(), 2))


def _forward_transfer(zero_shot_T: ArrayLike | None, baseline_T: ArrayLike | None, T: int) -> float | None:
    if zero_shot_T is None and baseline_T is None:
        return None
    if zero_shot_T is None or baseline_T is None:
        raise ValueError("forward transfer needs both zero_shot_T and baseline_T; only one was given")
    zero_shot, baseline = _vector("zero_shot_T", zero_shot_T, T), _vector("baseline_T", baseline_T, T)
    for name, vector in (("zero_shot_T", zero_shot), ("baseline_T", baseline)):
        if not ((vector[1:] >= 0) & (vector[1:] <= 100)).all():
            raise ValueError(f"{name} must hold percentages from 0 to 100 after its first entry, but is {vector}")
    return float(np.mean(zero_shot[1:] - baseline[1:])) if T > 1 else None
