"""How figures look, and how one drawing becomes an SVG file, a PNG file and a part of a page in light and dark.

Matplotlib draws in the colours of the light theme. Inside a page each of them becomes a CSS variable, so the page
decides; text stays text, in the page's font.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 5.0  # inches: 360 units of SVG, so that a phone shows them at about their own size
INK, MUTED, GRID, PAPER = "#1c2431", "#5b6676", "#dbe0e7", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE = "#1f6fb3", "#c2550b", "#2c7d47", "#7a4ea2"
THEME = {
    "ink": (INK, "#e8ebf1"),
    "muted": (MUTED, "#a3adbb"),
    "grid": (GRID, "#343c48"),
    "paper": (PAPER, "#151920"),
    "blue": (BLUE, "#6db3ef"),
    "orange": (ORANGE, "#f3a263"),
    "green": (GREEN, "#76c78c"),
    "purple": (PURPLE, "#c09ee4"),
}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE)
DARK_TEXT, LIGHT_TEXT = "#101010", "#fafafa"  # on coloured cells, which both themes show alike
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "orchestrate",  # equal figures give equal files
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure; texts as they are shown. A folded one shows its caption until it is opened."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure with what a reader needs beside it.

    Attributes:
        name: of its files.
        title: one line above it.
        reading: a sentence that says how to read it.
        alt: what it shows, for those who can't see it; with the main numbers.
        figure: the drawing.
        table: the numbers behind it.
        note: what else has to be known to judge it.
    """

    name: str
    title: str
    reading: str
    alt: str
    figure: Figure
    table: Table | None = None
    note: str = ""


@contextmanager
def themed() -> Iterator[None]:
    """Draw and save figures inside this."""
    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]
        yield


def new_figure(
    height: float, columns: int = 1, rows: int = 1, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows`` x ``columns`` axes; height in inches, ``ratios`` of the columns' widths."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.add_gridspec(rows, columns, width_ratios=ratios)
    return figure, [figure.add_subplot(grid[row, column]) for row in range(rows) for column in range(columns)]


def whole_numbers(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only."""
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))


def shortened(name: str, length: int = 18) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def cell_text(red: float, green: float, blue: float) -> str:
    """Black or white, whichever is easier to read on a colour (W3C's relative luminance)."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    return DARK_TEXT if luminance > 0.179 else LIGHT_TEXT


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG document in the light theme."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Title": title})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG image in the light theme."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(svg: str, name: str, alt: str) -> str:
    """An SVG document as a part of a page: colours become CSS variables, identifiers stay unique on the page."""
    body = svg[svg.index("<svg") :]
    head, _, rest = body.partition(">")
    view = re.search(r'viewBox="([^"]+)"', head)
    assert view is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<!--.*?-->", "", rest, flags=re.DOTALL)
    rest = re.sub(r"<(title|style)\b.*?</\1>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(href="|url\()#', rf"\1#{name}-", rest)
    rest = re.sub(r"font-family: [^;\"]+;? ?", "", rest)
    for variable, (light, _) in THEME.items():
        rest = re.sub(re.escape(light), f"var(--{variable})", rest, flags=re.IGNORECASE)
    width = float(view.group(1).split()[2])
    return (
        f'<svg viewBox="{view.group(1)}" style="--width: {width:.0f}" role="img" '
        f'aria-label="{html.escape(alt, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    )


def theme_css() -> tuple[str, str]:
    """Declarations of the light and of the dark theme's CSS variables."""
    light = " ".join(f"--{name}: {colours[0]};" for name, colours in THEME.items())
    dark = " ".join(f"--{name}: {colours[1]};" for name, colours in THEME.items())
    return light, dark


def percent(value: float | None) -> str:
    """Two decimals, as accuracies are published."""
    return "–" if value is None else f"{value:.2f}"


def list_words(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"
