"""What MLflow is told: settings as flat parameters, a stage's numbers, the software and the machine."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from loda.metrics import accuracy_matrix_summary

PACKAGES = (
    "loda-orchestrate", "torch", "torchvision", "timm", "ray", "optuna", "mlflow", "numpy", "scipy", "pandas",
    "statsmodels", "pyarrow", "safetensors", "pydantic", "pillow",
)  # fmt: skip


class Step(Protocol):
    """One step of a stage as far as it is logged; an ``Artifact`` is one."""

    @property
    def meta(self) -> Mapping[str, Any]: ...
    @property
    def timings(self) -> Mapping[str, float]: ...


def flat_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by key path (``method.rank_general``), values as text; lists and nulls as JSON."""
    found: dict[str, str] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat_params(value, f"{path}.")
        else:
            found[path] = value if isinstance(value, str) else json.dumps(value)
    return found


def metric_name(text: str) -> str:
    """The text with what MLflow doesn't allow in a metric's name replaced by an underscore."""
    return re.sub(r"[^\w.\- :/]", "_", text)


def stage_metrics(
    steps: Mapping[str, Step], evaluations: Sequence[Step], order: Sequence[int], task_names: Sequence[str]
) -> dict[str, float]:
    """The numbers of one stage, to be logged with the 1-based position of its task as the step.

    Args:
        steps: the stage's ``observe``, ``adapt``, ``consolidate`` and ``evaluate``; those that are at hand.
        evaluations: ``evaluate`` of all stages of the order up to this one, first task first.
        order: the tasks' indices, in the order learned.
        task_names: names of all tasks of the stream, by index.

    Returns:
        ``accuracy_seen`` (percent of all images of the classes seen so far), ``accuracy_seen_macro`` (mean over tasks),
        ``a_avg`` and ``forgetting`` so far, ``accuracy_on/<task>``, what the method reports of each layer
        (``rank_general/<layer>`` ...) with its mean over layers, ``seconds/<step>``, ``loss_last``,
        ``trainable_parameters``, ``seconds_per_image`` (all epochs of one training image: observed, learned, merged).
    """
    last = evaluations[-1].meta
    correct, count = np.asarray(last["correct"], dtype=float), np.asarray(last["count"], dtype=float)
    scores_T = 100 * correct / count
    found = {"accuracy_seen": 100 * correct.sum() / count.sum(), "accuracy_seen_macro": scores_T.mean()}
    if len(evaluations) == len(count):  # else all tasks were learned together, and there is nothing before this stage
        matrix = np.full((len(count), len(count)), np.nan)
        for row, evaluation in enumerate(evaluations):
            matrix[row, : row + 1] = 100 * np.asarray(evaluation.meta["correct"]) / np.asarray(evaluation.meta["count"])
        so_far = accuracy_matrix_summary(matrix, count.astype(np.int64))
        found["a_avg"] = so_far.a_avg
        if so_far.forgetting is not None:
            found["forgetting"] = so_far.forgetting
    for index, score in zip(order, scores_T, strict=False):
        found[f"accuracy_on/{index} {task_names[index]}"] = score
    for name in ("adapt", "consolidate"):
        found |= _facts(steps[name].meta.get("facts", {})) if name in steps else {}
    losses = epoch_losses(steps)
    if losses:
        found["loss_last"] = losses[-1]
    seconds = {name: float(step.timings.get("seconds", 0.0)) for name, step in steps.items()}
    found |= {f"seconds/{name}": value for name, value in seconds.items()} | {"seconds/stage": sum(seconds.values())}
    if "adapt" in steps and "trainable_parameters" in steps["adapt"].meta:
        found["trainable_parameters"] = steps["adapt"].meta["trainable_parameters"]
    if "observe" in steps and steps["observe"].meta.get("images"):
        learned = sum(seconds.get(name, 0.0) for name in ("observe", "adapt", "consolidate"))
        found["seconds_per_image"] = learned / steps["observe"].meta["images"]
    return {metric_name(name): float(value) for name, value in found.items() if math.isfinite(value)}


def _facts(facts: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by layer, and their means over layers."""
    found: dict[str, float] = {}
    for kind, value in facts.items():
        if isinstance(value, Mapping):
            numbers = {layer: float(n) for layer, n in value.items() if isinstance(n, int | float)}
            found |= {f"{kind}/{layer}": n for layer, n in numbers.items()}
            if numbers:
                found[f"{kind}_mean"] = sum(numbers.values()) / len(numbers)
        elif isinstance(value, int | float):
            found[kind] = float(value)
    return found


def epoch_losses(steps: Mapping[str, Step]) -> list[float]:
    """Mean training loss of each epoch of a stage; empty for a method that doesn't train."""
    adapt = steps.get("adapt")
    return [float(loss) for loss in adapt.meta.get("losses", [])] if adapt is not None else []


def system_metrics() -> dict[str, float]:
    """Load of this machine now, under the names that MLflow shows as system metrics."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),  # since the last call
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/driver_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }


def software() -> dict[str, str]:
    """Versions of Python, of the system and of the packages that results can depend on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(cwd: Path) -> str | None:
    """The checked-out commit, if ``cwd`` is in a git checkout that has one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(cwd), "rev-parse", "--verify", "--quiet", "HEAD"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
