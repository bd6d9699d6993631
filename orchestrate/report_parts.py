"""What the sections of a report are."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrate.charts.style import Chart, Table


@dataclass(frozen=True)
class Section:
    """A heading with figures and tables under it.

    Attributes:
        name: anchor on the page.
        missing: in place of what can't be shown: one line that says what would produce it.
    """

    name: str
    title: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    missing: str = ""
