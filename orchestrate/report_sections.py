"""Which sections a report has, in which order, and what each says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrate.charts import accuracy, cost, orders, search
from orchestrate.charts.style import Table, list_words
from orchestrate.order_effects import order_effects
from orchestrate.report_data import OrderAccuracy, ReportData
from orchestrate.report_parts import Section
from orchestrate.report_robustness import comparison, incomplete
from orchestrate.results import mean_interval


@dataclass(frozen=True)
class Headline:
    """The result in one table: label, value, remark; empty while orders are missing."""

    rows: tuple[tuple[str, str, str], ...] = field(default=())
    text: str = ""


def sections(data: ReportData) -> list[Section]:
    """All sections of a study's report that have something to say."""
    found = [
        _accuracy(data),
        _orders(data),
        comparison(data),
        _search(data),
        _ranks(data),
        _time(data),
        _provenance(data),
    ]
    return [one for one in found if one is not None]


def best_trial(data: ReportData) -> int | None:
    """The chosen trial's number; None before there is one."""
    return int(data.summary["best"]["trial"]) if data.summary and "best" in data.summary else None


def status(data: ReportData) -> str:
    """Of a study that isn't whole: how much of it is there. Empty for a whole one."""
    done, wanted = len(data.evaluated), data.wanted
    if data.compared and data.robustness is not None:
        return incomplete(data.robustness, f"`orchestrate robustness {data.study.name}`")
    if data.complete and data.summary:
        return ""
    text = f"This study hasn't ended: {done} of {wanted} evaluation orders are complete"
    if data.search is not None:
        ended = sum(trial.state.is_finished() for trial in data.trials)
        text += f", {ended} of {data.study.search.trials} trials of the search have ended"
    text += ". Nothing is averaged over orders while some are missing." if done < wanted else "."
    return f"{text} {_go_on(data)} goes on."


def spread_row(label: str, values: Sequence[float], roots: Sequence[str]) -> tuple[str, str, str]:
    """A mean with its interval."""
    interval = mean_interval(values, roots)
    remark = f"{'one order' if len(values) == 1 else 'one tree root'}: nothing is known about others"
    if interval is not None and min(values) == max(values):
        remark = f"the same for all {len(values)} orders"
    elif interval is not None:
        remark = f"95% t interval {interval[0]:.2f} to {interval[1]:.2f} over {len(values)} orders"
    return label, f"{np.mean(values):.2f} %", remark


def headline(data: ReportData) -> Headline:
    """The result table; while orders are missing, those that are there, each for itself."""
    if data.compared and data.robustness is not None:
        return _compared(data.robustness)
    if not data.evaluated:
        return Headline()
    if not data.complete:
        rows = [(one.name, f"{one.summary.a_last:.2f} %", f"A_avg {one.summary.a_avg:.2f} %") for one in data.evaluated]
        rows += [
            (name, "–", f"{done} of {len(data.tasks)} stages stored")
            for name, done in data.stages_done.items()
            if name not in {one.name for one in data.evaluated}
        ]
        return Headline(tuple(rows), "A_last of each order that is there:")
    summaries = [one.summary for one in data.evaluated]
    last = [one.a_last for one in summaries]
    grown = data.roots or {}
    roots = [grown.get(one.order, one.name) for one in data.evaluated]
    rows = [spread_row("A_last, test", last, roots)]
    if not data.evaluated[0].joint:
        rows.append(spread_row("A_avg, test", [one.a_avg for one in summaries], roots))
    if min(last) < max(last):
        worst = data.evaluated[int(np.argmin(last))]
        rows.append(("worst order", f"{min(last):.2f} %", f"A_last of {worst.name}"))
        rows.append(("spread over orders", f"{np.std(last, ddof=1):.2f}", "standard deviation of A_last, points"))
    forgetting = [one.forgetting for one in summaries if one.forgetting is not None]
    if len(forgetting) == len(summaries):
        rows.append(
            ("forgetting", f"{np.mean(forgetting):.2f}", "points lost from a task's best accuracy; lower is better")
        )
    text = ""
    if data.summary and "best" in data.summary:
        best = data.summary["best"]
        scores = list_words([f"{name} {value:.2f}" for name, value in best["objectives"].items()])
        trials = sum(data.summary["trials"].values())
        setting = ", ".join(f"{path} {value}" for path, value in search.setting_rows(best["settings"]))
        tuned = len(data.plan["tune"])
        text = (
            f"Of {trials} trials, number {best['trial']} was chosen on validation images and {tuned} tuning "
            f"order{'' if tuned == 1 else 's'} ({scores}): {setting}. It was judged once on test images and "
            f"{data.wanted} "
            "orders that the search never used."
        )
    return Headline(tuple(rows), text)


def _compared(values: dict[str, Any]) -> Headline:
    """A_last of each method compared."""
    rows = []
    for name, block in values["spread"].items():
        last = block["a_last"]
        low, high = last.get("interval") or (None, None)
        remark = f"{100 * values['confidence']:.0f}% interval {low:.2f} to {high:.2f}, " if low is not None else ""
        remark += f"worst order {last['worst']:.2f} %"
        if last["orders"] > 1 and last["worst"] == last["best"]:
            remark = f"the same for all {last['orders']} orders"
        rows.append((name, f"{last['mean']:.2f} %", remark))
    return Headline(tuple(rows), f"A_last on test images over {values['units']['note']}.")


def _accuracy(data: ReportData) -> Section:
    found = data.evaluated
    if not found:
        return Section("accuracy", "Accuracy", missing=f"No evaluation order is complete; {_go_on(data)} goes on.")
    if found[0].joint:
        return Section("accuracy", "Accuracy", "", (accuracy.order_matrix(found[0], data.tasks, "only"),))
    charts = [accuracy.curves(found, data.complete)]
    ranked = sorted(found, key=lambda one: one.summary.a_last)
    if data.complete and len(found) > 1:
        charts.append(accuracy.mean_matrix(found))
    if data.complete and ranked[0].summary.a_last < ranked[-1].summary.a_last:
        charts.append(accuracy.order_matrix(ranked[0], data.tasks, "worst"))
        charts.append(accuracy.order_matrix(ranked[-1], data.tasks, "best"))
    else:
        charts += [accuracy.order_matrix(found[0], data.tasks, "only" if len(found) == 1 else "first")]
    text = ""
    if data.compared and data.robustness is not None:
        text = f"Of {data.robustness['baseline']}, training seed {data.robustness['seeds'][0]}."
    return Section("accuracy", "Accuracy by task and order", text, tuple(charts))


def _orders(data: ReportData) -> Section | None:
    found: list[OrderAccuracy] = data.evaluated
    if not found or found[0].joint or len(data.tasks) < 2:
        return None
    title = "Effects of the order"
    if data.class_orders:
        why = "Every class order has tasks of its own, so tasks can't be followed from one order to another."
        return Section("orders", title, missing=why)
    if not data.complete or len(found) < 2:
        why = "One order can't show what the order does; set orders.evaluate higher."
        if not data.complete:
            why = f"Needs all evaluation orders: {_go_on(data)} goes on."
        return Section("orders", title, missing=why)
    charts = [orders.order_map(found, data.tasks), accuracy.disparity(found, data.tasks)]
    missing = ""
    try:
        learned = order_effects({one.order: one.matrix.diagonal().tolist() for one in found}, data.roots)
        final = order_effects({one.order: one.matrix[-1].tolist() for one in found}, data.roots)
        charts.insert(1, orders.effects(learned, final, data.tasks))
    except ValueError as error:
        missing = f"Position and predecessor: {error}."
    return Section("orders", title, orders.extremes(found, data.tasks), tuple(charts), missing=missing)


def _search(data: ReportData) -> Section | None:
    if data.search is None:
        return None
    if not search.finished(data.search):
        return Section("search", "Search", missing=f"No trial has finished; {_go_on(data)} goes on.")
    best = best_trial(data)
    charts = [search.history(data.search, best), search.importance(data.search), search.parallel(data.search, best)]
    charts.append(search.pareto(data.search, best))
    missing = ""
    if charts[1] is None:
        missing = (
            f"Parameter importance needs {search.IMPORTANCE_FROM} finished trials that differ: raise search.trials."
        )
    return Section("search", "Search", "", tuple(chart for chart in charts if chart is not None), missing=missing)


def _ranks(data: ReportData) -> Section | None:
    chart, sentence = cost.ranks(data.facts)
    if chart is None and not sentence:
        return None
    return Section("ranks", "Rank per layer", sentence, (chart,) if chart is not None else ())


def _time(data: ReportData) -> Section | None:
    if len(data.timings) == 0 or not np.isfinite(data.timings["seconds"]).any():
        return None
    return Section("time", "Time and cost", charts=(cost.time(data.timings, data.summary, data.study),))


def _provenance(data: ReportData) -> Section:
    study, made = data.study, data.provenance
    settings: dict[str, Any] = data.summary.get("best", {}).get("settings", {}) if data.summary else {}
    digests = [("study", study.digest)]
    digests += [
        (key.replace("_", " "), str(made[key]))
        for key in ("data_digest", "backbone_digest", "git_commit")
        if made.get(key)
    ]
    seeds = [
        ("stream.partition_seed", str(study.stream.partition_seed)),
        ("orders.seed", str(study.orders.seed)),
        ("training.seed", str(study.training.seed)),
    ] + ([("search.seed", str(study.search.seed))] if data.search is not None else [])
    tables = [Table(("digest", "SHA-256"), tuple(digests), "Equal digests mean equal bits.")]
    tables.append(Table(("seed", "value"), tuple(seeds), "Seeds."))
    if settings:
        tables.insert(0, Table(("setting", "value"), tuple(search.setting_rows(settings)), "The chosen setting."))
    versions = made.get("software", {})
    if versions:
        rows = tuple((name, str(version)) for name, version in versions.items())
        tables.append(Table(("software", "version"), rows, "Versions when the study was last started."))
    if data.summary:
        states = tuple(data.summary["state_digests"].items())
        tables.append(
            Table(("order", "SHA-256"), states, "Digests of the model after each evaluation order", folded=True)
        )
    missing = "" if versions else f"Versions weren't recorded; {_go_on(data)} records them."
    return Section("provenance", "Versions, seeds and digests", tables=tuple(tables), missing=missing)


def _go_on(data: ReportData) -> str:
    return f"`orchestrate resume {data.study.name}`"
