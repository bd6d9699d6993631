"""Checks of this machine and of a study, each with what was found."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from loda.errors import ConfigError
from orchestrate.study import Study

PACKAGES = ("ray", "torch", "timm", "mlflow", "optuna", "pyarrow")


def _check(name: str, look: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "found": look()}
    except ConfigError as error:
        return {"name": name, "ok": False, "found": "; ".join(error.problems)}
    except Exception as error:  # a doctor reports what it finds
        return {"name": name, "ok": False, "found": f"{type(error).__name__}: {error}"}


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return "no GPU; CPU is used"


def examine(study: Study) -> dict[str, Any]:
    """Look at everything that a sweep of this study needs, without starting it."""
    from orchestrate.session import open_session
    from orchestrate.store import StageStore

    def study_opens() -> str:
        session = open_session(study, search=True)
        bench = session.bench
        images = len(bench.dataset)
        return (
            f"{len(bench.tasks)} tasks, {bench.dataset.classes} classes, {images} images; {study.backbone.name} with "
            f"{len(bench.backbone.layers)} adapted layers; {len(session.tune_orders)} tune and "
            f"{len(session.evaluate_orders)} evaluation orders"
        )

    def store_writes() -> str:
        StageStore(study.resources.store).check_writable()
        return study.resources.store

    def mlflow_answers() -> str:
        from orchestrate.redaction import redact
        from orchestrate.tracking_uri import tracking_uri

        uri = study.tracking.uri or tracking_uri(None, Path.cwd())
        if study.tracking.uri is not None:
            from orchestrate.tracking import Tracker

            Tracker.open(study.tracking.uri, study.tracking.experiment or study.name, Path.cwd()).close()
        return redact(uri)

    def memory() -> str:
        free = psutil.virtual_memory().available / 2**30
        wanted = 1.2 + 1.1 * study.resources.concurrent_trials * study.resources.workers
        if free < wanted:
            raise ConfigError(f"{free:.1f} GiB free, about {wanted:.1f} wanted; lower resources.concurrent_trials")
        return f"{free:.1f} GiB free"

    checks = [
        _check("python", platform.python_version),
        _check("packages", lambda: ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)),
        _check("cores", lambda: f"{psutil.cpu_count()}"),
        _check("memory", memory),
        _check("disk", lambda: f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"),
        _check("device", _device),
        _check("study", study_opens),
        _check("store", store_writes),
        _check("MLflow", mlflow_answers),
    ]
    return {"study": study.name, "checks": checks}
