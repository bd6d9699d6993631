"""Ranks of the layers, and where the time went."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from orchestrate.charts.style import CYCLE, Chart, Table, cell_text, new_figure, shortened
from orchestrate.study import Study

STEPS = ("observe", "adapt", "consolidate", "evaluate")


def ranks(facts: pd.DataFrame) -> tuple[Chart | None, str]:
    """Rank of each layer by position, mean over orders; where ranks are fixed, the energy that they hold instead.

    Returns:
        The figure, None without any such facts, and a sentence on ranks that are the same everywhere.
    """
    if len(facts) == 0:
        return None, ""
    found = [kind for kind in facts["kind"].unique() if kind.startswith("rank")]
    fixed = {kind: facts.loc[facts["kind"] == kind, "value"].iloc[0] for kind in found
             if facts.loc[facts["kind"] == kind, "value"].nunique() == 1}  # fmt: skip
    varying = [kind for kind in found if kind not in fixed]
    words = "; ".join(f"{_words(kind)}: {value:g} in every layer of every stage" for kind, value in fixed.items())
    sentence = f"{words[:1].upper()}{words[1:]}." if words else ""
    if varying:
        return _layers(facts, varying[:2], "rank-per-layer", "Rank per layer"), sentence
    energies = [kind for kind in facts["kind"].unique() if kind.startswith("energy")]
    if not energies:
        return None, sentence
    return _layers(facts, energies[:2], "energy-per-layer", "Energy that the rank holds, per layer"), sentence


def _words(kind: str) -> str:
    what, _, which = kind.partition("_")
    return f"{which} {what}" if which else what


def _layers(facts: pd.DataFrame, kinds: list[str], name: str, title: str) -> Chart:
    share = name.startswith("energy")
    layers = list(dict.fromkeys(facts.loc[facts["kind"].isin(kinds), "layer"]))
    figure, panels = new_figure(1.05 + min(7.0, 0.205 * len(layers)), columns=len(kinds))
    rows: list[tuple[str, ...]] = []
    means = {}
    for axes, kind in zip(panels, kinds, strict=True):
        part = facts[facts["kind"] == kind]
        table = part.pivot_table(index="layer", columns="position", values="value", aggfunc="mean").reindex(layers)
        values = table.to_numpy() * (100 if share else 1)
        means[kind] = float(part["value"].mean()) * (100 if share else 1)
        top = 100.0 if share else float(np.nanmax(values))
        colours = matplotlib.colormaps["viridis"]
        axes.grid(False)
        axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=top)
        axes.invert_yaxis()
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value) and values.shape[1] <= 6 and len(layers) <= 34:
                colour = cell_text(*colours(value / top if top else 0.0)[:3])
                axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_title(f"{_words(kind)}{' (%)' if share else ''}")
        positions = range(0, values.shape[1], 1 if values.shape[1] <= 10 else 5)
        axes.set_xticks([p + 0.5 for p in positions], [str(int(table.columns[p]) + 1) for p in positions])
        axes.set_xlabel("position")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    step = max(1, len(layers) // 34)
    ticks = [index + 0.5 for index in range(0, len(layers), step)]
    names = [shortened(layer.removeprefix("blocks."), 14) for layer in layers[::step]]
    panels[0].set_yticks(ticks, names, fontsize=8)
    for axes in panels[1:]:
        axes.set_yticks([])
    for layer in layers:
        cells = [facts.loc[(facts["kind"] == kind) & (facts["layer"] == layer), "value"] for kind in kinds]
        rows.append((layer, *(f"{100 * cell.mean():.1f}%" if share else f"{cell.mean():.2f}" for cell in cells)))
    reading = (
        "A row is a layer, a column the position of the task: the rank that the method chose, mean over evaluation "
        "orders."
        if not share
        else "A row is a layer, a column the position of the task: how much of the layer's energy (sum of the relevant "
        "eigenvalues) the fixed rank holds, mean over evaluation orders. Low values ask for a higher rank there."
    )
    unit = " percent" if share else ""
    return Chart(
        name,
        title,
        reading,
        "; ".join(f"mean {_words(kind)} {value:.1f}{unit}" for kind, value in means.items())
        + f"; {len(layers)} layers.",
        figure,
        Table(("layer", *(_words(kind) for kind in kinds)), tuple(rows), "Mean over orders and positions."),
    )


def time(timings: pd.DataFrame, summary: dict[str, Any] | None, study: Study) -> Chart:
    """Computing time of the distinct steps, by phase."""
    phase = np.where(timings["trial"] == "chosen", "evaluation", "search")
    totals = timings.assign(phase=phase).pivot_table(
        index="phase", columns="step", values="seconds", aggfunc="sum", fill_value=0.0
    )
    phases = [name for name in ("search", "evaluation") if name in totals.index]
    figure, (axes,) = new_figure(1.25 + 0.42 * len(phases))
    left = np.zeros(len(phases))
    for step, colour in zip(STEPS, CYCLE, strict=True):
        if step in totals:
            seconds = totals.loc[phases, step].to_numpy()
            axes.barh(phases, seconds, 0.6, left=left, color=colour, label=step)
            left += seconds
    axes.invert_yaxis()
    axes.set_xlabel("worker-seconds")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.1)
    counts = timings.assign(phase=phase).groupby("phase")["key"].nunique()
    rows = tuple(
        (
            name,
            *(f"{totals.loc[name].get(step, 0.0):.1f}" for step in STEPS),
            f"{totals.loc[name].sum():.1f}",
            str(counts[name]),
        )
        for name in phases
    )
    total = float(timings["seconds"].sum())
    note = "Each distinct step counts once, with the time of its computation, also where it was found in the store."
    if summary:
        wall, lanes = summary["wall_seconds"], study.resources.concurrent_trials * study.resources.workers
        sharing = summary.get("sharing")
        note += f" The last command took {wall:.0f} s at up to {lanes} worker{'s' if lanes > 1 else ''} at once"
        note += (
            f" and computed {summary['stage_seconds']:.0f} worker-seconds of stages."
            if "stage_seconds" in summary
            else "."
        )
        if sharing and sharing["steps"]:
            saved = sharing["steps"] - sharing["distinct_steps"]
            note += f" Sharing between orders and settings saved {saved} of {sharing['steps']} steps."
    return Chart(
        "time",
        "Where the time went",
        "Bars add up the computing time of the four steps of a stage; training is adapt.",
        f"{total:.0f} worker-seconds in all: "
        + ", ".join(f"{name} {totals.loc[name].sum():.0f}" for name in phases)
        + ".",
        figure,
        Table(("phase", *STEPS, "sum (s)", "distinct steps"), rows),
        note,
    )
