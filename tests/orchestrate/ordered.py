"""Made-up tidy accuracies for tests of the statistics over orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from orchestrate.robustness.tidy import Design, order_rows

Matrix = Sequence[Sequence[float]]


def order_name(order: Sequence[int]) -> str:
    return f"evaluate-{'-'.join(map(str, order))}"


def tidy(
    settings: Mapping[str, Mapping[tuple[tuple[int, ...], int], Matrix]],
    *,
    joint: Sequence[str] = (),
    before: Sequence[float] | None = None,
    frozen: Sequence[float] | None = None,
    images: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Rows as a study writes them, from accuracy matrices by setting and by (order, seed)."""
    rows: list[dict[str, Any]] = []
    for setting, matrices in settings.items():
        for (order, seed), lists in matrices.items():
            tasks = range(len(order)) if setting in joint else order
            counts = [10] * len(order) if images is None else [images[task] for task in tasks]
            matrix = np.full((len(lists), len(order)), np.nan)
            for i, row in enumerate(lists):
                matrix[i, : len(row)] = row
            common = {
                "study": "made-up",
                "method": setting,
                "setting": setting,
                "order_name": order_name(order),
                "order": list(order),
                "root": order_name(order),
                "seed": seed,
                "split": "test",
            }
            rows += [common | cell for cell in order_rows(matrix, [f"t{k}" for k in tasks], counts, before, frozen)]
    return pd.DataFrame(rows)


def design(frame: pd.DataFrame, roots: Mapping[str, str] | None = None) -> Design:
    """What a frame would hold if nothing were missing."""
    orders = list(dict.fromkeys(frame["order_name"]))
    return Design(
        settings=tuple(dict.fromkeys(frame["setting"])),
        roots=roots or {name: name for name in orders},
        seeds=tuple(sorted(set(frame["seed"]))),
        tasks=len(frame["order"].iloc[0]),
    )
