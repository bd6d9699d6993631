"""Statistics over orders as short tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNKNOWN = "?"


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width of its own
    return console


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _number(value: float | None, sign: str = "") -> str:
    return UNKNOWN if value is None else f"{value:{sign}.2f}"


def _range(ends: Sequence[float] | None) -> str:
    return UNKNOWN if ends is None else f"{ends[0]:.2f}, {ends[1]:.2f}"


def _p(value: float | None) -> str:
    return UNKNOWN if value is None else ("<0.0001" if value < 1e-4 else f"{value:.4f}")


def _spread(title: str, values: Mapping[str, Any], metrics: Sequence[str] = ("a_last", "a_avg", "forgetting")) -> None:
    percent = f"{100 * values['confidence']:g}%"
    columns = ["", "metric", "mean", percent, "std", "IQM", "worst order", f"CVaR {values['alpha']:g}"]
    rows = []
    for name, blocks in values["spread"].items():
        for metric in metrics:
            block = blocks[metric]
            if block["mean"] is None:
                continue
            rows.append(
                [
                    name,
                    metric,
                    *(_number(block["mean"]), _range(block["interval"]), _number(block["std"])),
                    *(_number(block[key]) for key in ("iqm", "worst", "cvar")),
                ]
            )
    if rows:
        _table(title, columns, rows)


def _differences(values: Mapping[str, Any]) -> None:
    percent = f"{100 * values['confidence']:g}%"
    columns = ["", "metric", "mean", f"{percent} BCa", f"{percent} t", "won", "tied", "lost", "p (Holm)"]
    rows = []
    for metric, part in values["paired"].items():
        for name, block in part["differences"].items():
            rows.append(
                [
                    name,
                    metric,
                    *(_number(block["mean"], "+"), _range(block["interval_bca"]), _range(block["interval_t"])),
                    *(str(block[key]) for key in ("won", "tied", "lost")),
                    _p(block["wilcoxon"]["p_holm"]),
                ]
            )
    if rows:
        _table(f"{values['baseline']} minus", columns, rows)


def _by_variant(values: Mapping[str, Any]) -> None:
    """What the order does to tasks, what is due to order and seed, and how many orders it takes."""
    columns = ["", "AOPD", "MOPD", "task", "variance of a_last", f"orders for ±{values['half_width']:g}"]
    rows = []
    for name, spread in values["disparity"].items():
        shares = values["variance"][name]["a_last"].get("shares")
        split = UNKNOWN if not shares else ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        needed = values["precision"][name].get("a_last", {}).get("orders_needed")
        rows.append(
            [
                name,
                *(_number(spread["average"]), _number(spread["maximum"]), str(spread["worst_task"] or UNKNOWN)),
                split.replace("order_and_residual", "order and chance"),
                UNKNOWN if needed is None else str(needed),
            ]
        )
    if rows:
        _table("disparity, variance, precision", columns, rows)


def _ranks(values: Mapping[str, Any]) -> None:
    for metric, block in values["ranks"].items():
        if not block["mean_ranks"] or len(block["mean_ranks"]) < 2:
            continue
        ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in block["mean_ranks"].items())
        test = block["friedman"]
        tested = f"; Kendall's W {block['kendall_w']:.2f}, Friedman p {_p(test['p'])}" if test else ""
        _console().print(f"mean rank by {metric}: {ranks}{tested}")


def _unknown(values: Mapping[str, Any]) -> None:
    """What can't be known and why: every reason once, with the variants that it is about."""
    found: dict[str, dict[str, None]] = {}

    def collect(node: Any, about: str) -> None:
        if isinstance(node, list):
            for inner in node:
                collect(inner, about)
        if not isinstance(node, Mapping):
            return
        for key, inner in node.items():
            if key in ("reasons", "left_out"):
                for name, text in inner.items():
                    found.setdefault(text, {})[name if key == "left_out" else about] = None
            elif key == "notes":
                for text in inner:
                    found.setdefault(text, {})[about] = None
            else:
                collect(inner, key if key in names else about)

    names = set(values["spread"]) | set(values.get("variants", ()))
    for part in ("spread", "disparity", "variance", "paired", "ranks", "precision"):
        collect(values.get(part), "")
    for text, about in found.items():
        who = ", ".join(name for name in about if name)
        _console().print(escape(f"- {who}: {text}" if who else f"- {text}"), style="dim")


def robustness(values: Mapping[str, Any]) -> None:
    """The end of ``orchestrate robustness``."""
    whole = values["completeness"]
    if not whole["complete"]:
        there = f"{whole['present']} of {whole['expected']} orders x variants x seeds are there"
        _console().print(f"[bold red]incomplete[/bold red]: {there}")
    units = values["units"]
    seeds = f"{units['seeds']} training seed{'s' if units['seeds'] > 1 else ''}"
    _spread(f"{values['study']}: {units['orders']} orders, {seeds}, test images, %", values)
    _differences(values)
    _by_variant(values)
    _ranks(values)
    _unknown(values)
    requested, run, reused = values["stages_requested"], values["stages_run"], values["stages_reused"]
    console = _console()
    console.print(f"{requested} stages asked for, {run} computed, {reused} reused; {values['wall_seconds']:.0f} s")
    console.print(f"{values['results']}, and robustness.json beside it")


def compare(values: Mapping[str, Any]) -> None:
    """The end of ``orchestrate compare``."""
    first, second, common = values["first"], values["second"], len(values["orders"])
    _spread(f"{first['study']} and {second['study']}: {common} common orders, test images, %", values)
    _differences(values)
    _unknown(values)
    for side, name in (("only_first", first["study"]), ("only_second", second["study"])):
        if values[side]:
            _console().print(f"{len(values[side])} orders only in {name}, not compared")
    if values["differing_settings"]:
        lines = [f"{key} {a} / {b}" for key, (a, b) in values["differing_settings"].items()]
        _console().print(f"study files differ in: {', '.join(lines)}")
