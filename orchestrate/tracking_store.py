"""One operation on an MLflow store, done so that doing it twice is the same as doing it once.

The one door to MLflow: it reads from the environment, as it is imported, whether to send usage data to its makers.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrate.spool import Operation
from orchestrate.tracking_uri import ui_environment

for _variable, _value in ui_environment().items():
    os.environ.setdefault(_variable, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID  # noqa: E402
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE as NOTE_TAG  # noqa: E402

__all__ = ["MlflowClient", "MlflowException", "RunStore"]

KEY_TAG = "orchestrate.key"
NOTE_DIGEST_TAG = "orchestrate.note"
MODEL_DIGEST_TAG = "orchestrate.digest"
PARAMS_PER_CALL = 100  # MLflow's limits
METRICS_PER_CALL = 1000
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
NAME_LENGTH = 250
DIGEST_LENGTH = 36


class RunStore:
    """Runs of one experiment, found by a key of ours (a tag), so that a resumed study finds its own.

    Args:
        client: explicit; nothing here uses MLflow's global state.
        experiment_id: where runs are made.
    """

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.ids: dict[str, str] = {}
        self._made_here: set[str] = set()  # runs that nobody wrote to before: no need to ask what they hold

    def perform(self, operation: Operation, again: bool = False) -> str | None:
        """Do one operation.

        Args:
            operation: as made by ``Tracker``; ``do`` names one of the methods below.
            again: it may have been done already, in full or in part.

        Returns:
            The version, for ``register``.
        """
        values = {key: value for key, value in operation.items() if key not in ("do", "key")}
        key = operation["key"]
        if operation["do"] == "run":
            self._run(key, again, **values)
            return None
        if operation["do"] == "describe":
            self._describe(key, **values)
            return None
        run_id = self.ids[key] if key in self.ids else self._found(key)
        again = again or key not in self._made_here
        if operation["do"] == "register":
            return self._register(run_id, **values)
        actions: dict[str, Callable[..., None]] = {
            "metrics": self._metrics,
            "files": self._files,
            "data": self._data,
            "best": self._best,
            "end": self._end,
        }
        actions[operation["do"]](run_id, again, **values)
        return None

    def _search(self, key: str) -> Run | None:
        # Quotes can't be in keys: study names, digests, trial numbers and order names have none.
        runs = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return runs[0] if runs else None

    def _found(self, key: str) -> str:
        run = self._search(key)
        if run is None:
            raise ValueError(f"MLflow has no run {key!r} in experiment {self.experiment_id}; was it deleted?")
        self.ids[key] = run.info.run_id
        return run.info.run_id

    def _run(
        self,
        key: str,
        again: bool,
        parent: str | None,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        time: int,
    ) -> None:
        if key in self.ids:
            return
        # A run that was just made for the first time can't have children yet.
        may_exist = again or parent is None or parent not in self._made_here
        run = self._search(key) if may_exist else None
        fresh = run is None
        if run is None:
            own = {KEY_TAG: key, **{k[:NAME_LENGTH]: v[:TAG_LENGTH] for k, v in tags.items()}}
            if parent is not None:
                own[MLFLOW_PARENT_RUN_ID] = self.ids[parent] if parent in self.ids else self._found(parent)
            run = self.client.create_run(self.experiment_id, start_time=time, tags=own, run_name=name)
        elif run.info.status in ("FAILED", "KILLED"):
            self.client.update_run(run.info.run_id, status="RUNNING")
        known = run.data.params  # MLflow refuses to change one: a resumed study keeps its first resources and paths
        new = [Param(k[:NAME_LENGTH], v[:PARAM_LENGTH]) for k, v in params.items() if k[:NAME_LENGTH] not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(run.info.run_id, params=new[start : start + PARAMS_PER_CALL])
        self.ids[key] = run.info.run_id
        if fresh:
            self._made_here.add(key)

    def _metrics(self, run_id: str, again: bool, metrics: list[list[Any]]) -> None:
        """One call; all of it is there when its first metric is, since a call is one transaction."""
        if not metrics:
            return
        if again:
            first, _, _, step = metrics[0]
            if any(seen.step == step for seen in self.client.get_metric_history(run_id, first)):
                return
        self.client.log_batch(run_id, metrics=[Metric(*metric) for metric in metrics])

    def _files(self, run_id: str, again: bool, folder: str | None, files: Mapping[str, str]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            for name, content in files.items():
                Path(temporary, name).write_bytes(base64.b64decode(content))
            self.client.log_artifacts(run_id, temporary, folder)

    def _data(self, run_id: str, again: bool, name: str, digest: str, source: str, context: str) -> None:
        dataset = Dataset(name, digest[:DIGEST_LENGTH], "local", source)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def _end(
        self, run_id: str, again: bool, status: str, metrics: Mapping[str, float], tags: Mapping[str, str], time: int
    ) -> None:
        known = self.client.get_run(run_id).data.metrics if again else {}
        new = [Metric(name, value, time, 0) for name, value in metrics.items() if known.get(name) != value]
        if new or tags:
            self.client.log_batch(run_id, metrics=new, tags=[RunTag(k, v[:TAG_LENGTH]) for k, v in tags.items()])
        self.client.set_terminated(run_id, status, time)

    def _describe(self, key: str, text: str) -> None:
        if not key:
            for name, value in _note(self.client.get_experiment(self.experiment_id).tags, text).items():
                self.client.set_experiment_tag(self.experiment_id, name, value)
            return
        run_id = self.ids[key] if key in self.ids else self._found(key)
        tags = _note(self.client.get_run(run_id).data.tags, text)
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _best(self, study_id: str, again: bool, trial: str) -> None:
        # Chosen first: a crash between the two leaves two, which the next run of the study mends, never none.
        best = self.ids[trial] if trial in self.ids else self._found(trial)
        self.client.set_tag(best, "best", "true")
        others = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{study_id}' AND tags.best = 'true'"
        for run in self.client.search_runs([self.experiment_id], others):
            if run.info.run_id != best:
                self.client.set_tag(run.info.run_id, "best", "false")

    def _register(self, run_id: str, directory: str, name: str, alias: str, tags: Mapping[str, str]) -> str:
        files = sorted(path for path in Path(directory).glob("*") if path.is_file())
        if not files:
            raise ValueError(f"{directory}: no model files to register")
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        own = {MODEL_DIGEST_TAG: digest.hexdigest(), **tags}
        self._registered_model(name)
        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.run_id == run_id and version.tags.get(MODEL_DIGEST_TAG) == own[MODEL_DIGEST_TAG]:
                break
        else:
            self.client.log_artifacts(run_id, directory, "model")
            version = self.client.create_model_version(name, f"runs:/{run_id}/model", run_id, tags=own)
        self.client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)

    def _registered_model(self, name: str) -> None:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _note(tags: Mapping[str, str], text: str) -> dict[str, str]:
    """Tags that describe a run or an experiment; none where a person has changed the description that we wrote."""
    there = tags.get(NOTE_TAG, "")
    if there and hashlib.sha256(there.encode()).hexdigest() != tags.get(NOTE_DIGEST_TAG):
        return {}
    text = text[:TAG_LENGTH]
    return {NOTE_TAG: text, NOTE_DIGEST_TAG: hashlib.sha256(text.encode()).hexdigest()}
