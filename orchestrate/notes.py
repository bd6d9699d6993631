"""What MLflow's pages say about a study, in Markdown: the descriptions of its run and of its experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrate.study import Study

FILTERS = (
    ("the study and its result", "tags.level = 'study'"),
    ("settings tried", "tags.level = 'trial' AND tags.phase = 'search'"),
    ("the best setting", "tags.best = 'true'"),
    ("orders that it was judged on", "tags.level = 'order' AND tags.phase = 'evaluation'"),
    ("settings that failed", "tags.state = 'failed'"),
)


def study_note(study: Study, values: Mapping[str, Any] | None) -> str:
    """The study run's description; before the study's end (``values`` is None) what it is and how to go on."""
    lines = [f"### {study.name}: {study.method.name}", ""]
    if values is None:
        lines += [
            f"Running: to be judged on evaluation orders of the design {study.orders.design!r}. Interrupted? "
            f"`orchestrate resume {study.name}` goes on.",
        ]
        return "\n".join(lines)
    lines += [*_table(values), ""]
    lines += [
        "**Artifacts**: `report.html` (everything on one page), `figures/`, the tables as Parquet, the merged model. "
        "**Per-order runs** have the same metrics with the task's position as the step: select them and compare.",
        "",
        "```",
        f"orchestrate show {study.name}",
        f"orchestrate report {study.name}",
        f"orchestrate export {study.name} DIR",
        "```",
    ]
    return "\n".join(lines)


def experiment_note(study: Study, values: Mapping[str, Any] | None) -> str:
    """The experiment's description: the result of its own study, and filters that find things.

    An experiment that ``tracking.experiment`` names may hold several studies; its description names no result.
    """
    own = study.tracking.experiment in (None, study.name)
    lines = ["Runs inside runs: a **study** holds **trials** (settings), a trial holds its **orders** of tasks."]
    if own and values is not None:
        lines = [f"### {study.name}: {study.method.name}", "", *_table(values), "", *lines]
    elif own:
        lines = [f"### {study.name}: {study.method.name}", "", "Running.", "", *lines]
    lines += ["", "| to see | search for |", "|---|---|", *(f"| {what} | `{text}` |" for what, text in FILTERS)]
    return "\n".join(lines)


def _table(values: Mapping[str, Any]) -> list[str]:
    last, orders = values["a_last"], len(values["a_last"]["per_order"])
    worst = min(last["per_order"], key=last["per_order"].get)
    rows = [
        f"| | test images, {orders} evaluation order{'s' if orders != 1 else ''} |",
        "|---|---|",
        f"| **A_last** | **{last['mean']:.2f} %**{_interval(last)} |",
        f"| A_avg | {values['a_avg']['mean']:.2f} %{_interval(values['a_avg'])} |",
    ]
    if orders > 1:
        rows.append(f"| worst order | {last['per_order'][worst]:.2f} % ({worst}) |")
    if "best" in values:
        best, states = values["best"], values["trials"]
        setting = ", ".join(f"`{path}` {_short(value)}" for path, value in best["settings"].items())
        scores = ", ".join(f"{name} {value:.2f}" for name, value in best["objectives"].items())
        counted = ", ".join(f"{count} {state}" for state, count in states.items())
        rows.append(f"| best setting | {setting} |")
        rows.append(f"| search | trial-{best['trial']:04d}: {scores} on validation images ({counted}) |")
    requested, run, reused = (values[f"stages_{kind}"] for kind in ("requested", "run", "reused"))
    rows.append(f"| stages | {requested} asked for, {run} computed, {reused} shared or reused |")
    rows.append(f"| time | {values['wall_seconds']:.0f} s, {values['stage_seconds']:.0f} worker-seconds of stages |")
    return rows


def _interval(block: Mapping[str, Any]) -> str:
    if not block["interval_95"]:
        return " (one order: no interval)"
    low, high = block["interval_95"]
    return f", 95% interval {low:.2f} to {high:.2f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
