"""One setting over a study's evaluation orders, on the study's workers or in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loda.distributed import WorkerGroup
from loda.errors import StageError
from orchestrate.progress import StudyProgress
from orchestrate.recorder import Recorder
from orchestrate.results import OrderResult, metric_block, read_order
from orchestrate.session import Session
from orchestrate.trials import Watcher, run_trials, shards
from orchestrate.work import StageCounts, WorkList, stages_of
from orchestrate.worker import run_work
from orchestrate.workers import Workers


@dataclass
class Judged:
    """The evaluation orders under one setting."""

    settings: dict[str, Any]
    results: list[OrderResult]


def evaluate(
    session: Session,
    settings: Mapping[str, Any],
    counts: StageCounts,
    recorder: Recorder,
    workers: Workers | None,
    *,
    quiet: bool,
) -> Judged:
    """Walk the evaluation orders under one setting; without workers, in this process."""
    orders = session.evaluate_orders
    works = {work.name: work for work in orders}
    total = len(orders) * stages_of(session.study, len(session.bench.tasks))
    with StudyProgress(f"{session.study.name}: evaluation", total, quiet) as progress:
        watcher = Watcher(session, works, progress, recorder, counts, None, workers)
        recorder.trial("chosen", settings)
        if workers is None:
            walk_here(session, settings, watcher)
        else:
            run_trials(session, settings, orders, watcher, "evaluate")
    failures = [end.error for end in watcher.ends if end.error]
    results = [one for work in orders if (one := read_order(session, "chosen", settings, work)) is not None]
    if failures or len(results) < len(orders):
        recorder.trial_done("chosen", "FAILED", {}, {"reason": "; ".join(failures)})
        raise StageError("; ".join(failures) or "some evaluation orders have no result; run the same command again")
    means = {key: metric_block(results, key)["mean"] for key in ("a_last", "a_avg")}
    recorder.trial_done("chosen", "FINISHED", means, {})
    return Judged(dict(settings), results)


def walk_here(session: Session, settings: Mapping[str, Any], watcher: Watcher, name: str = "local") -> None:
    """The same walk, in this process; ``name`` stands for Tune's id of the trial."""

    class Here:  # what the watcher reads of a Tune trial
        trial_id = name
        config: dict[str, Any] = {"settings": dict(settings)}  # noqa: RUF012
        last_result: dict[str, Any] = {}  # noqa: RUF012

    def report(metrics: dict[str, Any]) -> None:
        watcher.on_trial_result(0, [], Here(), metrics)  # type: ignore[arg-type]

    (orders,) = shards(session.evaluate_orders, 1)
    work = WorkList(dict(settings), tuple(orders))
    Here.last_result = run_work(session.payload() | {"work": work.to_dict()}, report, WorkerGroup())
    watcher.on_trial_complete(0, [], Here())  # type: ignore[arg-type]


def is_stored(session: Session, settings: Mapping[str, Any]) -> bool:
    """Whether every step of the evaluation orders is in the store, so that reading them needs no workers."""
    if session.study.resources.workers > 1:  # should one be damaged, it takes as many to compute it again
        return False
    return all(
        session.store.has(node.key) for work in session.evaluate_orders for node in session.nodes(settings, work)
    )
