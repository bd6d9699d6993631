"""The numbers of a finished comparison: its rows, paired differences, and tables for people.

python benchmarks/comparison_table.py                            # benchmarks/results/comparison.json
python benchmarks/comparison_table.py other.json --markdown      # as in docs/comparison.md
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results" / "comparison.json"
SUBJECT = "loda"


@dataclass
class Row:
    """What one contender gave: its chosen values, the whole grid's validation scores (%), and its test results.

    Attributes:
        settings_digest: of what the row depends on; a row that has it already isn't computed again.
        memory_bytes: what the method keeps after the last task, at most over orders, beside the merged weights, heads
            and class statistics.
        trainable_parameters: at most over tasks and orders, heads left out.
    """

    name: str
    chosen: dict[str, float]
    grid: list[dict[str, Any]] = field(default_factory=list)
    orders: list[dict[str, Any]] = field(default_factory=list)
    settings_digest: str = ""
    memory_bytes: int = 0
    trainable_parameters: int = 0
    seconds_per_order: float = 0.0

    def values(self, metric: str) -> np.ndarray | None:
        """(orders,) of a metric; None where the method doesn't define it."""
        found = [order[metric] for order in self.orders]
        return None if any(value is None for value in found) else np.asarray(found, dtype=np.float64)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95% t interval; zero where all values are equal."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired(subject: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Subject minus other over the same orders: mean, 95% intervals (None where undefined), and orders won."""
    differences = subject - other
    found: dict[str, Any] = {
        "mean": float(differences.mean()),
        "won": int((differences > 0).sum()),
        "orders": len(differences),
        "t": None,
        "bca": None,
    }
    if len(differences) < 2 or np.ptp(differences) == 0:
        return found
    interval = stats.ttest_rel(subject, other).confidence_interval(0.95)
    found["t"] = [float(interval.low), float(interval.high)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # two or three orders: answered with NaN, below
        drawn = stats.bootstrap(
            (differences,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(0)
        ).confidence_interval
    if np.isfinite([drawn.low, drawn.high]).all():
        found["bca"] = [float(drawn.low), float(drawn.high)]
    return found


def differences(rows: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """LoDA minus every other row, by metric; nothing while LoDA's row is missing."""
    if SUBJECT not in rows:
        return {}
    return {
        name: {
            key: paired(ours, theirs)
            for key in ("a_last", "a_avg")
            if (ours := rows[SUBJECT].values(key)) is not None and (theirs := row.values(key)) is not None
        }
        for name, row in rows.items()
        if name != SUBJECT
    }


def figures(row: Row) -> list[str]:
    """One row's cells: chosen values, metrics, memory, parameters, time."""
    cells = [f"{row.chosen[key]:g}" if key in row.chosen else "-" for key in ("lr", "margin")]
    for metric in ("a_last", "a_avg", "forgetting"):
        values = row.values(metric)
        cells.append("-" if values is None else "{:.2f} ±{:.2f}".format(*mean_interval(values)))
    return [
        *cells,
        f"{row.memory_bytes / 1e3:,.0f}",
        f"{row.trainable_parameters:,}",
        f"{row.seconds_per_order:.1f}",
    ]


def difference_rows(document: dict[str, Any]) -> list[list[str]]:
    """LoDA minus each method: mean, intervals and orders won, a line a metric."""
    lines = []
    for name, metrics in document["differences"].items():
        for metric, found in metrics.items():
            intervals = [
                "-" if found[kind] is None else "[{:.2f}, {:.2f}]".format(*found[kind]) for kind in ("t", "bca")
            ]
            label = {"a_last": "A_last", "a_avg": "A_avg"}[metric]
            lines.append([name, label, f"{found['mean']:+.2f}", *intervals, f"{found['won']}/{found['orders']}"])
    return lines


FIGURES = ["method", "lr", "margin", "A_last", "A_avg", "forgetting", "kept, kB", "trained", "s/order"]
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
AHEAD = ["LoDA minus", "metric", "mean", "95% t", "95% BCa", "orders won"]


def aligned(header: list[str], lines: list[list[str]]) -> list[str]:
    """Columns under one another, the first one to the left."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *lines]
    ]


def piped(header: list[str], lines: list[list[str]]) -> list[str]:
    """The same as a table of Markdown."""
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]


def table(document: dict[str, Any], markdown: bool = False) -> str:
    """Two tables for people: each method's figures, and what LoDA is ahead by."""
    rows = {name: Row(**row) for name, row in document["rows"].items()}
    count = max(len(row.orders) for row in rows.values())
    title = (
        f"{document['study']}: {len(document['tasks'])} tasks, {count} orders, test images, %; "
        "mean ± half of the 95% t interval over orders"
    )
    laid_out = piped if markdown else aligned
    lines = [title, "", *laid_out(FIGURES, [[name, *figures(row)] for name, row in rows.items()])]
    if document["differences"]:
        lines += ["", *laid_out(AHEAD, difference_rows(document))]
    return "\n".join([*lines, "", f"wall {document['wall_seconds']:.0f} s, {document['machine']['threads']} thread(s)"])


def put_into(page: str, made: str) -> str:
    """The page with what is between its marks replaced.

    Raises:
        ValueError: no pair of marks.
    """
    before, middle, after = page.partition(MARKS[0])
    _, mark, after = after.partition(MARKS[1])
    if not (middle and mark):
        raise ValueError(f"no {MARKS[0]} ... {MARKS[1]} on this page")
    return f"{before}{MARKS[0]}\n{made}\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="what comparison.py has written")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="a page of Markdown whose tables are written again")
    args = parser.parse_args()
    document = json.loads(args.file.read_text(encoding="utf-8"))
    if args.into:
        page = args.into.read_text(encoding="utf-8")
        args.into.write_text(put_into(page, table(document, markdown=True)), encoding="utf-8")
    else:
        print(table(document, args.markdown))


if __name__ == "__main__":
    main()
