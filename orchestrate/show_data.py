"""What ``orchestrate data check`` found, on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SHOWN = 10  # of each kind of problem; --json has all


@contextmanager
def reading() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time left, gone when it is done; takes images read and images in all."""
    columns = (TextColumn("reading images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda count, total: bar.update(task, completed=count, total=total)


def check(values: Mapping[str, Any]) -> None:
    """A table, what is wrong, and the line for a study."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in _rows(values):
        table.add_row(title, escape(text))
    console.print(table)
    for kind in values["wrong"]:
        heading = f"{kind['count']} {kind['what']}:" if kind["items"] else kind["what"]
        console.print(f"[red]wrong:[/red] {escape(heading)}")
        for item in kind["items"][:SHOWN]:
            console.print(f"  {escape(item)}")
        if kind["count"] > SHOWN:
            console.print(f"  and {kind['count'] - SHOWN} more (all of them: --json)")
    if not values["wrong"]:
        console.print("[green]Nothing is wrong.[/green] In a study:")
        console.print(f"stream:\n  dataset: {escape(json.dumps(values['dataset'], ensure_ascii=False))}")


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    images, known = values["images"], values["known"]
    rows = [
        ("layout", values["layout"]),
        ("classes", f"{values['classes']:,}"),
        ("images", f"{images['train']:,} train, {images['test']:,} test"),
        *(
            (f"{key} class", f"{values[key]['class']}: {values[key]['train']:,} train")
            for key in ("smallest", "largest")
        ),
    ]
    if values["widths"]:
        rows += [
            (key, "{:,} to {:,} pixels, median {:,}".format(*_middle_last(values[key])))
            for key in ("widths", "heights")
        ]
    rows.append(("pixel modes", ", ".join(f"{mode} {count:,}" for mode, count in values["modes"].items()) or "none"))
    if known:
        published = f"{known['name']} as published: {known['train']:,} train, {known['test']:,} test"
        differences = ", ".join(f"{images[split] - known[split]:+,} {split}" for split in ("train", "test"))
        rows.append(("known set", f"✓ {published}" if known["same"] else f"✗ {published}; here {differences}"))
    if values["ignored"]:
        ignored = ", ".join(f"{suffix} {count:,}" for suffix, count in values["ignored"].items())
        rows.append(("ignored files", f"no images: {ignored}"))
    return rows


def _middle_last(spread: list[int]) -> tuple[int, int, int]:
    least, median, most = spread
    return least, most, median
