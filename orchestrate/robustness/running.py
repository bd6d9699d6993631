"""Run every variant, under every training seed, over all evaluation orders: one set of workers, one store."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from ray.tune.experiment import Trial

from loda.errors import ConfigError, StageError
from orchestrate.evaluation import is_stored, walk_here
from orchestrate.pages import report_pages
from orchestrate.progress import StudyProgress
from orchestrate.recorder import Recorder
from orchestrate.results import OrderResult, metric_block, read_order
from orchestrate.robustness.analysis import analyse
from orchestrate.robustness.tidy import COLUMNS, order_rows
from orchestrate.robustness.variants import Cell, describe, make_cells, make_design, make_questions, root_of
from orchestrate.session import Session, claim_folder, open_session, write_atomic
from orchestrate.study import Study
from orchestrate.sweep import Outcome, open_tracker
from orchestrate.trials import Watcher, run_trials
from orchestrate.work import StageCounts, stages_of
from orchestrate.workers import Workers, open_workers

HEATMAPS = 24  # orders in all: beyond that, drawing them would take longer than reading results


class _VariantWatcher(Watcher):
    """Names trials after the variants whose settings they have."""

    def __init__(self, cells: Sequence[Cell], *args: Any) -> None:
        super().__init__(*args)
        self._cells = {_text(cell.settings): cell.name for cell in cells}
        self.heatmaps = len(cells) * len(self.works) <= HEATMAPS

    def _name(self, trial: Trial) -> str:
        return self._cells[_text(trial.config["settings"])]


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def run_robustness(study: Study, *, local: bool = False, stored: bool = False, quiet: bool = False) -> Outcome:
    """All variants x training seeds x evaluation orders, on test images, and the statistics over them.

    What is stored isn't computed again, so the same call goes on after an interruption. Results so far are written
    also when variants fail or the user stops.

    Args:
        local: in this process, without Ray.
        stored: compute nothing; report what is in the store.

    Raises:
        ConfigError: before any work starts.
        StageError: a variant failed on an order; the rest is written, and the document says what is missing.
    """
    started = time.perf_counter()
    session = open_session(study, search=False)
    cells = make_cells(session)
    if local and study.resources.workers > 1:
        raise ConfigError("resources.workers: --local walks in one process; set workers to 1")
    claim_folder(session, "robustness")
    counts = StageCounts()
    if stored:
        return Outcome(session, _write(session, cells, _results(session, cells), counts, started, {}))
    with contextlib.ExitStack() as stack:
        here = local or all(is_stored(session, cell.settings) for cell in cells)
        workers = None if here else stack.enter_context(open_workers(session))
        tracker = stack.enter_context(open_tracker(session))
        recorder = Recorder(session, tracker)
        try:
            failures = _walk_all(session, cells, counts, recorder, workers, quiet)
        except KeyboardInterrupt:
            _write(session, cells, _results(session, cells), counts, started, {})
            raise
        results = _results(session, cells)
        more = {
            "startup_seconds": {"workers": workers.startup_seconds() if workers is not None else 0.0},
            "mlflow": {"uri": tracker.uri, "experiment_id": tracker.experiment_id},
        }
        values = _write(session, cells, results, counts, started, more)
        _record_ends(session, cells, results, recorder, failures, values)
    if not values["completeness"]["complete"]:
        reasons = "; ".join(dict.fromkeys(failures.values())) or "orders have no result; run the same command again"
        where = session.folder / "robustness.json"
        raise StageError(f"{_missing(values)}: {reasons}. What is there: {where}, or `orchestrate show`")
    values["wall_seconds"] = time.perf_counter() - started
    write_atomic(session.folder / "robustness.json", json.dumps(values, indent=1, allow_nan=False))
    return Outcome(session, values)


def _missing(values: Mapping[str, Any]) -> str:
    whole = values["completeness"]
    return f"{whole['expected'] - whole['present']} of {whole['expected']} orders x variants x seeds are missing"


def _walk_all(
    session: Session,
    cells: Sequence[Cell],
    counts: StageCounts,
    recorder: Recorder,
    workers: Workers | None,
    quiet: bool,
) -> dict[str, str]:
    """Walk everything; the reasons of the cells that failed, by their names."""
    orders = session.evaluate_orders
    works = {work.name: work for work in orders}
    tasks = len(session.bench.tasks)
    total = len(orders) * sum(stages_of(cell.study, tasks) for cell in cells)
    with StudyProgress(f"{session.study.name}: robustness", total, quiet) as progress:
        watcher = _VariantWatcher(cells, session, works, progress, recorder, counts, None, workers)
        for cell in cells:
            tags = {"phase": "robustness", "method": cell.study.method.name}
            tags |= {"variant": cell.variant, "seed": str(cell.seed)}
            recorder.trial(cell.name, cell.settings, tags)
        if workers is not None:
            run_trials(session, [cell.settings for cell in cells], orders, watcher, "robustness")
            return {end.name: end.error for end in watcher.ends if end.error}
        failures = {}
        for cell in cells:
            try:
                walk_here(session, cell.settings, watcher, cell.name)
            except StageError as error:  # the other variants can still be compared
                progress.line(f"{cell.name}  failed: {error}")
                failures[cell.name] = str(error)
        return failures


def _results(session: Session, cells: Sequence[Cell]) -> dict[str, list[OrderResult]]:
    """What is in the store, by the cells' names."""
    return {
        cell.name: [
            one
            for work in session.evaluate_orders
            if (one := read_order(session, cell.name, cell.settings, work)) is not None
        ]
        for cell in cells
    }


def robustness_rows(
    session: Session, cells: Sequence[Cell], results: Mapping[str, Sequence[OrderResult]]
) -> pd.DataFrame:
    """Tidy accuracies of every variant, seed and order; columns as in :mod:`orchestrate.robustness.tidy`."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        for one in results[cell.name]:
            result = one.result
            joint = result.accuracy_matrix.shape[0] < len(result.order)
            names = [session.task_names[task] for task in (range(len(result.order)) if joint else result.order)]
            probes = {
                key: None if joint else [evaluation.meta[key] for evaluation in result.evaluations]
                for key in ("probe_before", "probe_frozen")
            }
            common = {
                "study": session.study.name,
                "method": cell.study.method.name,
                "setting": cell.variant,
                "order_name": one.work.name,
                "order": list(one.work.order),
                "root": root_of(one.work),
                "seed": cell.seed,
                "split": one.work.split,
            }
            rows += [
                common | row
                for row in order_rows(
                    result.accuracy_matrix,
                    names,
                    result.test_counts.tolist(),
                    probes["probe_before"],
                    probes["probe_frozen"],
                )
            ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _write(
    session: Session,
    cells: Sequence[Cell],
    results: Mapping[str, Sequence[OrderResult]],
    counts: StageCounts,
    started: float,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """``robustness.parquet`` and ``robustness.json`` of what there is; returns the document."""
    frame = robustness_rows(session, cells, results)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    table = session.folder / "robustness.parquet"
    write_atomic(table, buffer.getvalue())
    orders = session.evaluate_orders
    found = analyse(frame, make_design(session, orders), make_questions(session.study))
    values = {
        "study": session.study.name,
        "study_digest": session.study.digest,
        "data_digest": session.bench.dataset.digest,
        "tasks": session.task_names,
        "orders": {work.name: list(work.order) for work in orders},
        "variants": describe(cells),
        **found,
        "state_digests": {
            cell.name: {one.work.name: one.result.state_digest for one in results[cell.name]} for cell in cells
        },
        **counts.to_dict(),
        "wall_seconds": time.perf_counter() - started,
        "executor": session.study.resources.executor,
        "concurrent_trials": session.study.resources.concurrent_trials,
        "results": str(table),
        **more,
    }
    write_atomic(session.folder / "robustness.json", json.dumps(values, indent=1, allow_nan=False))
    return values


def _record_ends(
    session: Session,
    cells: Sequence[Cell],
    results: Mapping[str, Sequence[OrderResult]],
    recorder: Recorder,
    failures: Mapping[str, str],
    values: Mapping[str, Any],
) -> None:
    """MLflow's last words on each variant, and the tables."""
    for cell in cells:
        found = results[cell.name]
        if len(found) == len(session.evaluate_orders):
            means = {key: metric_block(found, key)["mean"] for key in ("a_last", "a_avg")}
            recorder.trial_done(cell.name, "FINISHED", means, {})
        else:
            reason = failures.get(cell.name, "orders are missing")
            recorder.trial_done(cell.name, "FAILED", {}, {"reason": reason})
    files: dict[str, bytes | str] = {
        "robustness.parquet": (session.folder / "robustness.parquet").read_bytes(),
        "robustness.json": json.dumps(values, indent=1, allow_nan=False),
    }
    metrics = {
        f"test/{variant}/{key}": block[key]["mean"]
        for variant, block in values["spread"].items()
        for key in ("a_last", "a_avg")
        if block[key]["mean"] is not None
    }
    recorder.finish(metrics, files, None, values, report_pages(session, None))
