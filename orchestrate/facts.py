"""What a method reports of its layers (ranks, energies ...), as a tidy table."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import pandas as pd

from orchestrate.results import OrderResult
from orchestrate.session import Session, write_atomic

COLUMNS = ("trial", "order_name", "position", "task", "layer", "kind", "value")


def fact_rows(session: Session, results: Iterable[OrderResult]) -> pd.DataFrame:
    """A row for each order, stage, layer and kind of fact (``rank_general`` ...); stages without facts have none."""
    rows = []
    for one in results:
        for node in one.nodes:
            if node.step not in ("adapt", "consolidate"):
                continue
            facts = (session.store.meta(node.key) or {}).get("facts", {})
            task = session.task_names[node.prefix[-1]] if node.position == len(node.prefix) - 1 else "all tasks"
            for kind, by_layer in facts.items():
                if not isinstance(by_layer, Mapping):
                    continue
                rows += [
                    (one.trial, one.work.name, node.position, task, layer, kind, float(value))
                    for layer, value in by_layer.items()
                    if isinstance(value, int | float)
                ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def write_facts(session: Session, results: Iterable[OrderResult]) -> None:
    """``facts.parquet`` in the run folder: of the evaluation orders, to read ranks without the stage store."""
    buffer = io.BytesIO()
    fact_rows(session, results).to_parquet(buffer, index=False)
    write_atomic(session.folder / "facts.parquet", buffer.getvalue())
