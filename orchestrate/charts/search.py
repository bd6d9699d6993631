"""The search: its history, what mattered, and which settings were tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.colors import Normalize
from optuna.trial import FrozenTrial, TrialState

from orchestrate.charts.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    Chart,
    Table,
    new_figure,
    shortened,
    whole_numbers,
)  # fmt: skip

IMPORTANCE_FROM = 6  # complete trials: with fewer, a forest has next to nothing to split


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ended with all their values, by number."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def labels(study: optuna.Study) -> list[str]:
    """Names of the objectives."""
    return list(study.metric_names or ["objective"] * len(study.directions))


def _maximised(study: optuna.Study, index: int = 0) -> bool:
    return study.directions[index].name == "MAXIMIZE"


def settings_of(trial: FrozenTrial) -> dict[str, Any]:
    """The setting tried, by key path."""
    return dict(trial.user_attrs.get("settings", trial.params))


def history(study: optuna.Study, best: int | None) -> Chart:
    """The first objective of each trial, and the best so far."""
    done = finished(study)
    numbers = [trial.number for trial in done]
    values = np.array([trial.values[0] for trial in done])
    so_far = np.maximum.accumulate(values) if _maximised(study) else np.minimum.accumulate(values)
    figure, (axes,) = new_figure(2.7)
    axes.step(numbers, so_far, where="post", color=MUTED, linewidth=1.4, label="best so far")
    axes.plot(numbers, values, "o", color=BLUE, markersize=5.5, label="finished trial")
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    partial = [(trial.number, trial.values[0]) for trial in pruned if trial.values]
    if partial:
        axes.plot(*zip(*partial, strict=True), "x", color=MUTED, markersize=5, label="stopped early")
    chosen = [(number, value) for number, value in zip(numbers, values, strict=True) if number == best]
    if chosen:
        axes.plot(*zip(*chosen, strict=True), "D", color=ORANGE, markersize=7.5, label="chosen")
    axes.set_xlabel("trial")
    axes.set_ylabel(labels(study)[0])
    axes.margins(y=0.12)
    whole_numbers(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.17), ncols=4, columnspacing=1.1, handletextpad=0.3, borderpad=0)
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    return Chart(
        "search-history",
        "Search history",
        "A dot is a setting, scored on validation images over the tuning orders; the line is the best up to there. A "
        "search "
        "that still climbs at its end wants more trials.",
        f"{len(done)} finished trials of {len(states)}; {labels(study)[0]} from {values.min():.2f} to "
        f"{values.max():.2f}.",
        figure,
        _trial_table(study, best),
        f"Trials: {counted}. A setting is chosen for a high score, so its score flatters it: the results above come "
        "from "
        "other orders and from test images.",
    )


def _trial_table(study: optuna.Study, best: int | None, most: int = 25) -> Table:
    done = sorted(finished(study), key=lambda t: t.values[0], reverse=_maximised(study))[:most]
    paths = list(dict.fromkeys(path for trial in done for path in settings_of(trial)))
    rows = tuple(
        (
            f"{trial.number}{' (chosen)' if trial.number == best else ''}",
            *(f"{value:.2f}" for value in trial.values),
            *(_short(settings_of(trial).get(path)) for path in paths),
        )
        for trial in done
    )
    header = ("trial", *labels(study), *(path.rpartition(".")[2] for path in paths))
    return Table(header, rows, f"The best {len(rows)} settings." if len(rows) == most else "All settings, best first.")


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def importance(study: optuna.Study, target: int = 0) -> Chart | None:
    """Share of the objective's variance that each parameter explains (fANOVA); None with too few trials to say."""
    done = finished(study)
    values = [trial.values[target] for trial in done]
    if len(done) < IMPORTANCE_FROM or len(set(values)) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=64, seed=0)
    objective = (lambda trial: trial.values[target]) if len(study.directions) > 1 else None
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=objective)
    except (ValueError, RuntimeError):  # no parameter is common to all trials, or none varies
        return None
    if not found:
        return None
    ranked = sorted(found.items(), key=lambda item: item[1])
    figure, (axes,) = new_figure(0.85 + 0.33 * len(ranked))
    axes.barh(
        [shortened(_leaf(name), 22) for name, _ in ranked], [100 * share for _, share in ranked], 0.62, color=BLUE
    )
    axes.set_xlabel(f"share of variance of {labels(study)[target]} (%)")
    axes.grid(axis="y", visible=False)
    top = ranked[-1]
    return Chart(
        "parameter-importance",
        "What mattered in the search",
        "The longer a bar, the more of the difference between settings is explained by this parameter.",
        f"Most important: {top[0]} with {100 * top[1]:.0f} percent.",
        figure,
        Table(("parameter", "share"), tuple((name, f"{100 * share:.1f}%") for name, share in reversed(ranked))),
        f"fANOVA (Hutter et al. 2014, Optuna's) over {len(done)} trials"
        + ("; so few trials give a hint, no more." if len(done) < 20 else ".")
        + " Parameters that not every trial had are left out.",
    )


def parallel(study: optuna.Study, best: int | None) -> Chart | None:
    """Every setting as a line through its parameters; None with fewer than two trials or no parameter that varies."""
    done = finished(study)
    settings = [settings_of(trial) for trial in done]
    paths = [
        path
        for path in dict.fromkeys(path for one in settings for path in one)
        if len({str(one.get(path)) for one in settings}) > 1
    ]
    if len(done) < 2 or not paths:
        return None
    columns = [_Scale([one.get(path) for one in settings]) for path in paths]
    values = np.array([trial.values[0] for trial in done])
    score = _Scale(values.tolist())
    norm = Normalize(values.min(), values.max() if np.ptp(values) > 0 else values.min() + 1)
    colours = matplotlib.colormaps["viridis" if _maximised(study) else "viridis_r"]
    figure, (axes,) = new_figure(3.3)
    axes.grid(False)
    x = np.arange(len(paths) + 1)
    ranking = np.argsort(values if _maximised(study) else -values)
    for index in ranking:
        heights = [scale.heights[index] for scale in columns] + [score.heights[index]]
        chosen = done[index].number == best
        colour = ORANGE if chosen else colours(norm(values[index]))
        axes.plot(x, heights, color=colour, linewidth=2.6 if chosen else 1.3, alpha=1 if chosen else 0.75)
    for place, scale in zip(x.tolist(), [*columns, score], strict=True):
        axes.axvline(place, color=MUTED, linewidth=0.8)
        last = place == x[-1]
        for height, text in scale.ticks:
            axes.annotate(
                text, (place, height), xytext=(4 if not last else -4, 0), textcoords="offset points",
                fontsize=8, va="center", ha="right" if last else "left", color=INK,
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
            )  # fmt: skip
    names = [shortened(_leaf(path), 15) for path in paths] + [shortened(labels(study)[0], 20)]
    axes.set_xticks(x, names, rotation=24, ha="right", rotation_mode="anchor")
    axes.set_yticks([])
    axes.margins(x=0.04, y=0.06)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return Chart(
        "parallel-coordinates",
        "Settings tried",
        "A line is a setting; it crosses each axis at its value and ends at its score on the right. Light lines scored "
        "well, the thick orange one was chosen. Axes on which light lines gather are settled.",
        f"{len(done)} settings over {len(paths)} parameters: {', '.join(_leaf(path) for path in paths)}.",
        figure,
    )


class _Scale:
    """Where values lie on an axis from 0 to 1: numbers by size (by their logarithm over two decades), others in "
    "steps."""

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
        if len(numbers) == len(values) and len(set(numbers)) > 1:
            log = min(numbers) > 0 and max(numbers) / min(numbers) > 20
            scaled = np.log(numbers) if log else np.array(numbers, dtype=float)
            self.heights = ((scaled - scaled.min()) / np.ptp(scaled)).tolist()
            self.ticks = [(0.0, f"{min(numbers):.3g}"), (1.0, f"{max(numbers):.3g}")]
            return
        levels = sorted({str(value) for value in values})
        place = {level: k / max(1, len(levels) - 1) if len(levels) > 1 else 0.5 for k, level in enumerate(levels)}
        self.heights = [place[str(value)] for value in values]
        self.ticks = [(height, shortened(level.replace("None", "–"), 10)) for level, height in place.items()]


def pareto(study: optuna.Study, best: int | None) -> Chart | None:
    """The Pareto front of the first two objectives; None where there is only one."""
    if len(study.directions) < 2:
        return None
    done, names = finished(study), labels(study)
    front = sorted(study.best_trials, key=lambda trial: trial.values[0])
    on_front = {trial.number for trial in front}
    figure, (axes,) = new_figure(3.2)
    rest = [trial.values[:2] for trial in done if trial.number not in on_front]
    if rest:
        axes.plot(*zip(*rest, strict=True), "o", color=MUTED, alpha=0.6, markersize=5, label="beaten on every count")
    axes.plot(*zip(*[t.values[:2] for t in front], strict=True), "o-", color=BLUE, linewidth=1, label="Pareto front")
    chosen = [trial.values[:2] for trial in done if trial.number == best]
    if chosen:
        axes.plot(*zip(*chosen, strict=True), "D", color=ORANGE, markersize=8, label="chosen")
    axes.set_xlabel(f"{names[0]} ({'higher' if _maximised(study) else 'lower'} is better)")
    axes.set_ylabel(f"{names[1]} ({'higher' if _maximised(study, 1) else 'lower'} is better)")
    axes.legend(loc="best")
    rows = tuple((str(trial.number), *(f"{value:.2f}" for value in trial.values)) for trial in reversed(front))
    return Chart(
        "pareto-front",
        "Pareto front",
        f"Settings of which no other is better in all of {len(names)} objectives; the chosen one has the best "
        f"{names[0]}.",
        f"{len(front)} of {len(done)} settings are on the front of {' and '.join(names[:2])}.",
        figure,
        Table(("trial", *names), rows, "The front."),
    )


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A setting, for a table."""
    return [(path, _short(value)) for path, value in settings.items()]
