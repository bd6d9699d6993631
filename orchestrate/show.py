"""Results as short tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

PICTURE_LINES = 80


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def interval(block: Mapping[str, Any]) -> str:
    """A mean with its 95% interval over orders."""
    text = f"{block['mean']:.2f} %"
    if block["interval_95"] is None:
        return f"{text} (no interval: one order, or one tree root)"
    low, high = block["interval_95"]
    return f"{text}, 95% interval {low:.2f} to {high:.2f} over {len(block['per_order'])} orders"


def settings_line(settings: Mapping[str, Any]) -> str:
    """Settings, a pair each."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )


def _common(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    requested, run, reused = values["stages_requested"], values["stages_run"], values["stages_reused"]
    without = values.get("a_last_without_task_id")
    return [
        ("A_last, test", interval(values["a_last"]) + (", told each image's task" if without else "")),
        *([("A_last, task not told", interval(without))] if without else []),
        ("A_avg, test", interval(values["a_avg"])),
        ("stages", f"{requested} asked for, {run} computed, {reused} reused as they were"),
        (
            "steps",
            f"{values['steps_requested']} asked for, {values['steps_run']} computed, {values['steps_reused']} reused",
        ),
        ("time", f"{values['wall_seconds']:.0f} s, of which stages took {values['stage_seconds']:.0f} worker-seconds"),
    ]


def _places(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    version = values.get("model_version")
    registered = f" (registered as {values['study']}-merged, version {version})" if version else ""
    model = f"orchestrate export {values['study']} DIR{registered}"
    if refusal := values.get("export_refusal"):
        model = f"none, and none registered: of {values['method']}, {refusal}"
    return [
        ("results", values["results"]),
        ("report", str(Path(values["results"]).with_name("report.html"))),
        ("merged model", model),
        ("MLflow page", "orchestrate ui"),
    ]


def sweep(values: Mapping[str, Any]) -> None:
    """The end of a sweep."""
    best, sharing = values["best"], values["sharing"]
    states = ", ".join(f"{count} {state}" for state, count in values["trials"].items())
    scores = ", ".join(f"{name} {value:.2f}" for name, value in best["objectives"].items())
    shared = sharing["steps"] - sharing["distinct_steps"]
    rows = [
        ("best setting", settings_line(best["settings"])),
        ("on validation", f"trial {best['trial']}, {scores} ({states})"),
        *_common(values),
        ("shared", f"{shared} of {sharing['steps']} steps of this study stand in for another order's or trial's"),
        *_places(values),
    ]
    _rows(f"{values['study']}: {values['method']}", rows)


def run(values: Mapping[str, Any]) -> None:
    """The end of a run."""
    _rows(f"{values['study']}: {values['method']}", [*_common(values), *_places(values)])


def result(values: Mapping[str, Any]) -> None:
    """Whichever of the documents in a run folder this is."""
    if "best" in values:
        sweep(values)
    elif "completeness" in values:
        from orchestrate.show_robustness import robustness

        robustness(values)
    else:
        run(values)


def plan(values: Mapping[str, Any]) -> None:
    """What would be computed."""
    rows = []
    for part in values["parts"]:
        rows.append(
            (
                part["name"],
                f"{part['orders']} orders x {part['settings']} settings: {part['stages']} stages "
                f"({part['stages_distinct']} distinct), {part['steps']} steps{part['note']}",
            )
        )
    rows += [
        (
            "stages",
            f"{values['stages_requested']} asked for, {values['stages_distinct']} distinct, "
            f"{values['stages_stored']} stored, {values['stages_to_run']} to run at most",
        ),
        (
            "shared",
            f"{values['share_saved_percent']:.0f} % of the stages asked for stand in for another order's"
            if values["sharing"]
            else "nothing: resources.sharing is false",
        ),
        ("distinct steps known now", f"{values['distinct_steps']} ({values['stored_steps']} stored)"),
        ("steps to run, at most", str(values["steps_to_run"])),
        ("expected", values["expected"]),
        *([("expected of orchestrate run", values["expected_run"])] if "expected_run" in values else []),
        ("store", f"{values['store']} ({values['store_bytes'] / 1e6:.1f} MB)"),
    ]
    if compared := values["robustness"]:
        text = (
            f"{compared['orders']} orders x {compared['settings']} variants and seeds: "
            f"{compared['stages_requested']} stages ({compared['stages_distinct']} distinct), "
            f"{compared['stages_stored']} stored, {compared['stages_to_run']} to run; {compared['expected']}"
        )
        rows.append(("orchestrate robustness", text))
    _rows(f"{values['study']}: plan, {values['order_design']} {values['order_kind']} orders", rows)
    for kind, names in values["order_names"].items():
        tree = None if values["tree"] is None else _picture(f"{kind} orders", values["tree"][kind])
        if tree is not None:
            Console(highlight=False).print(tree)
            continue
        _console().print(f"[bold]{kind} orders[/bold]")
        for order, name in zip(values["orders"][kind], names, strict=True):
            tasks = " > ".join(values["tasks"][index] for index in order)
            _console().print("  " + (tasks if values["order_kind"] == "task" else name), markup=False)


def _picture(title: str, stages: Sequence[Mapping[str, Any]]) -> Tree | None:
    """Stages as a tree, a line for each stretch without a branch; None if it would fill more than a screen or two."""
    tree = Tree(f"[bold]{title}[/bold] (○ to run, ● stored)")
    return tree if _grow(tree, stages, PICTURE_LINES) >= 0 else None


def _grow(tree: Tree, stages: Sequence[Mapping[str, Any]], lines: int) -> int:
    """Add branches; returns how many lines are left, negative if they didn't do."""
    for stage in stages:
        names = [stage["task"]]
        while len(stage["children"]) == 1 and stage["children"][0]["stored"] == stage["stored"]:
            if stage["children"][0]["orders"] != stage["orders"]:
                break
            stage = stage["children"][0]
            names.append(stage["task"])
        shared = f"  [dim]({stage['orders']} orders)[/dim]" if stage["orders"] > 1 else ""
        mark = "[green]●[/green]" if stage["stored"] else "○"
        branch = tree.add(f"{mark} {escape(' > '.join(names))}{shared}")
        lines = _grow(branch, stage["children"], lines - 1)
        if lines < 0:
            return lines
    return lines


def catalogue(values: Mapping[str, Any]) -> None:
    """What there is."""
    _rows(
        "at hand",
        [
            ("bundled studies", ", ".join(values["bundled_studies"])),
            ("search spaces", ", ".join(values["search_spaces"])),
            ("methods", ", ".join(values["methods"])),
            ("datasets", ", ".join(values["datasets"])),
        ],
    )
    table = Table(title="runs", title_justify="left", title_style="bold")
    for column in ("study", "method", "state", "A_last", "A_avg"):
        table.add_column(column)
    for row in values["runs"]:
        scores = [f"{row[key]:.2f}" if row[key] is not None else "" for key in ("a_last", "a_avg")]
        table.add_row(row["study"], row["method"], row["state"], *scores)
    _console().print(table if values["runs"] else "no runs yet: `orchestrate sweep` starts the default study")


def methods(values: Sequence[Mapping[str, Any]]) -> None:
    """The registry, for any width of terminal: what is worth knowing of a method, and not of most, is said in words."""
    table = Table(show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does, and its source")
    table.add_column("memory", no_wrap=True)
    for row in values:
        remarks = [
            "reconstructed" if row["reconstructed"] and "reconstructed" not in row["source"] else "",
            "" if row["mergeable"] else "not one merged backbone",
            "needs the task id" if row["needs_task_id"] else "",
        ]
        text = f"{row['summary']}\n[dim]{escape(row['source'])}[/dim]"
        marks = ", ".join(remark for remark in remarks if remark)
        table.add_row(row["name"], f"{text}\n[yellow]{marks}[/yellow]" if marks else text, row["memory_growth"])
    Console(highlight=False).print(table)


def doctor(values: Mapping[str, Any]) -> None:
    """Checks, one a line."""
    table = Table(show_header=False)
    for check in values["checks"]:
        table.add_row("[green]ok[/green]" if check["ok"] else "[red]no[/red]", check["name"], check["found"])
    _console().print(table)
