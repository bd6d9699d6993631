"""Find out at start, within seconds, whether an MLflow store can be used, and make it ready."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loda.errors import ConfigError
from orchestrate.redaction import redact
from orchestrate.tracking_store import MlflowClient, MlflowException
from orchestrate.tracking_uri import is_server

PROBE_SECONDS = 5
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def open_experiment(uri: str, name: str, cwd: Path) -> tuple[MlflowClient, str]:
    """A client of the store and the experiment's id; creates database and experiment if they aren't there.

    Creating a SQLite database takes about 5 s, and processes that do it at once break each other's: call this in one
    process, before any other opens the store.

    Raises:
        ConfigError: unreachable, not writable, not MLflow, or an experiment of this name was deleted; names the URI.
    """
    _check_reachable(uri)
    # A later call that fails is kept and repeated later; MLflow's own retries, minutes of them, would stop training.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else a line for each of 60 migrations
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    try:
        with _impatient():
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                location = None if is_server(uri) else (cwd.absolute() / "mlartifacts").as_uri()
                try:
                    return client, client.create_experiment(name, artifact_location=location)
                except MlflowException:
                    experiment = client.get_experiment_by_name(name)  # somebody else was quicker
                    if experiment is None:
                        raise
    except Exception as error:
        raise ConfigError(_unreachable(uri, str(error))) from error
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment: {name!r} was deleted in MLflow at {redact(uri)}; restore it with "
            f"'mlflow experiments restore --experiment-id {experiment.experiment_id}', or set tracking.experiment to "
            "another name"
        )
    return client, experiment.experiment_id


def _unreachable(uri: str, reason: str) -> str:
    reason = redact(" ".join(reason.split()))[:300]
    return (
        f"tracking.uri: MLflow at {redact(uri)} can't be used ({reason}); start or repair it (a server: 'mlflow server "
        "--host HOST --port PORT'), or set tracking.uri to null for mlflow.db in the working directory"
    )


def _check_reachable(uri: str) -> None:
    """What MLflow itself would find out only after minutes of retries."""
    parts = urlsplit(uri)
    scheme = parts.scheme.split("+")[0]
    try:
        if scheme == "sqlite":
            path = Path(unquote(parts.path[1:]))  # sqlite:///relative or sqlite:////absolute
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=PROBE_SECONDS, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")  # the lock that writing takes: permissions alone don't tell
                database.execute("ROLLBACK")
        elif scheme in _PORTS and parts.hostname:
            socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), PROBE_SECONDS).close()
    except (OSError, ValueError, sqlite3.Error) as error:
        raise ConfigError(_unreachable(uri, str(error))) from error


@contextmanager
def _impatient() -> Iterator[None]:
    """No retries and a short timeout, which MLflow reads from the environment only."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PROBE_SECONDS)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
