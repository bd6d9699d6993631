"""Pictures for MLflow and reports, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_CELL_INCHES = 0.62
_MAX_INCHES = 14.0
_NUMBERS_UP_TO = 20  # tasks: beyond that, numbers in the cells would be too small to read


def accuracy_heatmap(matrix: np.ndarray, task_names: Sequence[str], title: str = "Accuracy by task (%)") -> bytes:
    """The accuracy matrix as a PNG image.

    Args:
        matrix: (R, T) percent, row: after the i-th task, column: on the j-th; NaN where there is none. A joint method
            has a single row.
        task_names: (T,) in the order learned.
        title: above the picture.

    Returns:
        PNG bytes.

    Raises:
        ValueError: not one name for each column.
    """
    rows, columns = matrix.shape
    if len(task_names) != columns:
        raise ValueError(f"task_names: expected one for each of {columns} columns, but got {len(task_names)}")
    names = [_shortened(name) for name in task_names]
    side = _MAX_INCHES - 2.8
    figure = Figure(
        figsize=(2.8 + min(side, _CELL_INCHES * max(columns, 4)), 2.2 + min(side, _CELL_INCHES * rows)),
        dpi=110,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(matrix), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("accuracy on task")
    axes.set_ylabel("after learning")
    axes.set_xticks(range(columns), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    after = [f"{index + 1}. {name}" for index, name in enumerate(names)] if rows == columns else ["all tasks"] * rows
    axes.set_yticks(range(rows), after, fontsize=8)
    if columns <= _NUMBERS_UP_TO:
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=_ink(value))
    figure.colorbar(image, ax=axes, label="%", shrink=0.9)
    buffer = io.BytesIO()
    # No date and no version inside: equal matrices give equal bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _ink(percent: float) -> str:
    """Viridis is dark at its low end."""
    return "white" if percent < 60 else "black"


def _shortened(name: str, length: int = 26) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
