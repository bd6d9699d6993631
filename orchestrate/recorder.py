"""Write to MLflow what trials report: study -> trial -> order runs, a step for each task. The driver's only writer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrate.measurements import epoch_losses, git_commit, software, stage_metrics
from orchestrate.notes import experiment_note, study_note
from orchestrate.results import OrderResult
from orchestrate.session import Session, write_atomic
from orchestrate.tracking import TrackedRun, Tracker

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class StoredStep:
    """Facts and timings of a stored step, without its tensors."""

    meta: Mapping[str, Any]
    timings: Mapping[str, float]


def write_provenance(session: Session) -> None:
    """``provenance.json`` in the run folder: the versions and digests with which the study was last started."""
    bench = session.bench
    values = {
        "data_digest": bench.dataset.digest,
        "backbone_digest": bench.backbone.digest,
        "git_commit": git_commit(Path.cwd()),
        "software": software(),
    }
    write_atomic(session.folder / "provenance.json", json.dumps(values, indent=1))


class Recorder:
    """One study's runs in MLflow.

    Args:
        session: the study, opened.
        tracker: MLflow, opened and reachable.
    """

    def __init__(self, session: Session, tracker: Tracker) -> None:
        self.session, self.tracker = session, tracker
        study, bench = session.study, session.bench
        self.study_run = tracker.study_run(
            study.name,
            study.digest,
            {key: value for key, value in study.resolved().items() if key != "robustness"},  # its runs have their own
            {
                "backbone_digest": bench.backbone.digest,
                "data_digest": bench.dataset.digest,
                **self._tags("study"),
            },
        )
        tracker.describe(self.study_run, study_note(study, None))
        tracker.describe(None, experiment_note(study, tracker.experiment_id, None))
        tracker.log_setup(self.study_run, study.to_yaml())
        write_provenance(session)
        tracker.log_data(self.study_run, bench.dataset.name, bench.dataset.digest, study.stream.dataset)
        self._trials: dict[str, TrackedRun] = {}
        self._orders: dict[tuple[str, str], TrackedRun] = {}
        self._evaluations: dict[tuple[str, str], list[StoredStep]] = {}
        self._done: set[tuple[str, str]] = set()
        self._own_tags: dict[str, dict[str, str]] = {}

    def trial(self, trial: str, settings: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> TrackedRun:
        """The trial's run, made at its first mention; ``tags`` add to what all its runs are filtered by."""
        if trial not in self._trials:
            self._own_tags[trial] = self._tags(trial) | dict(tags or {})
            self._trials[trial] = self.tracker.trial_run(trial, settings, self._own_tags[trial])
        return self._trials[trial]

    def _tags(self, trial: str) -> dict[str, str]:
        """What runs are filtered by; ``trial`` is "study" for the study's own run."""
        orders = self.session.study.orders
        phase = {"study": "study", "chosen": "evaluation"}.get(trial, "search")
        tags = {"phase": phase, "method": self.session.study.method.name, "order_design": orders.design}
        tags["order_kind"] = orders.kind
        return tags if trial == "study" else tags | {"trial": trial}

    def stage(self, trial: str, settings: Mapping[str, Any], order: tuple[int, ...], event: Mapping[str, Any]) -> None:
        """A finished stage, from the keys that a worker reported; numbers come from the store."""
        steps = {
            record["step"]: StoredStep(
                self.session.store.meta(record["key"]) or {}, self.session.store.timings(record["key"]) or {}
            )
            for record in event["steps"]
        }
        if not steps["evaluate"].meta:
            return  # damaged since: it is recomputed by whoever needs it, and logged then
        name = (trial, event["order"])
        run = self.trial(trial, settings)
        if name not in self._orders:
            title = f"{event['order']} ({trial})"  # MLflow's charts show nothing else of a run
            self._orders[name] = self.tracker.order_run(
                run, event["order"], order, title=title, tags=self._own_tags[trial]
            )
        evaluations = self._evaluations.setdefault(name, [])
        if event["position"] == 0:
            evaluations.clear()  # a worker group that was started again walks its orders from the start
        evaluations.append(steps["evaluate"])
        metrics = stage_metrics(steps, evaluations, order, self.session.task_names)
        self.tracker.log_stage(self._orders[name], event["position"] + 1, metrics, epoch_losses(steps))

    def order_done(self, one: OrderResult, heatmap: bool) -> None:
        """An order's matrix and final metrics."""
        run = self._orders.get((one.trial, one.work.name))
        if run is None:
            return
        self._done.add((one.trial, one.work.name))
        matrix = one.result.accuracy_matrix
        if matrix.shape[0] == matrix.shape[1]:
            self.tracker.log_matrix(run, matrix, one.work.order, self.session.task_names, heatmap=heatmap)
        summary = one.result.summary
        finals = {"a_last": summary.a_last, "a_last_macro": summary.a_last_macro, "a_avg": summary.a_avg}
        optional = {"bwt": summary.bwt, "fwt": summary.fwt, "forgetting": summary.forgetting}
        finals |= {f"final/{key}": value for key, value in optional.items() if value is not None}
        self.tracker.end(run, metrics=finals, tags={"state_digest": one.result.state_digest})

    def trial_done(self, trial: str, status: RunStatus, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """A trial's end: FINISHED, FAILED or KILLED; its orders that never ended go with it."""
        run = self._trials.get(trial)
        if run is not None:
            if status != "FINISHED":
                for key, order_run in self._orders.items():
                    if key[0] == trial and key not in self._done:
                        self.tracker.end(order_run, status)
            self.tracker.end(run, status, metrics=dict(metrics), tags=dict(tags))

    def finish(
        self,
        metrics: Mapping[str, float],
        files: Mapping[str, bytes | str],
        model: Path | None,
        values: Mapping[str, Any],
        pages: Sequence[Path] = (),
    ) -> str | None:
        """The study's end.

        Args:
            metrics: of the study as a whole.
            files: tables and documents.
            model: folder of the merged model; None: nothing is registered.
            values: the document that becomes ``summary.json``, for the descriptions.
            pages: the report and its figures.

        Returns:
            The registered model's version.
        """
        self.tracker.log_files(self.study_run, dict(files))
        figures = {page.name: page.read_bytes() for page in pages if page.suffix == ".png"}
        reports = {page.name: page.read_bytes() for page in pages if page.suffix != ".png"}
        for folder, found in ((None, reports), ("figures", figures)):
            if found:
                self.tracker.log_files(self.study_run, found, folder)
        study = self.session.study
        tags = {}
        if "best" in values:
            tags["best_trial"] = f"trial-{values['best']['trial']:04d}"
            self.tracker.mark_best(tags["best_trial"])
        self.tracker.describe(self.study_run, study_note(study, values))
        self.tracker.describe(None, experiment_note(study, self.tracker.experiment_id, values))
        version = None
        if model is not None:
            version = self.tracker.register(self.study_run, model, f"{study.name}-merged")
        self.tracker.end(self.study_run, metrics=dict(metrics), tags=tags)
        return version
