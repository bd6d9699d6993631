"""The main job: search settings over tune orders, then judge the chosen one on orders and images it never saw."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from loda.distributed import WorkerGroup
from loda.errors import ConfigError, StageError
from loda.methods import build_method
from orchestrate.cluster import ray_cluster
from orchestrate.merged import write_merged
from orchestrate.progress import StudyProgress
from orchestrate.recorder import Recorder
from orchestrate.results import OrderResult, document, metric_block, read_order, write_tables
from orchestrate.searcher import StudySearcher
from orchestrate.session import Session, claim_folder, open_session, write_atomic
from orchestrate.study import Study
from orchestrate.tracking import Tracker
from orchestrate.trials import Watcher, run_trials, shards
from orchestrate.work import StageCounts, WorkList, stages_of
from orchestrate.worker import run_work


@dataclass
class Outcome:
    """What a command has to show: the ``--json`` document."""

    session: Session
    values: dict[str, Any]


def _open_tracker(session: Session) -> Tracker:
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
    claim_folder(session)
    counts = StageCounts()
    with _open_tracker(session) as tracker:
        recorder = Recorder(session, tracker)
        results, startup = _evaluate(session, {}, counts, recorder, local=local, quiet=quiet)
        write_tables(session, results)
        values = document(session, results, counts, time.perf_counter() - started) | {
            "startup_seconds": {"workers": startup}
        }
        values["model_version"] = _publish(session, {}, results, recorder, values)
        recorder.tracker.close()
    values["wall_seconds"] = time.perf_counter() - started
    values["mlflow"] = {"uri": tracker.uri, "experiment_id": tracker.experiment_id}
    write_atomic(session.folder / "summary.json", json.dumps(values, indent=1))
    return Outcome(session, values)


def _evaluate(
    session: Session,
    settings: Mapping[str, Any],
    counts: StageCounts,
    recorder: Recorder,
    *,
    local: bool,
    quiet: bool,
    ray_is_up: bool = False,
) -> tuple[list[OrderResult], float]:
    """Walk the evaluation orders under one setting; results, and the seconds that its workers took to start."""
    orders = session.evaluate_orders
    works = {work.name: work for work in orders}
    total = len(orders) * stages_of(session.study, len(session.bench.tasks))
    with StudyProgress(f"{session.study.name}: evaluation", total, quiet) as progress:
        watcher = Watcher(session, works, progress, recorder, counts, None)
        recorder.trial("chosen", settings)
        if local:
            _walk_here(session, settings, watcher)
        elif ray_is_up:
            lists = shards(orders, settings, session.study.resources.concurrent_trials)
            run_trials(session, lists, watcher, "evaluate")
        else:
            with ray_cluster(session.study):
                lists = shards(orders, settings, session.study.resources.concurrent_trials)
                run_trials(session, lists, watcher, "evaluate")
    failures = [end.error for end in watcher.ends if end.error]
    results = [one for work in orders if (one := read_order(session, "chosen", settings, work)) is not None]
    if failures or len(results) < len(orders):
        recorder.trial_done("chosen", "FAILED", {}, {"reason": "; ".join(failures)})
        raise StageError("; ".join(failures) or "some evaluation orders have no result; run the same command again")
    means = {key: metric_block(results, key)["mean"] for key in ("a_last", "a_avg")}
    recorder.trial_done("chosen", "FINISHED", means, {})
    return results, watcher.worker_startup_seconds


def _walk_here(session: Session, settings: Mapping[str, Any], watcher: Watcher) -> None:
    """The same walk, in this process."""

    class Here:  # what the watcher reads of a Tune trial
        trial_id = "local"
        config: dict[str, Any] = {"settings": dict(settings)}  # noqa: RUF012
        last_result: dict[str, Any] = {}  # noqa: RUF012

    def report(metrics: dict[str, Any]) -> None:
        watcher.on_trial_result(0, [], Here(), metrics)  # type: ignore[arg-type]

    for work in shards(session.evaluate_orders, settings, 1):
        Here.last_result = run_work(session.payload() | {"work": work.to_dict()}, report, WorkerGroup())
        watcher.on_trial_complete(0, [], Here())  # type: ignore[arg-type]


def _publish(
    session: Session,
    settings: Mapping[str, Any],
    results: Sequence[OrderResult],
    recorder: Recorder,
    values: Mapping[str, Any],
) -> str | None:
    """Log the tables and register the merged model of the first evaluation order, if the method leaves one."""
    files: dict[str, bytes | str] = {
        f"{name}.parquet": (session.folder / f"{name}.parquet").read_bytes() for name in ("results", "timings")
    }
    files["summary.json"] = json.dumps(values, indent=1)
    model = None
    method = build_method(session.study.method)
    if session.study.tracking.register_model and results and method.mergeable and not method.export_refusal:
        model = session.folder / "model"
        export_order(session, settings, results[0], model)
    metrics = {f"test/{key}": values[key]["mean"] for key in ("a_last", "a_avg")}
    return recorder.finish(metrics, files, model)


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
    return write_merged(session.bench, run_settings, chain, evaluation, directory)


def sweep(study: Study, *, quiet: bool = False) -> Outcome:
    """Search, choose, evaluate; goes on where an interrupted run of the same study ended.

    Raises:
        ConfigError: before any work starts.
        StageError: every setting failed, or the chosen one failed on an evaluation order.
    """
    started = time.perf_counter()
    session = open_session(study, search=True)
    assert session.space is not None
    claim_folder(session)
    with _open_tracker(session) as tracker:
        searcher = StudySearcher(session.study, session.space, session.folder / "optuna.db")
        recorder = Recorder(session, tracker)
        with ray_cluster(session.study):
            driver_startup = time.perf_counter() - started
            counts, startup = _search(session, searcher, recorder, quiet)
            best = choose(searcher)
            settings = dict(best.user_attrs["settings"])
            evaluated, more = _evaluate(session, settings, counts, recorder, local=False, quiet=quiet, ray_is_up=True)
        searched = _search_results(session, searcher)
        everything = [*searched, *evaluated]
        write_tables(session, everything)
        values = document(session, evaluated, counts, time.perf_counter() - started) | _search_values(
            searcher, best, everything
        )
        values["startup_seconds"] = {"driver": driver_startup, "workers": startup + more}
        values["model_version"] = _publish(session, settings, evaluated, recorder, values)
        tracker.close()
    values["wall_seconds"] = time.perf_counter() - started
    values["mlflow"] = {"uri": tracker.uri, "experiment_id": tracker.experiment_id}
    write_atomic(session.folder / "summary.json", json.dumps(values, indent=1))
    return Outcome(session, values)


def _search(session: Session, searcher: StudySearcher, recorder: Recorder, quiet: bool) -> tuple[StageCounts, float]:
    counts = StageCounts()
    orders = session.tune_orders
    remaining = session.study.search.trials - searcher.ended
    if remaining <= 0:
        return counts, 0.0
    total = remaining * len(orders) * stages_of(session.study, len(session.bench.tasks))
    with StudyProgress(f"{session.study.name}: search", total, quiet) as progress:
        if searcher.ended:
            progress.line(f"going on after {searcher.ended} finished trials")
        works = {work.name: work for work in orders}
        watcher = Watcher(session, works, progress, recorder, counts, searcher)
        run_trials(session, [WorkList({}, orders)], watcher, "search", searcher, remaining)
    return counts, watcher.worker_startup_seconds


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
