"""MLflow's addresses: the default store and the web page. Importing it is cheap."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from loda.errors import ConfigError
from orchestrate.redaction import literal_secret, redact

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def tracking_uri(uri: str | None, cwd: Path) -> str:
    """The tracking URI of a study; None is the SQLite file ``mlflow.db`` in ``cwd``.

    Raises:
        ConfigError: MLflow's file store or another form that can't hold a study; says what to give instead.
    """
    if uri is None:
        return f"sqlite:///{cwd.absolute() / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in ("http", "https", "databricks", *DATABASES) or uri == "databricks":
        return uri
    raise ConfigError(
        f"tracking.uri: {redact(uri)!r} is neither a database nor a server; give sqlite:////ABSOLUTE/PATH/mlflow.db, "
        "http://HOST:PORT of a running 'mlflow server', or null for mlflow.db in the working directory"
    )


def is_server(uri: str) -> bool:
    """Whether somebody else keeps the store and serves its page."""
    return urlsplit(uri).scheme in ("http", "https")


def ui_command(uri: str, port: int) -> list[str]:
    """What starts the web page of a database store, on this machine only (127.0.0.1).

    Raises:
        ConfigError: the URI is a server already, whose page is the URI itself.
    """
    if is_server(uri):
        raise ConfigError(f"tracking.uri: {redact(uri)} is a server already; open it in the browser")
    address = ["--host", "127.0.0.1", "--port", str(port)]
    # Everybody on this machine can read a process's command line: an address with a password goes by the environment.
    store = [] if literal_secret(uri) else ["--backend-store-uri", uri]
    # One process, since one person looks; the artifacts are absolute paths that it reads by itself.
    return [sys.executable, "-m", "mlflow", "server", *store, *address, "--workers", "1"]


def ui_environment(uri: str | None = None) -> dict[str, str]:
    """Environment variables to add when starting :func:`ui_command`: no telemetry, no job runner, the store."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return quiet if uri is None else {**quiet, "MLFLOW_BACKEND_STORE_URI": uri}


def ui_url(
    base: int | str,
    experiment_id: str,
    *,
    search: str | None = None,
    order_by: str | None = None,
    ascending: bool = False,
    run_id: str | None = None,
    charts: bool = False,
) -> str:
    """The page of an experiment or a run, in MLflow's classic view rather than the one for language models.

    Args:
        base: the port on this machine, or the address of a server; empty for a link on MLflow's own pages.
        experiment_id: MLflow's number of the experiment.
        search: a filter, such as ``tags.level = 'trial'``.
        order_by: a column, such as ``metrics.objective``; the largest first.
        ascending: the smallest first.
        run_id: a single run's page.
        charts: the runs' charts rather than their list.
    """
    root = f"http://127.0.0.1:{base}" if isinstance(base, int) else redact(base).rstrip("/")
    path = f"{root}{'/' if root else ''}#/experiments/{experiment_id}/runs"
    query = {"workflowType": "machine_learning"}
    if run_id is not None:
        path = f"{path}/{run_id}"
    if charts:
        query["compareRunsMode"] = "CHART"
    if search:
        query["searchFilter"] = search
    if order_by:
        query |= {"orderByKey": order_by, "orderByAsc": "true" if ascending else "false"}
    return f"{path}?{urlencode(query, quote_via=quote)}"
