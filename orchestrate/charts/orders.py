"""Which order hurts, and why."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

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
)  # fmt: skip
from orchestrate.order_effects import Effect, OrderEffects
from orchestrate.report_data import OrderAccuracy

_ROWS = 30  # orders shown


def order_map(orders: Sequence[OrderAccuracy], tasks: Sequence[str]) -> Chart:
    """Each order as a row of its tasks, coloured by what this order did to them, beside its A_last."""
    ranked = sorted(orders, key=lambda one: (-one.summary.a_last, one.name))
    shown = ranked if len(ranked) <= _ROWS else [*ranked[: _ROWS // 2], *ranked[-_ROWS // 2 :]]
    means = {index: np.mean([one.by_task()[index] for one in orders]) for index in range(len(tasks))}
    deviation_NT = np.array([[one.by_task()[index] - means[index] for index in one.order] for one in shown])
    reach = max(1.0, float(np.abs(deviation_NT).max()))
    ratios = (max(1.6, min(3.2, 0.34 * len(tasks))), 1.25)
    figure, (cells, scores) = new_figure(1.15 + 0.235 * len(shown), columns=2, ratios=ratios)
    colours, norm = matplotlib.colormaps["PuOr"], Normalize(-reach, reach)
    cells.grid(False)
    mesh = cells.pcolormesh(deviation_NT, cmap=colours, norm=norm, edgecolors="none")
    for row, one in enumerate(shown):
        for column, index in enumerate(one.order):
            text = cell_text(*colours(norm(deviation_NT[row, column]))[:3])
            size = 8 if len(tasks) <= 12 else 6
            cells.text(column + 0.5, row + 0.5, str(index), ha="center", va="center", fontsize=size, color=text)
    cells.invert_yaxis()
    cells.set_yticks([])
    step = 1 if len(tasks) <= 12 else 5
    cells.set_xticks(np.arange(0, len(tasks), step) + 0.5, [str(k + 1) for k in range(0, len(tasks), step)])
    cells.set_xlabel("position learned")
    cells.set_ylabel("orders, best first" if len(shown) == len(ranked) else f"best and worst {_ROWS // 2} orders")
    for spine in cells.spines.values():
        spine.set_visible(False)
    cells.tick_params(length=0)
    values = [one.summary.a_last for one in shown]
    places = np.arange(len(shown)) + 0.5
    mean = float(np.mean([one.summary.a_last for one in orders]))
    scores.hlines(places, mean, values, color=MUTED, linewidth=1)
    scores.plot(values, places, "o", color=BLUE, markersize=5)
    scores.axvline(mean, color=INK, linewidth=1)
    scores.set_ylim(len(shown), 0)
    scores.set_yticks([])
    scores.grid(axis="y", visible=False)
    scores.locator_params(axis="x", nbins=4)
    scores.set_xlabel("A_last (%)")
    bar = figure.colorbar(mesh, ax=[cells, scores], location="top", aspect=40, shrink=0.9, pad=0.02)
    bar.set_label("final accuracy of the task against its mean over orders (points)", fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    best, worst = ranked[0], ranked[-1]
    return Chart(
        "order-effects",
        "Which order hurts",
        "A row is an order, read from left to right; numbers are tasks. Orange cells are tasks that ended worse in "
        "this "
        "order than they do on average, purple ones better; the dot is the order's A_last, the line the mean.",
        f"Grid of {len(shown)} orders. Best: {best.name} with A_last {best.summary.a_last:.2f} percent; worst: "
        f"{worst.name} "
        f"with {worst.summary.a_last:.2f} percent.",
        figure,
        note="Tasks: " + ", ".join(f"{index} {name}" for index, name in enumerate(tasks)) + ".",
    )


def effects(learned: OrderEffects, final: OrderEffects, tasks: Sequence[str]) -> Chart:
    """Effects of position and predecessor on accuracy when a task is learned, and at the end."""
    size = len(tasks)
    figure, (top, bottom) = new_figure(1.75 + 0.5 * size, rows=2)
    _dots(top, learned.position, final.position, [f"position {level + 1}" for level in range(size)])
    _dots(bottom, learned.predecessor, final.predecessor, [f"after {shortened(name, 14)}" for name in tasks])
    top.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0)
    bottom.set_xlabel("effect on accuracy (points)")
    order = max(final.position, key=lambda effect: abs(effect.value))
    neighbour = max(final.predecessor, key=lambda effect: abs(effect.value))
    rows = tuple(
        (label, _number(one), _number(two))
        for label, one, two in [
            *((f"position {a.level + 1}", a, b) for a, b in zip(learned.position, final.position, strict=True)),
            *((f"after {tasks[a.level]}", a, b) for a, b in zip(learned.predecessor, final.predecessor, strict=True)),
        ]
    )
    note = (
        f"Fitted to {final.orders} orders by least squares: accuracy = mean + task + position + predecessor, effects "
        "of a "
        f"kind summing to zero. It explains {100 * final.explained:.0f}% of the variance of final accuracy, of which "
        "the "
        f"tasks alone {100 * final.explained_without_order:.0f}%. Intervals: 95%, by leaving out one order at a time; "
        "they "
        "hold one by one, not all at once."
    )
    return Chart(
        "position-and-predecessor",
        "Why: position and predecessor",
        "How many points a task gains or loses by being learned at a position (above) or right after another task "
        "(below), "
        "whatever task it is: when just learned, and after the last task. Lines that cross zero could be chance.",
        f"Position {order.level + 1} changes final accuracy most, by {order.value:+.2f} points; of predecessors "
        f"{tasks[neighbour.level]}, by {neighbour.value:+.2f} points.",
        figure,
        Table(("level", "when learned", "at the end"), rows, "Points against the average level; 95% interval."),
        note,
    )


def _dots(axes: Axes, learned: Sequence[Effect], final: Sequence[Effect], names: Sequence[str]) -> None:
    series = ((learned, BLUE, "o", -0.17, "when learned"), (final, ORANGE, "s", 0.17, "at the end"))
    for found, colour, marker, shift, label in series:
        places = [effect.level + shift for effect in found]
        for effect, place in zip(found, places, strict=True):
            axes.plot(effect.interval_95, [place, place], color=colour, linewidth=1.4)
        axes.plot([effect.value for effect in found], places, marker, color=colour, markersize=5, label=label)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def _number(effect: Effect) -> str:
    low, high = effect.interval_95
    return f"{effect.value:+.2f} [{low:+.2f}, {high:+.2f}]"


def extremes(orders: Sequence[OrderAccuracy], tasks: Sequence[str]) -> str:
    """One sentence: the best and the worst order, by task names."""
    ranked = sorted(orders, key=lambda one: one.summary.a_last)
    if ranked[0].summary.a_last == ranked[-1].summary.a_last:
        return f"A_last is {percent(ranked[0].summary.a_last)}% whatever the order."
    texts = [
        f"{word} {percent(one.summary.a_last)}% ({' > '.join(tasks[index] for index in one.order)})"
        for word, one in (("Worst order:", ranked[0]), ("best order:", ranked[-1]))
    ]
    return "; ".join(texts) + "."
