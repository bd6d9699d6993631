"""``orchestrate report``: one HTML file about a study, with its figures beside it. No script, no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from loda.errors import ConfigError
from orchestrate.charts.style import Chart, inline_svg, theme_css, themed, to_png, to_svg
from orchestrate.report_data import ReportData, read_report_data
from orchestrate.report_sections import Section, headline, sections, status
from orchestrate.session import write_atomic


@dataclass(frozen=True)
class Drawn:
    """A chart as it goes into the page and beside it."""

    chart: Chart
    inline: str
    svg: str
    png: bytes


def make_report(folder: Path, output: Path | None = None, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write ``report.html`` and ``figures/`` of a study, finished or not.

    Args:
        folder: ``runs/<study>/``.
        output: where the page goes; None: into the run folder. Figures always go there.
        summary: what ``summary.json`` will say, of a study that ends this moment; None: the file is read.

    Returns:
        What was written, for ``--json``.

    Raises:
        ConfigError: no such study, a file that can't be read, or ``output`` can't be written.
    """
    data = read_report_data(folder, summary)
    page = output if output is not None else folder / "report.html"
    with themed():
        parts = sections(data)
        drawn = {chart.name: _draw(chart) for part in parts for chart in part.charts}
    text = render(data, parts, drawn)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, text)
        figures = _write_figures(folder / "figures", list(drawn.values()))
    except OSError as error:
        raise ConfigError(f"--output: can't write {error.filename or page}: {error.strerror}") from error
    return {
        "study": data.study.name,
        "report": str(page),
        "bytes": len(text.encode()),
        "figures": [str(path) for path in figures],
        "complete": data.complete,
        "orders": {"complete": len(data.evaluated), "planned": len(data.planned)},
    }


def _draw(chart: Chart) -> Drawn:
    svg = to_svg(chart.figure, chart.title)
    chart.figure.set_layout_engine("none")  # laid out; the second drawing needn't do it again
    return Drawn(chart, inline_svg(svg, chart.name, chart.alt), svg, to_png(chart.figure))


def _write_figures(folder: Path, drawn: Sequence[Drawn]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    names = {f"{one.chart.name}{suffix}" for one in drawn for suffix in (".svg", ".png")}
    for old in folder.iterdir():
        if old.suffix in (".svg", ".png") and old.name not in names:
            old.unlink()  # of a section that is no longer there
    for one in drawn:
        write_atomic(folder / f"{one.chart.name}.svg", one.svg)
        write_atomic(folder / f"{one.chart.name}.png", one.png)
    return sorted(folder / name for name in names)


def render(data: ReportData, parts: Sequence[Section], drawn: dict[str, Drawn]) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light, dark = theme_css()
    return environment.get_template("report.html.j2").render(
        data=data,
        study=data.study,
        headline=headline(data),
        status=status(data),
        sections=parts,
        figures={name: jinja2.utils.markupsafe.Markup(one.inline) for name, one in drawn.items()},
        light=jinja2.utils.markupsafe.Markup(light),
        dark=jinja2.utils.markupsafe.Markup(dark),
        yaml=data.study.to_yaml(),
    )


def _template(name: str) -> str:
    return (resources.files("orchestrate") / "templates" / html.escape(name)).read_text(encoding="utf-8")
