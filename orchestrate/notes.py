"""What MLflow's pages say about a study, in Markdown: the descriptions of its run and of its experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrate.study import Study
from orchestrate.tracking_uri import ui_url

# What a view shows, its filter, what it is sorted by, and whether it shows charts. Sorting by a metric also keeps
# MLflow from folding the runs under their parents.
SETTINGS, ORDERS = (
    "tags.level = 'trial' AND tags.phase = 'search'",
    "tags.level = 'order' AND tags.phase = 'evaluation'",
)
VIEWS = (
    ("settings tried, best first", SETTINGS, "objective", False),
    ("the best setting", "tags.best = 'true'", "objective", False),
    ("orders that it was judged on, worst first", ORDERS, "a_last", False),
    ("the same orders in charts, a line each", ORDERS, "a_last", True),
    ("what failed", "tags.state = 'failed'", "objective", False),
)


def study_note(study: Study, values: Mapping[str, Any] | None) -> str:
    """The study run's description; before the study's end (``values`` is None) what it is and how to go on."""
    lines = [f"### {_result(study, values)}", ""]
    if values is None:
        return "\n".join([*lines, f"Interrupted? `orchestrate resume {study.name}` goes on."])
    lines += [*_table(values), ""]
    compared = "spread" in values
    lines += [
        "**Artifacts**: `report.html` (everything on one page), `figures/`, the tables as Parquet"
        f"{'' if compared else ', the merged model'}. "
        "**Per-order runs** have the same metrics with the task's position as the step: select them and compare.",
        "",
        "```",
        f"orchestrate show {study.name}",
        f"orchestrate report {study.name}",
        *([] if compared else [f"orchestrate export {study.name} DIR"]),
        "```",
    ]
    return "\n".join(lines)


def experiment_note(study: Study, experiment_id: str, values: Mapping[str, Any] | None) -> str:
    """The experiment's description: the result of its own study in its first line, and views that find things.

    An experiment that ``tracking.experiment`` names may hold several studies; its description names no result.
    """
    own = study.tracking.experiment in (None, study.name)
    lines = [f"### {_result(study, values)}", ""] if own else []
    lines += [*_table(values), ""] if own and values is not None else []
    lines += ["Runs inside runs: a **study** holds **trials** (settings), a trial holds its **orders** of tasks.", ""]
    lines += ["| view | search for |", "|---|---|"]
    for what, search, order_by, charts in VIEWS:
        multi = study.search.objective.multi
        column = f"metrics.`{multi[0] if multi and order_by == 'objective' else order_by}`"
        link = ui_url("", experiment_id, search=search, order_by=column, ascending=order_by == "a_last", charts=charts)
        lines.append(f"| [{what}]({link}) | `{search}` |")
    return "\n".join(lines)


def _result(study: Study, values: Mapping[str, Any] | None) -> str:
    """The one line that MLflow shows of a folded description."""
    if values is None:
        return f"{study.name}: {study.method.name}, running"
    if "spread" in values:
        return f"{study.name}: {len(values['spread'])} variants over {len(values['orders'])} task orders"
    return f"{study.name}: {study.method.name}, A_last {values['a_last']['mean']:.2f} %{_interval(values['a_last'])}"


def _table(values: Mapping[str, Any]) -> list[str]:
    return [*(_variants(values) if "spread" in values else _one_setting(values)), *_cost(values)]


def _variants(values: Mapping[str, Any]) -> list[str]:
    """A robustness study: a row for each variant that is complete."""
    rows = ["| | A_last, mean ± std over orders | worst order | A_avg |", "|---|---|---|---|"]
    for name, block in values["spread"].items():
        last, average = block["a_last"], block["a_avg"]
        spread = "" if last["std"] is None else f" ± {last['std']:.2f}"
        shown = "" if average["mean"] is None else f"{average['mean']:.2f} %"
        rows.append(f"| {name} | **{last['mean']:.2f} %**{spread} | {last['worst']:.2f} % | {shown} |")
    return rows


def _cost(values: Mapping[str, Any]) -> list[str]:
    requested, run, reused = (values[f"stages_{kind}"] for kind in ("requested", "run", "reused"))
    blanks = " |" * (3 if "spread" in values else 1)
    return [
        f"| stages | {requested} asked for, {run} computed, {reused} shared or reused{blanks}",
        f"| time | {values['wall_seconds']:.0f} s, {values['stage_seconds']:.0f} worker-seconds of stages{blanks}",
    ]


def _one_setting(values: Mapping[str, Any]) -> list[str]:
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
    return rows


def _interval(block: Mapping[str, Any]) -> str:
    if not block["interval_95"]:
        return " (no interval: one order, or one tree root)"
    low, high = block["interval_95"]
    return f", 95% interval {low:.2f} to {high:.2f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
