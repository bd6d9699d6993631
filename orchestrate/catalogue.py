"""What there is: bundled studies, spaces, methods, datasets, and the studies that were run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loda.errors import ConfigError
from orchestrate.records import read_record


def method_rows() -> list[dict[str, Any]]:
    """Every registered method."""
    from loda.methods import registry

    return [
        {
            "name": method.name,
            "summary": method.summary,
            "mergeable": method.mergeable,
            "needs_task_id": method.needs_task_id,
            "prediction": method.prediction,
            "memory_growth": method.memory_growth,
            "reconstructed": method.reconstructed,
            "joint": method.joint,
            "trains": method.trains,
            "source": method.source,
            "version": method.version,
            "settings": {name: str(field.annotation) for name, field in method.Settings.model_fields.items()},
            "published": dict(method.published),
        }
        for method in registry().values()
    ]


def preset_options(name: str) -> dict[str, str]:
    """The values of a method's paper by key path, written as ``-s`` takes them.

    Raises:
        ConfigError: unknown method.
    """
    from loda.methods import preset

    try:
        values = preset(name)
    except ValueError as error:
        raise ConfigError(f"--preset: {error}") from error
    # No spaces: the shell must not cut a value in two.
    return {
        path: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for path, value in values.items()
    }


def _run_row(folder: Path) -> dict[str, Any]:
    from orchestrate.session import read_run_study

    row: dict[str, Any] = {"study": folder.name, "method": "", "state": "unfinished", "a_last": None, "a_avg": None}
    try:
        row["method"] = read_run_study(folder).method.name
    except ConfigError:
        return row | {"state": "unreadable study.yaml"}
    summary = folder / "summary.json"
    if summary.is_file():
        values = read_record(summary, ("a_last", "a_avg"))
        row |= {"state": "finished", "a_last": values["a_last"]["mean"], "a_avg": values["a_avg"]["mean"]}
    elif (folder / "robustness.json").is_file():
        values = read_record(folder / "robustness.json", ("spread", "baseline", "completeness", "variants"))
        baseline = values["spread"].get(values["baseline"], {})
        row |= {key: baseline[key]["mean"] for key in ("a_last", "a_avg") if key in baseline}
        if values["completeness"]["complete"]:
            row |= {"method": " / ".join(values["variants"]), "state": "finished (robustness)"}
    return row


def catalogue(runs: Path) -> dict[str, Any]:
    """Names of everything at hand, and a row for each run."""
    from loda.datasets import dataset_names
    from loda.methods import registry
    from orchestrate.space import bundled_spaces
    from orchestrate.study import bundled_studies

    return {
        "bundled_studies": bundled_studies(),
        "search_spaces": bundled_spaces(),
        "methods": sorted(registry()),
        "datasets": list(dataset_names()),
        "runs": [_run_row(file.parent) for file in sorted(runs.glob("*/study.yaml"))],
    }


def export_study(folder: Path, directory: Path, order: str | None) -> dict[str, Any]:
    """Write the merged model of a finished study's chosen setting.

    Raises:
        ConfigError: no such study, not finished, or no such order.
    """
    from orchestrate.results import read_order
    from orchestrate.session import open_session, read_run_study
    from orchestrate.sweep import export_order

    study = read_run_study(folder)
    summary = folder / "summary.json"
    if not summary.is_file():
        raise ConfigError(f"{study.name} has no result yet; `orchestrate resume {study.name}` goes on")
    settings = read_record(summary).get("best", {}).get("settings", {})
    session = open_session(study, search=False)
    works = {work.name: work for work in session.evaluate_orders}
    name = order or next(iter(works))
    if name not in works:
        raise ConfigError(f"--order: no evaluation order {name!r}; there are {', '.join(works)}")
    one = read_order(session, "chosen", settings, works[name])
    if one is None:
        raise ConfigError(
            f"stages of {name} are no longer in the store; `orchestrate resume {study.name}` computes them"
        )
    return export_order(session, settings, one, directory)


def experiment_of(study: str | None, store_uri: str) -> str | None:
    """MLflow's experiment id of a study that was run; None: the newest run's, or none at all."""
    documents = [file for name in ("summary", "robustness") for file in Path("runs").glob(f"*/{name}.json")]
    summaries = sorted(documents, key=lambda file: file.stat().st_mtime)
    chosen = [file for file in summaries if study in (None, file.parent.name)]
    if study is not None and not chosen:
        raise ConfigError(f"--study: no finished study {study!r} in runs/")
    for file in reversed(chosen):
        mlflow = read_record(file).get("mlflow", {})
        if mlflow.get("uri") == store_uri:
            return str(mlflow["experiment_id"])
    return None
