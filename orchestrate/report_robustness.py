"""The report's section on methods compared over orders, from what ``orchestrate robustness`` wrote."""

from __future__ import annotations

from orchestrate.charts import comparison as charts
from orchestrate.report_data import ReportData
from orchestrate.report_parts import Section


def comparison(data: ReportData) -> Section:
    """Methods with intervals, and their paired differences."""
    title, values = "Methods compared", data.robustness
    command = f"`orchestrate robustness {data.study.name}`"
    if values is None:
        return Section("comparison", title, missing=f"Not computed: {command} compares methods over orders.")
    missing = incomplete(values, command)
    if not values["spread"]:
        return Section("comparison", title, missing=missing or f"No method has all its orders; {command} goes on.")
    found = [charts.spread(values)]
    if values.get("paired", {}).get("a_last", {}).get("differences"):
        found.append(charts.differences(values))  # type: ignore[arg-type]
    found += [charts.positions(values), charts.profiles(values)]  # type: ignore[list-item]
    shown = tuple(chart for chart in found if chart is not None)
    return Section("comparison", title, charts.ranking(values), shown, charts.tables(values), missing)


def incomplete(values: dict, command: str) -> str:  # type: ignore[type-arg]
    """Which methods lack orders and are left out of every number; empty when none does."""
    parts = values["completeness"]
    if parts["complete"]:
        return ""
    left_out = [
        f"{name} has {block['present']} of {block['expected']}"
        for name, block in parts["variants"].items()
        if block["present"] < block["expected"]
    ]
    return (
        f"Unfinished: {parts['present']} of {parts['expected']} runs are there. Methods that lack orders are left out "
        "of "
        f"every number above: {', '.join(left_out)}. {command} goes on."
    )
