"""The main job: search settings over tune orders, then judge the chosen one on orders and images it never saw."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from loda.errors import ConfigError, StageError
from loda.methods import build_method
from orchestrate.evaluation import Judged, evaluate, is_stored
from orchestrate.merged import write_merged
from orchestrate.pages import write_pages
from orchestrate.progress import StudyProgress
from orchestrate.racing import RaceScheduler
from orchestrate.recorder import Recorder
from orchestrate.results import OrderResult, document, read_order, write_tables
from orchestrate.searcher import StudySearcher
from orchestrate.session import Session, claim_folder, open_session, write_atomic
from orchestrate.study import Study
from orchestrate.tracking import Tracker
from orchestrate.trials import Watcher, run_trials
from orchestrate.work import StageCounts, stages_of
from orchestrate.workers import Workers, open_workers


@dataclass
class Outcome:
    """What a command has to show: the ``--json`` document."""

    session: Session
    values: dict[str, Any]


def open_tracker(session: Session) -> Tracker:
    """MLflow as the study asks for it."""
    tracking = session.study.tracking
    spool = session.folder / "mlflow-waiting.jsonl"
    return Tracker.open(tracking.uri, tracking.experiment or session.study.name, Path.cwd(), spool=spool)


def run_study(study: Study, *, local: bool = False, quiet: bool = False) -> Outcome:
    """One setting over its evaluation orders, no search.

    Args:
        local: in this process, without Ray.

    Raises:
        ConfigError: before any work starts.
        StageError: an order failed.
    """
    started = time.perf_counter()
    session = open_session(study, search=False)
    if local and study.resources.workers > 1:
        raise ConfigError("resources.workers: --local walks in one process; set workers to 1")
    claim_folder(session, "run")
    counts = StageCounts()
    with contextlib.ExitStack() as stack:
        here = local or is_stored(session, {})
        workers = None if here else stack.enter_context(open_workers(session))
        tracker = stack.enter_context(open_tracker(session))
        recorder = Recorder(session, tracker)
        judged = evaluate(session, {}, counts, recorder, workers, quiet=quiet)
        startup = {"workers": workers.startup_seconds() if workers is not None else 0.0}
        return _finish(session, judged, judged.results, counts, recorder, started, {"startup_seconds": startup})


def _finish(
    session: Session,
    judged: Judged,
    everything: Sequence[OrderResult],
    counts: StageCounts,
    recorder: Recorder,
    started: float,
    more: Mapping[str, Any],
) -> Outcome:
    """The end of ``run`` and ``sweep``: tables, the document, MLflow's last words."""
    write_tables(session, everything)
    values = document(session, judged.results, counts, time.perf_counter() - started) | dict(more)
    values["model_version"] = _publish(session, judged, recorder, values)
    tracker = recorder.tracker
    tracker.close()
    values["wall_seconds"] = time.perf_counter() - started
    values["mlflow"] = {"uri": tracker.uri, "experiment_id": tracker.experiment_id}
    write_atomic(session.folder / "summary.json", json.dumps(values, indent=1))
    return Outcome(session, values)


def _publish(session: Session, judged: Judged, recorder: Recorder, values: Mapping[str, Any]) -> str | None:
    """Log the tables and register the merged model of the first evaluation order, if the method leaves one."""
    files: dict[str, bytes | str] = {
        f"{name}.parquet": (session.folder / f"{name}.parquet").read_bytes() for name in ("results", "timings")
    }
    files["summary.json"] = json.dumps(values, indent=1)
    model = None
    method = build_method(session.study.method)
    plain = method.mergeable and not method.export_refusal
    if session.study.tracking.register_model and judged.results and plain:
        model = session.folder / "model"
        export_order(session, judged.settings, judged.results[0], model)
    metrics = {f"test/{key}": values[key]["mean"] for key in ("a_last", "a_avg")}
    return recorder.finish(metrics, files, model, values, write_pages(session, judged.results, values))


def export_order(session: Session, settings: Mapping[str, Any], one: OrderResult, directory: Path) -> dict[str, Any]:
    """Write the merged model of one order under one setting; plain timm loads it.

    Raises:
        ConfigError: a stage is no longer in the store.
    """
    wanted = [node for node in one.nodes if node.step == "consolidate"] + [one.nodes[-1]]
    artifacts = [session.store.read(node.key) for node in wanted]
    if any(artifact is None for artifact in artifacts):
        raise ConfigError(
            f"stages of {one.work.name} are no longer in the store; run `orchestrate run` or `sweep` again"
        )
    *chain, evaluation = [artifact for artifact in artifacts if artifact is not None]
    run_settings = session.study.with_values(settings).run_settings()
    return write_merged(one.work.bench(session.bench), run_settings, chain, evaluation, directory)


def sweep(study: Study, *, quiet: bool = False) -> Outcome:
    """Search, choose, evaluate; goes on where an interrupted run of the same study ended.

    Raises:
        ConfigError: before any work starts.
        StageError: every setting failed, or the chosen one failed on an evaluation order.
    """
    started = time.perf_counter()
    session = open_session(study, search=True)
    assert session.space is not None
    claim_folder(session, "sweep")
    counts = StageCounts()
    searcher = StudySearcher(session.study, session.space, session.folder / "optuna.db")
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(open_workers(session)) if _work_is_left(session, searcher) else None
        driver_startup = time.perf_counter() - started
        recorder = Recorder(session, stack.enter_context(open_tracker(session)))
        if workers is not None:
            _search(session, searcher, counts, recorder, workers, quiet)
        best = choose(searcher)
        settings = dict(best.user_attrs["settings"])
        judged = evaluate(session, settings, counts, recorder, workers, quiet=quiet)
        everything = [*_search_results(session, searcher), *judged.results]
        startup = {"driver": driver_startup, "workers": workers.startup_seconds() if workers is not None else 0.0}
        more = _search_values(searcher, best, everything) | {"startup_seconds": startup}
        more["lane_busy_seconds"] = workers.busy_seconds() if workers is not None else None
        return _finish(session, judged, everything, counts, recorder, started, more)


def _work_is_left(session: Session, searcher: StudySearcher) -> bool:
    if searcher.ended < session.study.search.trials:
        return True
    return not is_stored(session, choose(searcher).user_attrs["settings"])


def _search(
    session: Session,
    searcher: StudySearcher,
    counts: StageCounts,
    recorder: Recorder,
    workers: Workers,
    quiet: bool,
) -> None:
    orders = session.tune_orders
    remaining = session.study.search.trials - searcher.ended
    if remaining <= 0:
        return
    total = remaining * len(orders) * stages_of(session.study, len(session.bench.tasks))
    with StudyProgress(f"{session.study.name}: search", total, quiet) as progress:
        if searcher.ended:
            progress.line(f"going on after {searcher.ended} finished trials")
        works = {work.name: work for work in orders}
        watcher = Watcher(session, works, progress, recorder, counts, searcher, workers)
        run_trials(session, {}, orders, watcher, "search", searcher, remaining, _race(session, searcher, watcher))


def _race(session: Session, searcher: StudySearcher, watcher: Watcher) -> RaceScheduler | None:
    study = session.study
    if not study.racing.on:
        return None
    objective = study.search.objective
    return RaceScheduler(
        study.racing,
        objective,
        stages_of(study, len(session.bench.tasks)),
        searcher.trial_name,
        searcher.finished_orders(objective.metric),
        watcher.on_stop,
    )


def choose(searcher: StudySearcher) -> FrozenTrial:
    """The setting to evaluate: the best objective; of several objectives the first decides among the Pareto front.

    Raises:
        StageError: no trial succeeded.
    """
    study = searcher.optuna_study
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        reasons = {
            str(trial.user_attrs.get("reason", "no reason recorded")) for trial in study.get_trials(deepcopy=False)
        }
        raise StageError(f"no setting finished all its orders: {'; '.join(sorted(reasons)) or 'no trial ran'}")
    front = study.best_trials
    sign = 1 if study.directions[0].name == "MAXIMIZE" else -1
    return max(front, key=lambda trial: (sign * trial.values[0], -trial.number))


def _search_results(session: Session, searcher: StudySearcher) -> list[OrderResult]:
    """Every finished trial's orders, also those of former runs."""
    found = []
    for trial in searcher.optuna_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        for work in session.tune_orders:
            one = read_order(session, f"trial-{trial.number:04d}", trial.user_attrs["settings"], work)
            if one is not None:
                found.append(one)
    return found


def _search_values(searcher: StudySearcher, best: FrozenTrial, everything: Sequence[OrderResult]) -> dict[str, Any]:
    trials = searcher.optuna_study.get_trials(deepcopy=False)
    states = [trial.state.name.lower() for trial in trials]
    keys = [node.key for one in everything for node in one.nodes]
    stages = [node.key for one in everything for node in one.nodes if node.step == "consolidate"]
    return {
        "best": {
            "trial": best.number,
            "settings": best.user_attrs["settings"],
            "objectives": dict(zip(searcher.optuna_study.metric_names or ["objective"], best.values)),
        },
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "sharing": {
            "stages": len(stages),
            "distinct_stages": len(set(stages)),
            "steps": len(keys),
            "distinct_steps": len(set(keys)),
        },
    }
