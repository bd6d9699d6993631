"""From tidy accuracies to one row of scores for each variant, order and training seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from loda.metrics import accuracy_matrix_summary

COLUMNS = (
    "study", "method", "setting", "order_name", "order", "root", "seed", "split", "i", "j", "task", "accuracy",
    "images", "zero_shot", "baseline",
)  # fmt: skip
JOINT = "a joint method learns all tasks at once: there is no accuracy after each task"


@dataclass(frozen=True)
class Metric:
    """A score of one order."""

    title: str
    better: Literal["higher", "lower"]


# Percent or percentage points; signs as in loda.metrics.
METRICS: dict[str, Metric] = {
    "a_last": Metric("A_last", "higher"),
    "a_avg": Metric("A_avg", "higher"),
    "a_last_macro": Metric("A_last, mean over tasks", "higher"),
    "learning_accuracy": Metric("accuracy when new", "higher"),
    "worst_task_accuracy": Metric("worst task", "higher"),
    "bwt": Metric("backward transfer", "higher"),
    "fwt": Metric("forward transfer", "higher"),
    "forgetting": Metric("forgetting", "lower"),
    "intransigence": Metric("intransigence", "lower"),
}


@dataclass(frozen=True)
class Design:
    """What a complete study holds.

    Attributes:
        settings: names of the variants, in their order.
        roots: root of every order, by the order's name; the order's own name where orders don't come from a tree.
        seeds: training seeds.
        tasks: how many tasks an order has.
        own_tasks: every order cuts the classes into tasks of its own, so that tasks of one name differ (class orders).
    """

    settings: tuple[str, ...]
    roots: Mapping[str, str]
    seeds: tuple[int, ...]
    tasks: int
    own_tasks: bool = False

    @property
    def orders(self) -> tuple[str, ...]:
        """Names of all orders."""
        return tuple(self.roots)

    @property
    def tree(self) -> bool:
        """Whether orders share roots, so that they aren't independent of each other."""
        return len(set(self.roots.values())) < len(self.roots)

    @property
    def root_count(self) -> int:
        """How many independent units there are."""
        return len(set(self.roots.values()))


@dataclass(frozen=True)
class Scores:
    """The scores of a study, and what they leave open.

    Attributes:
        table: a row for each complete (setting, order_name, seed), with ``root`` and a column for each metric; NaN
            where a metric isn't defined.
        missing: (order, seed) pairs that a setting lacks, by setting.
        joint: settings of joint methods.
        undefined: why a metric is defined nowhere for a setting, by setting and metric.
    """

    design: Design
    table: pd.DataFrame
    missing: Mapping[str, tuple[tuple[str, int], ...]]
    joint: frozenset[str]
    undefined: Mapping[str, Mapping[str, str]]

    def complete(self, setting: str) -> bool:
        """Whether the setting has every order under every seed."""
        return not self.missing[setting]

    def incomplete_reason(self, setting: str) -> str:
        """How much of a setting is missing, with the orders' names."""
        missing = self.missing[setting]
        expected = len(self.design.orders) * len(self.design.seeds)
        several = len(self.design.seeds) > 1
        names = [f"{order} (seed {seed})" if several else order for order, seed in missing]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"incomplete: {len(missing)} of {expected} orders x seeds are missing ({shown})"

    def by_order(self, setting: str, metric: str) -> pd.Series:
        """A metric by order, mean over seeds, in the design's order of orders; empty where it isn't defined.

        Raises:
            ValueError: the setting is incomplete: there is no mean over the orders that happened to work.
        """
        if not self.complete(setting):
            raise ValueError(f"{setting}: {self.incomplete_reason(setting)}")
        rows = self.table[self.table["setting"] == setting]
        means = rows.groupby("order_name")[metric].mean().reindex(list(self.design.orders)).dropna()
        return means.round(9)  # equal scores of several seeds have equal means

    def by_seed(self, setting: str, metric: str) -> pd.DataFrame:
        """Columns order_name, root, seed, value of one setting."""
        rows = self.table[self.table["setting"] == setting]
        return rows[["order_name", "root", "seed"]].assign(value=rows[metric]).dropna().reset_index(drop=True)


def score_orders(frame: pd.DataFrame, design: Design) -> Scores:
    """Summarise every accuracy matrix of a tidy frame.

    Args:
        frame: columns :data:`COLUMNS`; a row for each setting, order, seed and pair (i, j), accuracy in percent.
        design: what should be there. An order whose matrix has holes counts as missing.
    """
    rows: list[dict[str, Any]] = []
    joint = set()
    known = frame[frame["order_name"].isin(design.orders) & frame["setting"].isin(design.settings)]
    for (setting, order, seed), cells in known.groupby(["setting", "order_name", "seed"], sort=False):
        found, is_joint = _scores_of(cells, design.tasks)
        if is_joint:
            joint.add(str(setting))
        if found is not None:
            rows.append(
                {"setting": setting, "order_name": order, "root": design.roots[order], "seed": int(seed)}
                | {name: math.nan if found[name] is None else found[name] for name in METRICS}
            )
    columns = ["setting", "order_name", "root", "seed", *METRICS]
    table = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(METRICS, float))
    there = set(zip(table["setting"], table["order_name"], table["seed"]))
    missing = {
        setting: tuple((o, s) for o in design.orders for s in design.seeds if (setting, o, s) not in there)
        for setting in design.settings
    }
    table = _with_intransigence(table, known, design, joint)
    return Scores(design, table, missing, frozenset(joint), _undefined(table, design, joint))


def _scores_of(cells: pd.DataFrame, tasks: int) -> tuple[dict[str, float | None] | None, bool]:
    """Scores of one accuracy matrix, None if it has holes, and whether it is a joint method's."""
    nothing = dict.fromkeys(METRICS)
    is_joint = tasks > 1 and int(cells["i"].max()) == 0 and int(cells["j"].max()) > 0
    if is_joint:
        if len(cells) < tasks:
            return None, True
        right = (cells["accuracy"] * cells["images"]).sum() / cells["images"].sum()
        accuracies = cells["accuracy"]
        return nothing | {
            "a_last": float(np.round(right, 2)),
            "a_last_macro": float(accuracies.mean()),
            "worst_task_accuracy": float(accuracies.min()),
        }, True
    if len(cells) < tasks * (tasks + 1) // 2:
        return None, False
    matrix = np.full((tasks, tasks), np.nan)
    matrix[cells["i"], cells["j"]] = cells["accuracy"]
    diagonal = cells[cells["i"] == cells["j"]].sort_values("j")
    transfer: dict[str, Any] = {}
    if tasks > 1 and diagonal[["zero_shot", "baseline"]].iloc[1:].notna().all(axis=None):
        transfer = {"zero_shot_T": diagonal["zero_shot"].to_numpy(), "baseline_T": diagonal["baseline"].to_numpy()}
    summary = accuracy_matrix_summary(matrix, diagonal["images"].to_numpy(), **transfer)
    return nothing | {name: getattr(summary, name) for name in METRICS if hasattr(summary, name)}, False


def _with_intransigence(table: pd.DataFrame, frame: pd.DataFrame, design: Design, joint: Iterable[str]) -> pd.DataFrame:
    """Intransigence at the last task: the joint method's accuracy on it minus that of the one who just learned it.

    Chaudhry et al. 2018 (I_k = a*_k - a_{k,k}) take a reference trained on the first k tasks. Joint training on all
    tasks is that reference for the last one alone, and only there are the classes to choose from the same.
    """
    references = frame[frame["setting"].isin(list(joint))]
    if references.empty or design.tasks < 2:
        return table
    best = references.groupby(["order_name", "seed", "task"])["accuracy"].mean()
    last = frame[(frame["i"] == design.tasks - 1) & (frame["j"] == design.tasks - 1)]
    last = last.set_index(["setting", "order_name", "seed"])
    values = []
    for row in table.itertuples():
        cell = (row.setting, row.order_name, row.seed)
        reference = (row.order_name, row.seed, last["task"].get(cell))
        known = cell in last.index and reference in best.index
        values.append(float(best[reference] - last["accuracy"][cell]) if known else math.nan)
    return table.assign(intransigence=values)


def _undefined(table: pd.DataFrame, design: Design, joint: Iterable[str]) -> dict[str, dict[str, str]]:
    """Why a metric can't be known for a setting."""
    reasons: dict[str, dict[str, str]] = {}
    for setting in design.settings:
        rows = table[table["setting"] == setting]
        reasons[setting] = {}
        for name in METRICS:
            if len(rows) and rows[name].isna().any():
                reasons[setting][name] = _why(name, setting in joint, bool(joint), design.tasks)
    return reasons


def _why(metric: str, is_joint: bool, has_joint: bool, tasks: int) -> str:
    if is_joint:
        return JOINT
    if tasks < 2:
        return "one task: there is nothing to forget or to transfer"
    if metric == "intransigence":
        if has_joint:
            return "the joint variant is incomplete"
        return "no joint variant in the study: intransigence compares with joint training"
    return "accuracies before learning weren't recorded"


def order_rows(
    matrix: np.ndarray, tasks: Sequence[str], counts: Sequence[int], before: Sequence[float] | None,
    frozen: Sequence[float] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tidy cells of one accuracy matrix.

    Args:
        matrix: (R, T) percent, NaN where there is none; a joint method has a single row.
        tasks: (T,) names, in the matrix's order of columns.
        counts: (T,) images.
        before: (T,) percent on each task just before it was learned (zero shot); None: not recorded.
        frozen: (T,) percent on each task of the model before any task.
    """
    rows = []
    for i, j in np.argwhere(np.isfinite(matrix)).tolist():
        probe = before is not None and frozen is not None and i == j > 0
        rows.append(
            {
                "i": i,
                "j": j,
                "task": tasks[j],
                "accuracy": float(matrix[i, j]),
                "images": int(counts[j]),
                "zero_shot": float(before[j]) if probe and before is not None else math.nan,
                "baseline": float(frozen[j]) if probe and frozen is not None else math.nan,
            }
        )
    return rows
