"""How alike the tasks of a stream are to its frozen backbone, from training images alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loda.classifier import ClassStatistics
from loda.distributed import WorkerGroup
from loda.errors import ConfigError
from loda.reading import inside, read_json
from loda.workbench import Workbench, canonical_digest

Measure = Literal["class_means", "second_moments"]
FILE = "similarity.json"
_DECIMALS = 6  # other machines and thread counts sum in another order; what is kept must not show it


@dataclass(frozen=True)
class TaskSimilarity:
    """A symmetric matrix of cosines.

    Attributes:
        measure: "class_means" | "second_moments".
        key: SHA-256 of what it was computed from.
        tasks: names, by index.
        matrix_TT: (T, T) in [-1, 1], rounded to 6 decimals; the diagonal is 1.
    """

    measure: Measure
    key: str
    tasks: tuple[str, ...]
    matrix_TT: np.ndarray

    def to_json(self) -> str:
        """The content of ``similarity.json``."""
        return json.dumps(
            {"measure": self.measure, "key": self.key, "tasks": self.tasks, "matrix": self.matrix_TT.tolist()}, indent=1
        )


def task_similarity(bench: Workbench, measure: Measure, folder: Path) -> TaskSimilarity:
    """The similarity of the workbench's tasks: as saved in the run folder if that is of the same data, or computed.

    Raises:
        ConfigError: the saved file can't be read.
    """
    key = canonical_digest([measure, bench.root_key, [task.classes for task in bench.tasks], 1])
    file = folder / FILE
    names = tuple(task.name for task in bench.tasks)
    if file.is_file():
        try:
            saved = read_json(inside(folder, file))
            if saved["key"] == key:
                matrix_TT = np.asarray(saved["matrix"], dtype=np.float64)
                if matrix_TT.shape == (len(names), len(names)) and np.isfinite(matrix_TT).all():
                    return TaskSimilarity(measure, key, names, matrix_TT)
                raise ValueError(f"its matrix has shape {matrix_TT.shape}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(f"{file} can't be read: {error}; remove it, and it is computed again") from error
    return TaskSimilarity(measure, key, names, compute_similarity(bench, measure))


def compute_similarity(bench: Workbench, measure: Measure) -> np.ndarray:
    """Cosines between tasks, (T, T) float64, less what all tasks have in common (ours: with it, all lie near 1).

    ``class_means``: a class is the direction from the mean of all class means to its own; a task is the mean of its
    classes' unit directions. ``second_moments``: the mean over layers of the cosines between the tasks' second moments
    of the layer's inputs, each at norm 1 and less their mean over tasks; of the adapted layers, those with the
    narrowest inputs (the wide ones would take gigabytes on a large backbone).
    """
    # The driver is alone, even where a group of workers will compute the stages.
    bench = dataclasses.replace(bench, group=WorkerGroup())
    bench.backbone.load_merges([])
    if measure == "class_means":
        matrix_TT = _cosines(_class_directions(bench))
    else:
        layers = _layer_moments(bench)
        matrix_TT = torch.stack([_cosines(of_TE - of_TE.mean(0)) for of_TE in layers]).mean(0)
    rounded_TT = matrix_TT.numpy().round(_DECIMALS)
    np.fill_diagonal(rounded_TT, 1.0)
    return rounded_TT


def _class_directions(bench: Workbench) -> Tensor:
    """(T, D) float64."""
    means = []
    for task in bench.tasks:
        rows = bench.indices(task.classes, "train")
        features_ND, _ = bench.pass_over(bench.images(rows))
        statistics = ClassStatistics.of(features_ND, bench.labels(rows, task.classes), len(task.classes))
        means.append(statistics.means_CD.double())
    common_D = torch.cat(means).mean(0)
    return torch.stack([F.normalize(means_CD - common_D, dim=-1).mean(0) for means_CD in means])


def _layer_moments(bench: Workbench) -> list[Tensor]:
    """For each layer of the narrowest width D: (T, D (D + 1) / 2), with the inner products of whole matrices."""
    width = min(bench.backbone.layers_by_width)
    row, column = torch.triu_indices(width, width)
    weight_E = torch.where(row == column, 1.0, 2**0.5)
    of_tasks: list[list[Tensor]] = [[] for _ in bench.backbone.layers_by_width[width]]
    for task in bench.tasks:
        _, moments = bench.pass_over(bench.images(bench.indices(task.classes, "train")), record_moments=True)
        assert moments is not None
        for found, moment_DD in zip(of_tasks, moments.values[width].cpu(), strict=True):
            found.append((moment_DD[row, column] * weight_E / moment_DD.norm()).float())
    return [torch.stack(found).double() for found in of_tasks]


def _cosines(vectors_TD: Tensor) -> Tensor:
    unit_TD = F.normalize(vectors_TD, dim=-1)
    return unit_TD @ unit_TD.T
