"""Run settings as Ray Tune trials, watch them, and write down what they report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orchestrate.executors import inline_trial
from orchestrate.lane_trial import lane_trial
from orchestrate.progress import StudyProgress
from orchestrate.recorder import Recorder, RunStatus
from orchestrate.results import read_order
from orchestrate.searcher import STOPPED, StudySearcher
from orchestrate.session import Session
from orchestrate.work import OrderWork, StageCounts
from orchestrate.workers import Workers


@dataclass
class TrialEnd:
    """How a trial ended."""

    name: str
    settings: dict[str, Any]
    error: str | None
    metrics: dict[str, Any] = field(default_factory=dict)


class Watcher(Callback):
    """Tune's callback in the driver: counts stages, moves the bar, feeds MLflow, remembers how trials ended."""

    def __init__(
        self,
        session: Session,
        works: Mapping[str, OrderWork],
        progress: StudyProgress,
        recorder: Recorder | None,
        counts: StageCounts,
        searcher: StudySearcher | None,
        workers: Workers | None = None,
    ) -> None:
        self.workers = workers
        self.session, self.works, self.progress = session, works, progress
        self.recorder, self.counts, self.searcher = recorder, counts, searcher
        self.ends: list[TrialEnd] = []
        self.heatmaps = searcher is None  # a tenth of a second each
        self._starts: dict[str, float] = {}
        self._seen: set[tuple[str, str, int]] = set()
        self.best: float | None = None
        self.stop_reasons: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to restore them some day; this study goes on from its store instead.
        return {}

    def _name(self, trial: Trial) -> str:
        if self.searcher is None:
            return "chosen"
        return self.searcher.trial_name(trial.trial_id)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._starts[trial.trial_id] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name, settings = self._name(trial), dict(trial.config.get("settings", {}))
        for event in result.get("events", ()):
            place = (trial.trial_id, event["order"], event["position"])
            if trial.trial_id in self._starts and self.workers is not None:
                waited = time.monotonic() - self._starts.pop(trial.trial_id)
                self.workers.inline_startup_seconds += max(
                    0.0, waited - sum(step["seconds"] for step in event["steps"])
                )
            if self.recorder is not None:
                self.recorder.stage(name, settings, self.works[event["order"]].order, event)
            if place not in self._seen:  # a group that was started again walks its orders from the start
                self._seen.add(place)
                self.counts.add(event["steps"])
                best = "" if self.best is None else f", best {self.best:.2f}"
                self.progress.stage(f"{name}, {event['order']}{best}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        if result.get("finished"):
            self._end(trial, "finished", "", result)
        else:
            self._end(trial, "stopped", self.stop_reasons.get(trial.trial_id, "stopped before its end"), result)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = trial.get_error()
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reasons = [line for line in lines if "StageError" in line or "ConfigError" in line]
        reason = (reasons or lines or ["failed without a message"])[-1].strip()
        self._end(trial, "failed", reason, trial.last_result or {})

    def on_stop(self, trial_id: str, reason: str) -> None:
        """The scheduler is about to stop a trial."""
        self.stop_reasons[trial_id] = reason
        if self.searcher is not None:
            self.searcher.annotate(trial_id, {STOPPED: reason})

    def _end(self, trial: Trial, state: str, reason: str, result: Mapping[str, Any]) -> None:
        if self.workers is not None and self.workers.lanes is not None:
            self.workers.lanes.cancel(trial.trial_id)
        name, settings = self._name(trial), dict(trial.config.get("settings", {}))
        label = self.objective_label
        value = result.get(label) if label else None
        metrics = {key: float(result[key]) for key in self._objectives if isinstance(result.get(key), int | float)}
        if state == "finished":
            if self.searcher is not None and isinstance(value, int | float):
                self.best = float(value) if self.best is None else max(self.best, float(value))
                self.progress.line(f"{name}  {label} {value:.2f}  {short(settings)}")
        else:
            self.progress.line(f"{name}  {state}: {reason}  {short(settings)}")
            expected = len(self.works) * len(self.session.bench.tasks)
            done = sum(place[0] == trial.trial_id for place in self._seen)
            self.progress.skip(max(0, expected - done) if self.searcher is not None else 0)
        if self.recorder is not None:
            self._record_end(trial, name, settings, state, reason, result, metrics)
        self.ends.append(TrialEnd(name, settings, None if state == "finished" else reason, dict(result)))

    def _record_end(
        self,
        trial: Trial,
        name: str,
        settings: dict[str, Any],
        state: str,
        reason: str,
        result: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        assert self.recorder is not None
        for row in result.get("orders", ()):
            one = read_order(self.session, name, settings, self.works[row["name"]])
            if one is not None:
                self.recorder.order_done(one, heatmap=self.heatmaps)
        if self.searcher is not None:
            statuses: dict[str, RunStatus] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
            self.recorder.trial_done(name, statuses[state], metrics, {"reason": reason} if reason else {})

    @property
    def _objectives(self) -> list[str]:
        if self.searcher is None:
            return []
        metric = self.searcher.metric
        return list(metric) if isinstance(metric, list) else [str(metric)]

    @property
    def objective_label(self) -> str | None:
        """The first objective's name."""
        return self._objectives[0] if self._objectives else None


def short(settings: Mapping[str, Any]) -> str:
    """Settings on one line, without their sections."""
    values = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in settings.values())
    return " ".join(f"{path.rpartition('.')[2]}={value}" for path, value in zip(settings, values))


def run_trials(
    session: Session,
    settings: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    orders: Sequence[OrderWork],
    watcher: Watcher,
    run_name: str,
    searcher: StudySearcher | None = None,
    samples: int = 1,
    scheduler: TrialScheduler | None = None,
) -> None:
    """Run trials through Tune until all have ended.

    With a searcher: ``samples`` trials, each a suggested setting over all orders, or over fewer if the scheduler stops
    it. Without: each given setting; one trial over all orders where there are lanes, which share them, else a trial for
    each shard of them.

    Raises:
        KeyboardInterrupt: the user stopped; finished stages are in the store.
    """
    resources, workers = session.study.resources, watcher.workers
    assert workers is not None
    lanes = workers.lanes
    given = [dict(one) for one in ([settings] if isinstance(settings, Mapping) else settings)]
    config: dict[str, Any] = {} if searcher is not None else {"settings": tune.grid_search(given)}
    if lanes is not None:
        objective = session.study.search.objective.model_dump(mode="json")
        config |= {"pool": lanes.name, "objective": objective, "orders": [asdict(work) for work in orders]}
        asked: dict[str, float] = {"CPU": 0, "memory": 1024**2}  # the trial only asks and tells; lanes hold the CPUs
    else:
        parts = [orders] if searcher is not None else shards(orders, resources.concurrent_trials)
        config |= {"payload": session.payload(), "lists": [[asdict(work) for work in part] for part in parts]}
        if searcher is None:
            config["shard"] = tune.grid_search(list(range(len(parts))))
        asked = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    tuner = tune.Tuner(
        tune.with_resources(inline_trial if lanes is None else lane_trial, asked),
        param_space=config,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=samples if searcher is not None else 1,
            max_concurrent_trials=resources.concurrent_trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=run_name,
            storage_path=str(workers.storage),
            callbacks=[watcher],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.max_failures if lanes is None else 0),
            checkpoint_config=tune.CheckpointConfig(),
        ),
    )
    tuner.fit()


def shards(orders: Sequence[OrderWork], count: int) -> list[list[OrderWork]]:
    """Orders dealt to at most ``count`` lists; orders that begin alike stay together, so each prefix is walked once."""
    ordered = sorted(orders, key=lambda work: work.order)
    size = -(-len(ordered) // max(1, min(count, len(ordered))))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
