"""Accuracy: as tasks are learned, the accuracy matrix, and each task over the orders."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from orchestrate.charts.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    Chart,
    Table,
    cell_text,
    new_figure,
    percent,
    shortened,
    whole_numbers,
)  # fmt: skip
from orchestrate.report_data import OrderAccuracy

_QUARTILES_FROM = 8  # orders
_NUMBERS_UP_TO = 14  # tasks: beyond that, numbers in cells are too small to read
_TABLE_ROWS = 60


def curves(orders: Sequence[OrderAccuracy], complete: bool) -> Chart:
    """Accuracy over all classes seen so far, after each task: a line an order; mean and bands only of all of them."""
    curves_NT = np.array([one.summary.curve for one in orders])
    positions = np.arange(1, curves_NT.shape[1] + 1)
    figure, (axes,) = new_figure(3.1)
    for curve in curves_NT:
        axes.plot(positions, curve, color=BLUE, alpha=0.45 if len(orders) < 13 else 0.25, linewidth=0.9)
    reading = "Each thin line is one order: accuracy on all classes seen so far, after each of its tasks."
    if complete and len(orders) > 1:
        axes.fill_between(positions, curves_NT.min(0), curves_NT.max(0), color=BLUE, alpha=0.14, linewidth=0)
        reading += " The light band runs from the worst to the best order, the thick line is the mean."
        if len(orders) >= _QUARTILES_FROM:
            low, high = np.quantile(curves_NT, [0.25, 0.75], axis=0)
            axes.fill_between(positions, low, high, color=BLUE, alpha=0.22, linewidth=0)
            reading += " The darker band holds the middle half of the orders."
        axes.plot(
            positions, curves_NT.mean(0), color=INK, linewidth=2, marker="o", markersize=4, label="mean over orders"
        )
    worst = int(np.argmin(curves_NT[:, -1]))
    if np.ptp(curves_NT[:, -1]) > 0:
        axes.plot(positions, curves_NT[worst], color=ORANGE, linewidth=1.6, label=f"worst: {orders[worst].name}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("accuracy on classes seen (%)")
    whole_numbers(axes)
    return Chart(
        "accuracy-by-order",
        "Accuracy as tasks are learned",
        reading,
        f"Lines of accuracy over {curves_NT.shape[1]} tasks for {len(orders)} orders, ending between "
        f"{curves_NT[:, -1].min():.2f} and {curves_NT[:, -1].max():.2f} percent.",
        figure,
        _order_table(orders),
    )


def _order_table(orders: Sequence[OrderAccuracy]) -> Table:
    ranked = sorted(orders, key=lambda one: one.summary.a_last)
    shown = ranked if len(ranked) <= _TABLE_ROWS else [*ranked[: _TABLE_ROWS // 2], *ranked[-_TABLE_ROWS // 2 :]]
    rows = tuple(
        (
            one.name,
            percent(one.summary.a_last),
            percent(one.summary.a_avg),
            percent(one.summary.forgetting),
            percent(one.summary.worst_task_accuracy),
        )
        for one in shown
    )
    caption = "Worst order first; %." + ("" if len(shown) == len(ranked) else f" {len(shown)} of {len(ranked)} orders.")
    return Table(("order", "A_last", "A_avg", "forgetting", "worst task"), rows, caption)


def mean_matrix(orders: Sequence[OrderAccuracy]) -> Chart:
    """The accuracy matrix by position, averaged over all orders."""
    mean = np.mean([one.matrix for one in orders], axis=0)
    size = len(mean)
    names = [str(index + 1) for index in range(size)]
    figure = _heat(mean, names, "task, by position learned", "tasks learned")
    return Chart(
        "accuracy-matrix",
        f"Accuracy matrix by position, mean over {len(orders)} orders" if len(orders) > 1 else "Accuracy matrix",
        "Row i: after i tasks. Column j: accuracy (%) on the task learned j-th. Down a column a task is forgotten.",
        f"Heat map of a {size} by {size} lower triangle; the diagonal averages {mean.diagonal().mean():.2f} percent, "
        "the "
        f"last row {mean[-1].mean():.2f} percent.",
        figure,
    )


def order_matrix(one: OrderAccuracy, tasks: Sequence[str], which: str) -> Chart:
    """The accuracy matrix of one order, with its tasks' names."""
    learned = range(one.matrix.shape[1]) if one.joint else one.order
    names = [shortened(tasks[index], 16) for index in learned]
    figure = _heat(one.matrix, names, "accuracy on", "tasks learned", slanted=True)
    reading = f"{one.name}: columns are its tasks in the order learned, row i is after i tasks; accuracy in %."
    if one.joint:
        reading = "All tasks learned at once: accuracy in % on each."
    return Chart(
        f"accuracy-matrix-{which}",
        f"Accuracy matrix of the {which} order" if which != "only" else "Accuracy matrix",
        reading,
        f"Heat map of {one.name}: A_last {one.summary.a_last:.2f} percent, worst task "
        f"{names[one.summary.worst_task] if not one.joint else names[int(np.argmin(one.matrix[0]))]}.",
        figure,
    )


def _heat(matrix: np.ndarray, names: Sequence[str], x_label: str, y_label: str, slanted: bool = False) -> Figure:
    rows, columns = matrix.shape
    side = min(0.42, 3.9 / columns)
    figure, (axes,) = new_figure(max(1.5, rows * side + (1.55 if slanted else 0.85)))
    norm, colours = Normalize(0, 100), matplotlib.colormaps["viridis"]
    axes.grid(False)
    mesh = axes.pcolormesh(np.ma.masked_invalid(matrix), cmap=colours, norm=norm, edgecolors="none")
    axes.invert_yaxis()
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value) and columns <= _NUMBERS_UP_TO:
            text = cell_text(*colours(norm(value))[:3])
            axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8.5, color=text)
    step = 1 if columns <= 25 else 5
    ticks = range(0, columns, step)
    angle = {"rotation": 38, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks([k + 0.5 for k in ticks], [names[k] for k in ticks], **angle)  # type: ignore[arg-type]
    axes.set_yticks(np.arange(0, rows, step) + 0.5, [str(k + 1) for k in range(0, rows, step)])
    if rows == 1 and columns > 1:
        axes.set_yticks([0.5], ["all"])
    axes.tick_params(length=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if columns > _NUMBERS_UP_TO:
        bar = figure.colorbar(mesh, ax=axes, label="%", shrink=0.9, aspect=22)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def disparity(orders: Sequence[OrderAccuracy], tasks: Sequence[str]) -> Chart:
    """Final accuracy of each task over the orders: how much a task's fate depends on the order."""
    by_task = {index: np.array([one.by_task()[index] for one in orders]) for index in range(len(tasks))}
    ranked = sorted(by_task, key=lambda index: np.ptp(by_task[index]))
    figure, (axes,) = new_figure(0.9 + 0.36 * len(tasks))
    for row, index in enumerate(ranked):
        values = by_task[index]
        axes.plot([values.min(), values.max()], [row, row], color=MUTED, linewidth=1.2, zorder=1)
        axes.plot(values, np.full(len(values), row), "o", color=BLUE, alpha=0.55, markersize=4.5, markeredgewidth=0)
        axes.plot([values.mean()], [row], "|", color=INK, markersize=13, markeredgewidth=2)
    axes.set_yticks(range(len(ranked)), [shortened(tasks[index]) for index in ranked])
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    axes.set_xlabel("final accuracy (%)")
    axes.grid(axis="y", visible=False)
    spreads = {index: float(np.ptp(values)) for index, values in by_task.items()}
    rows = tuple(
        (
            tasks[i],
            percent(by_task[i].min()),
            percent(by_task[i].mean()),
            percent(by_task[i].max()),
            percent(spreads[i]),
        )
        for i in reversed(ranked)
    )
    average, largest = float(np.mean(list(spreads.values()))), max(spreads.values())
    return Chart(
        "disparity",
        "What the order does to each task",
        "A dot is a task's accuracy after the last task of one order, the bar its mean; the wider a row, the more its "
        "fate depends on the order.",
        f"Dots for {len(tasks)} tasks over {len(orders)} orders; the widest range is {largest:.2f} points, of "
        f"{tasks[ranked[-1]]}.",
        figure,
        Table(("task", "worst", "mean", "best", "disparity"), rows, "%, and best minus worst in points."),
        f"Order-normalised disparity (best minus worst order, Yoon et al. 2020): average {average:.2f}, maximum "
        f"{largest:.2f} points.",
    )
