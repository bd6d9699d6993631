"""Methods compared over the same orders, from the numbers of ``robustness.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrate.charts.style import (
    BLUE,
    CYCLE,
    INK,
    MUTED,
    Chart,
    Table,
    new_figure,
    percent,
    shortened,
)  # fmt: skip

Block = Mapping[str, Any]
_METRICS = ("a_last", "a_avg", "forgetting", "learning_accuracy", "worst_task_accuracy")
_MARKERS = "os^Dv<>P"


def spread(values: Block) -> Chart:
    """A_last of each method over the orders, its mean and the mean's interval."""
    blocks = {name: block["a_last"] for name, block in values["spread"].items()}
    ranked = sorted((name for name in blocks if blocks[name]["mean"] is not None), key=lambda n: blocks[n]["mean"])
    figure, (axes,) = new_figure(0.95 + 0.42 * len(ranked))
    for row, name in enumerate(ranked):
        by_order = list(values["per_order"][name]["a_last"].values())
        axes.plot(
            by_order, np.full(len(by_order), row + 0.22), "o", color=BLUE, alpha=0.4, markersize=4, markeredgewidth=0
        )
        if blocks[name]["interval"]:
            axes.plot(blocks[name]["interval"], [row, row], color=INK, linewidth=3.2, solid_capstyle="butt")
        axes.plot([blocks[name]["mean"]], [row], "D", color=INK, markersize=6)
    axes.set_yticks(range(len(ranked)), [shortened(name, 20) for name in ranked])
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    axes.set_xlabel("A_last (%)")
    axes.grid(axis="y", visible=False)
    confidence = f"{100 * values['confidence']:.0f}%"
    best = ranked[-1]
    return Chart(
        "methods",
        "Methods over the same orders",
        f"A dot is one order, the diamond the mean over orders, the thick line its {confidence} interval. Compare "
        "methods by "
        "their paired differences, not by whether these lines overlap: the orders are the same for all.",
        "; ".join(f"{name} {blocks[name]['mean']:.2f}" for name in reversed(ranked)) + f" percent; best {best}.",
        figure,
        _spread_table(values, list(reversed(ranked))),
        values["units"]["note"] + ".",
    )


def _spread_table(values: Block, ranked: Sequence[str]) -> Table:
    rows = []
    for name in ranked:
        cells = [name]
        for metric in _METRICS:
            block = values["spread"][name].get(metric, {"mean": None})
            text = percent(block["mean"])
            if block["mean"] is not None and block.get("interval"):
                low, high = block["interval"]
                text += f" [{low:.2f}, {high:.2f}]"
            cells.append(text)
        last = values["spread"][name]["a_last"]
        cells += [percent(last.get(key)) for key in ("std", "median", "iqm", "worst", "cvar")]
        rows.append(tuple(cells))
    titles = [values["metrics"][metric]["title"] for metric in _METRICS]
    header = ("method", *titles, "std", "median", "IQM", "worst order", f"CVaR {values['alpha']:g}")
    return Table(header, tuple(rows), "Mean over orders with its interval; from std on: A_last.")


def differences(values: Block, metric: str = "a_last") -> Chart | None:
    """Paired differences: the baseline minus each other method, order by order."""
    paired = values["paired"][metric]
    found = {name: block for name, block in paired["differences"].items() if block.get("mean") is not None}
    if not found:
        return None
    baseline, title = paired["baseline"], values["metrics"][metric]["title"]
    ranked = sorted(found, key=lambda name: found[name]["mean"])
    figure, (axes,) = new_figure(0.95 + 0.42 * len(ranked))
    for row, name in enumerate(ranked):
        block = found[name]
        by_order = list(block["per_order"].values())
        axes.plot(
            by_order, np.full(len(by_order), row + 0.22), "o", color=BLUE, alpha=0.4, markersize=4, markeredgewidth=0
        )
        interval = block.get("interval_bca") or block.get("interval_t")
        if interval:
            axes.plot(interval, [row, row], color=INK, linewidth=3.2, solid_capstyle="butt")
        axes.plot([block["mean"]], [row], "D", color=INK, markersize=6)
    axes.axvline(0, color=MUTED, linewidth=1.2)
    axes.set_yticks(range(len(ranked)), [f"minus {shortened(name, 18)}" for name in ranked])
    axes.set_ylim(-0.6, len(ranked) - 0.4)
    axes.set_xlabel(f"{baseline}'s {title} minus the other's (points)")
    axes.grid(axis="y", visible=False)
    rows = []
    for name in reversed(ranked):
        block = found[name]
        test = block.get("wilcoxon") or {}
        rows.append(
            (
                name,
                f"{block['mean']:+.2f}",
                _interval(block.get("interval_bca")),
                _interval(block.get("interval_t")),
                f"{block['won']} / {block['tied']} / {block['lost']}",
                _p(test.get("p")),
                _p(test.get("p_holm")),
            )
        )
    reasons = [f"{name}: {text}" for name, text in paired.get("left_out", {}).items()]
    reasons += [text for block in found.values() for text in block.get("notes", [])]
    reasons += [text for block in found.values() for text in block.get("reasons", {}).values()]
    return Chart(
        "paired-differences",
        f"Paired differences from {baseline}",
        f"A dot is one order: {baseline} minus the other method on it. Right of zero {baseline} is better; an interval "
        "(BCa "
        "bootstrap) that holds zero means the difference could be chance.",
        "; ".join(f"{baseline} minus {name}: {found[name]['mean']:+.2f} points" for name in reversed(ranked)) + ".",
        figure,
        Table(
            ("minus", "mean", "BCa interval", "t interval", "won / tied / lost", "Wilcoxon p", "p, Holm"),
            tuple(rows),
            f"{title}, points; {baseline} minus the other.",
        ),
        "; ".join(dict.fromkeys(reasons)) + "." if reasons else "",
    )


def profiles(values: Block) -> Chart | None:
    """Share of orders on which each method is better than a threshold."""
    block = values.get("profiles", {}).get("a_last", {})
    if not block.get("share"):
        return None
    figure, (axes,) = new_figure(2.9)
    for number, (name, share) in enumerate(block["share"].items()):
        dash = "-" if number < len(CYCLE) else "--"
        colour = CYCLE[number % len(CYCLE)]
        axes.step(
            block["tau"], 100 * np.array(share), where="post", color=colour, linestyle=dash, label=name, linewidth=1.6
        )
    axes.set_xlabel("A_last above (%)")
    axes.set_ylabel("share of orders (%)")
    axes.set_ylim(-2, 104)
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.1)
    return Chart(
        "performance-profiles",
        "Performance profiles",
        "For each accuracy, the share of orders on which a method does better than that. A curve further to the right "
        "is "
        "better; one that falls steeply depends little on the order.",
        f"Curves of {len(block['share'])} methods over A_last from {min(block['tau']):.1f} to {max(block['tau']):.1f} "
        "percent.",
        figure,
    )


def positions(values: Block) -> Chart | None:
    """Final accuracy of the task learned at each position, by method."""
    found = {name: rows for name, rows in values.get("per_position", {}).items() if rows}
    if not found:
        return None
    figure, (axes,) = new_figure(2.9)
    offset = np.linspace(-0.12, 0.12, len(found)) if len(found) > 1 else [0.0]
    for number, (name, rows) in enumerate(found.items()):
        places = [row["position"] + 1 + offset[number] for row in rows]
        colour = CYCLE[number % len(CYCLE)]
        for place, row in zip(places, rows, strict=True):
            if row["final"].get("interval"):
                axes.plot([place, place], row["final"]["interval"], color=colour, linewidth=1.3)
        means = [np.nan if row["final"]["mean"] is None else row["final"]["mean"] for row in rows]
        axes.plot(
            places, means, marker=_MARKERS[number % len(_MARKERS)], color=colour, label=name, markersize=5, linewidth=1
        )
    axes.set_xlabel("position at which a task was learned")
    axes.set_ylabel("its final accuracy (%)")
    axes.set_xticks(range(1, len(next(iter(found.values()))) + 1))
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.1)
    rows_of_table = tuple(
        (name, str(row["position"] + 1), percent(row["new"]["mean"]), percent(row["final"]["mean"]))
        for name, rows in found.items()
        for row in rows
    )
    return Chart(
        "positions",
        "Who forgets early tasks",
        "Final accuracy of the task learned at each position, mean over orders with its interval. A line that climbs "
        "to the "
        "right means that early tasks suffer.",
        "; ".join(
            f"{name}: first {percent(rows[0]['final']['mean'])}, last {percent(rows[-1]['final']['mean'])} percent"
            for name, rows in found.items()
        )
        + ".",
        figure,
        Table(("method", "position", "when learned", "at the end"), rows_of_table, "%, mean over orders."),
    )


def tables(values: Block) -> tuple[Table, ...]:
    """Where the variance comes from, disparity, and how many orders a precision needs."""
    disparity, precision = [], []
    variance = {name: block.get("a_last", {}).get("shares") or {} for name, block in values.get("variance", {}).items()}
    sources = list(dict.fromkeys(source for shares in variance.values() for source in shares))
    for name, block in values.get("disparity", {}).items():
        if block and block.get("average") is not None:
            worst = block["worst_task"] or "–"
            disparity.append((name, percent(block["average"]), percent(block["maximum"]), worst))
    for name, block in values.get("precision", {}).items():
        part = block.get("a_last", {})
        if part.get("orders_needed") is not None:
            now = percent(part.get("half_width_now"))
            precision.append(
                (name, str(part["orders_now"]), f"±{now}", f"±{part['half_width']:g}", str(part["orders_needed"]))
            )
    found = []
    if disparity:
        caption = "Order-normalised disparity: best minus worst order of a task's final accuracy, points."
        found.append(Table(("method", "average", "maximum", "of task"), tuple(disparity), caption))
    if sources:
        caption = "Where the variance of A_last over orders and seeds comes from."
        rows = tuple(
            (name, *("–" if shares.get(source) is None else f"{100 * shares[source]:.0f}%" for source in sources))
            for name, shares in variance.items()
        )
        found.append(Table(("method", *(source.replace("_", " ") for source in sources)), rows, caption))
    if precision:
        caption = "Orders that a precision of mean A_last needs."
        found.append(Table(("method", "orders now", "now", "wanted", "orders needed"), tuple(precision), caption))
    return tuple(found)


def ranking(values: Block) -> str:
    """Friedman's test and Kendall's W in one sentence; empty where they can't be given."""
    block = values.get("ranks", {}).get("a_last", {})
    test = block.get("friedman") or {}
    if block.get("kendall_w") is None or test.get("p") is None:
        return " ".join(f"Ranks: {text}." for text in dict.fromkeys(block.get("reasons", {}).values()))
    ranks = ", ".join(
        f"{name} {rank:.2f}" for name, rank in sorted(block["mean_ranks"].items(), key=lambda item: item[1])
    )
    return (
        f"Mean ranks by A_last over {block['roots']} independent orders: {ranks}. Friedman {_p(test['p'], 'p ')}; "
        "Kendall's "
        f"W {block['kendall_w']:.2f} (1: every order ranks the methods alike, 0: no agreement)."
    )


def _interval(value: Sequence[float] | None) -> str:
    return "–" if not value else f"[{value[0]:+.2f}, {value[1]:+.2f}]"


def _p(value: float | None, before: str = "") -> str:
    if value is None:
        return "–"
    return f"{before}< 0.0001" if value < 1e-4 else f"{before}{'= ' if before else ''}{value:.4f}"
