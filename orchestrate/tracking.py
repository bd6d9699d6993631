"""MLflow: study > trial > order runs, written by one process, the driver. MLflow's failures never stop a study."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrate.figures import accuracy_heatmap
from orchestrate.measurements import flat_params, git_commit, metric_name, software, system_metrics
from orchestrate.redaction import expand, redact
from orchestrate.tracking_delivery import Delivery
from orchestrate.tracking_open import open_experiment
from orchestrate.tracking_store import METRICS_PER_CALL, RunStore
from orchestrate.tracking_uri import is_server, tracking_uri, ui_url

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class TrackedRun:
    """A run by our own key (study digest, trial, order); MLflow's id may not be known yet while it is away."""

    key: str
    name: str


class Tracker:
    """Writes one study to MLflow. Use :meth:`open`; also a context manager that closes itself.

    Every method returns without an error when MLflow is away: operations then wait in order in a local file and are
    repeated once it answers, at :meth:`close`, or when the study is next opened. All can be repeated: runs are found by
    tags, and a metric that is there at some step isn't logged at that step again.
    """

    def __init__(self, store: RunStore, uri: str, cwd: Path, spool: Path) -> None:
        self.uri = uri
        self._store = store
        self._cwd = cwd
        self._delivery = Delivery(store, uri, spool)
        self._study: TrackedRun | None = None
        system_metrics()  # the first reading of the processor's load has nothing to compare with

    @classmethod
    def open(cls, uri: str | None, experiment: str, cwd: Path, *, spool: Path | None = None) -> Tracker:
        """Connect, creating database and experiment where they aren't there, and send what an earlier run left.

        Args:
            uri: a database or server; None: ``mlflow.db`` in ``cwd``, with files in ``mlartifacts`` beside it.
            experiment: its name.
            cwd: the working directory; also where the git commit is read.
            spool: where operations wait while MLflow is away; None: ``mlflow-waiting.jsonl`` in ``cwd``.

        Raises:
            ConfigError: the store can't be used; within seconds, naming it and what to do.
        """
        address = tracking_uri(uri if uri is None else expand(uri, "tracking.uri"), cwd)
        client, experiment_id = open_experiment(address, experiment, cwd)
        file = spool or cwd / "mlflow-waiting.jsonl"
        shown = address if uri is None else uri  # as it was written, ${NAME} and all
        tracker = cls(RunStore(client, experiment_id), shown, cwd.absolute(), file.absolute())
        tracker._delivery.flush()
        return tracker

    @property
    def experiment_id(self) -> str:
        return self._store.experiment_id

    def run_id(self, run: TrackedRun) -> str | None:
        """MLflow's id of a run; None while MLflow is away since before the run began."""
        return self._store.ids.get(run.key)

    def page(self, port: int) -> str:
        """The experiment's web page: on the server, or on ``port`` of this machine once the page is started there."""
        uri = expand(self.uri, "tracking.uri")
        return ui_url(uri if is_server(uri) else port, self.experiment_id)

    def study_run(
        self, study_name: str, study_digest: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> TrackedRun:
        """The outermost run of a study: all settings as parameters, the git commit as a tag.

        Args:
            study_name: shown as the run's name.
            study_digest: a study file with another digest is another run.
            params: nested or flat settings.
            tags: more facts, such as the digests of data and backbone.
        """
        commit = git_commit(self._cwd)
        own = {"mlflow.source.git.commit": commit} if commit else {}
        self._study = self._run(None, "study", study_digest, study_name, params, {**own, **(tags or {})})
        return self._study

    def trial_run(self, trial_id: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> TrackedRun:
        """A setting's run inside the study's.

        Raises:
            RuntimeError: before :meth:`study_run`.
        """
        if self._study is None:
            raise RuntimeError("trial_run: call study_run first")
        return self._run(self._study, "trial", trial_id, trial_id, params, {"trial": trial_id, **(tags or {})})

    def order_run(
        self,
        trial: TrackedRun,
        order_name: str,
        order: Sequence[int],
        *,
        title: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """One order's run inside its trial's; ``title`` is the name that people see, by default the order's."""
        params = {"order": ",".join(str(task) for task in order)}
        own = {"order": order_name, **(tags or {})}
        return self._run(trial, "order", order_name, title or order_name, params, own)

    def describe(self, run: TrackedRun | None, text: str) -> None:
        """The Markdown description of a run, or of the experiment (None). One that a person has edited stays."""
        self._delivery.submit("describe", "" if run is None else run.key, text=redact(text))

    def mark_best(self, trial_id: str) -> None:
        """Tag a trial of the study with ``best: true``, and take the tag from any other.

        Raises:
            RuntimeError: before :meth:`study_run`.
        """
        if self._study is None:
            raise RuntimeError("mark_best: call study_run first")
        self._delivery.submit("best", self._study.key, trial=f"{self._study.key}/{trial_id}")

    def _run(
        self,
        parent: TrackedRun | None,
        level: str,
        part: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> TrackedRun:
        part = re.sub(r"[^\w.\-]", "_", part)
        run = TrackedRun(part if parent is None else f"{parent.key}/{part}", name)
        always = {"mlflow.source.name": "orchestrate", "mlflow.source.type": "LOCAL"}
        always |= {"level": level, "state": "running"}
        self._delivery.submit(
            "run",
            run.key,
            parent=None if parent is None else parent.key,
            name=name,
            tags={key: redact(str(value)) for key, value in {**always, **tags}.items()},
            params={key: redact(value) for key, value in flat_params(params).items()},
            time=_now(),
        )
        return run

    def log_stage(
        self,
        run: TrackedRun,
        step: int,
        metrics: Mapping[str, float],
        losses: Sequence[float] = (),
        *,
        system: bool = True,
    ) -> None:
        """A stage's numbers in one call; a stage that is there already is left alone.

        Args:
            run: usually an order's; any other takes metrics by step, too.
            step: the 1-based position of the task.
            metrics: at least one; those that aren't finite are left out.
            losses: mean loss of each epoch, logged as ``loss`` with the epoch of the whole order as the step.
            system: add the machine's load.
        """
        now = _now()
        values = {**metrics, **(system_metrics() if system else {})}
        rows = [[metric_name(name), float(value), now, step] for name, value in values.items() if np.isfinite(value)]
        first_epoch = (step - 1) * len(losses) + 1
        rows += [["loss", float(loss), now, first_epoch + e] for e, loss in enumerate(losses) if np.isfinite(loss)]
        for start in range(0, len(rows), METRICS_PER_CALL):
            self._delivery.submit("metrics", run.key, metrics=rows[start : start + METRICS_PER_CALL])

    def log_matrix(
        self,
        run: TrackedRun,
        matrix: np.ndarray,
        order: Sequence[int],
        task_names: Sequence[str],
        *,
        heatmap: bool = True,
    ) -> None:
        """The accuracy matrix as Parquet (one row a cell: after, task, task_name, accuracy) and as a heat map.

        Args:
            run: an order's.
            matrix: (R, T) percent, NaN where there is none, as in ``SequenceResult``.
            order: (T,) the tasks' indices.
            task_names: names of all tasks of the stream, by index.
            heatmap: draw it, which takes 0.1 s.
        """
        names = [task_names[index] for index in order]
        cells = [(i + 1, order[j], names[j], float(v)) for (i, j), v in np.ndenumerate(matrix) if np.isfinite(v)]
        columns = zip(*cells, strict=True) if cells else ([], [], [], [])
        table = pa.table(dict(zip(("after", "task", "task_name", "accuracy"), map(list, columns), strict=True)))
        parquet = io.BytesIO()
        pq.write_table(table, parquet)
        files: dict[str, bytes | str] = {"accuracy_matrix.parquet": parquet.getvalue()}
        if heatmap:
            files["accuracy_matrix.png"] = accuracy_heatmap(matrix, names)
        self.log_files(run, files)

    def log_files(self, run: TrackedRun, files: Mapping[str, bytes | str], folder: str | None = None) -> None:
        """Small files by name; passwords in URIs in texts are left out."""
        contents = {name: redact(file).encode() if isinstance(file, str) else file for name, file in files.items()}
        encoded = {name: base64.b64encode(content).decode() for name, content in contents.items()}
        self._delivery.submit("files", run.key, folder=folder, files=encoded)

    def log_setup(self, run: TrackedRun, study_yaml: str) -> None:
        """The study file as resolved, and the versions of all that results can depend on."""
        versions = json.dumps(software(), indent=2) + "\n"
        self.log_files(run, {"study.yaml": study_yaml, "software.json": versions})

    def log_data(self, run: TrackedRun, name: str, digest: str, source: str, context: str = "training") -> None:
        """A dataset as the run's input; MLflow keeps the digest's first 36 characters."""
        self._delivery.submit("data", run.key, name=name, digest=digest, source=redact(source), context=context)

    def end(
        self,
        run: TrackedRun,
        status: Status = "FINISHED",
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Close a run with its final numbers; its tag ``state`` says how it ended, unless ``tags`` does."""
        finite = {metric_name(name): float(value) for name, value in (metrics or {}).items() if np.isfinite(value)}
        state = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[status]
        texts = {"state": state} | {key: redact(str(value)) for key, value in (tags or {}).items()}
        self._delivery.submit("end", run.key, status=status, metrics=finite, tags=texts, time=_now())

    def register(
        self,
        run: TrackedRun,
        directory: Path,
        name: str,
        *,
        alias: str = "chosen",
        tags: Mapping[str, str] | None = None,
    ) -> str | None:
        """Log a model's files under ``model`` and register them; equal files of the same run are registered once.

        Args:
            run: usually the study's.
            directory: ``model.safetensors`` and ``config.json``; must stay until MLflow has answered.
            name: of the registered model.
            alias: what the version is called from now on.
            tags: of the version.

        Returns:
            The version; None while MLflow is away.
        """
        values = {key: redact(str(value)) for key, value in (tags or {}).items()}
        return self._delivery.submit(
            "register", run.key, directory=str(directory.absolute()), name=name, alias=alias, tags=values
        )

    def close(self) -> None:
        """Send what waits; what can't be sent stays in its file for the next time."""
        self._delivery.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
