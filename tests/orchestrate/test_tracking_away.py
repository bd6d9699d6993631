"""MLflow as a real server: reached, unreachable, killed in the middle and back again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from loda.errors import ConfigError
from loda.settings import RunSettings
from orchestrate import tracking_delivery
from orchestrate.redaction import redact
from orchestrate.tracking import Tracker
from orchestrate.tracking_uri import is_server, tracking_uri, ui_command, ui_environment
from tests.orchestrate.tracked import PARAMS, Learned, assert_complete, learn_two_orders, log_order, log_study


@pytest.fixture(scope="module")
def learned(tiny_settings: Callable[..., RunSettings]) -> Learned:
    return learn_two_orders(tiny_settings(method={"energy_general": 0.8}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose database exists: making one takes seconds."""
    cwd = tmp_path_factory.mktemp("tracking")
    Tracker.open(None, "warm-up", cwd).close()
    return cwd


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.mark.parametrize("what", ["refuses", "silent", "not_mlflow", "folder"])
def test_an_unusable_store_is_a_clear_error_within_seconds(what: str, tmp_path: Path) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    uri = f"http://user:hunter2@127.0.0.1:{listener.getsockname()[1]}"
    if what == "silent":
        listener.listen()
    elif what == "not_mlflow":
        uri = "sqlite:///" + str(tmp_path / "notes.db")
        (tmp_path / "notes.db").write_text("no database at all, but long enough to be read as one" * 30)
    elif what == "folder":
        uri = f"sqlite:///{tmp_path}"
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        Tracker.open(uri, "x", tmp_path)
    listener.close()
    assert time.monotonic() - started < 20
    (problem,) = caught.value.problems
    assert problem.startswith(f"tracking.uri: MLflow at {redact(uri)} can't be used")
    assert "set tracking.uri to null" in problem
    assert "hunter2" not in problem


def test_a_deleted_experiment_is_a_clear_error(store: Path, experiment: str) -> None:
    tracker = Tracker.open(None, experiment, store)
    MlflowClient(tracker.uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(ConfigError, match=r"was deleted in MLflow.*mlflow experiments restore"):
        Tracker.open(None, experiment, store)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A real ``mlflow server`` over a SQLite file, started as ``orchestrate ui`` starts it."""

    cwd: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ui_command(tracking_uri(None, self.cwd), self.port)
        log = (self.cwd / "server.log").open("ab")
        environment = {**os.environ, **ui_environment()}
        self.process = subprocess.Popen(
            command, cwd=self.cwd, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self.cwd / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its workers, nobody else
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    running = Server(store, free_port())
    try:
        running.start()
        yield running
    finally:
        running.kill()


def test_a_server_takes_the_same_study(server: Server, experiment: str, learned: Learned, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with Tracker.open(server.uri, experiment, tmp_path) as tracker:
        study = log_study(tracker, learned)
        assert tracker.register(study, tmp_path, "served-loda") == "1"
    assert is_server(tracker.uri)
    assert_complete(tracker, learned)
    address = f"{server.uri}/#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning"
    assert tracker.page(5000) == address
    with urllib.request.urlopen(server.uri, timeout=5) as page:
        assert b"<html" in page.read()


def test_what_is_logged_while_the_server_is_away_arrives_later(
    server: Server,
    experiment: str,
    learned: Learned,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # However long the server takes to start on a busy machine, it isn't asked again before the end.
    monkeypatch.setattr(tracking_delivery, "RETRY_SECONDS", 3600.0)
    waiting = tmp_path / "waiting.jsonl"
    tracker = Tracker.open(server.uri, experiment, tmp_path, spool=waiting)
    study = tracker.study_run("shapes", "d1", PARAMS)
    trial = tracker.trial_run("t001", {})
    log_order(tracker, trial, learned, "tune-0", stages=1)
    server.kill()
    with caplog.at_level(logging.INFO):
        started = time.monotonic()
        log_order(tracker, trial, learned, "tune-0")
        log_order(tracker, trial, learned, "tune-1")
        tracker.end(trial, "FINISHED", {"objective": 50.0})
        assert time.monotonic() - started < 10
        assert caplog.text.count("is away") == 1
        assert (
            len(waiting.read_text().splitlines()) == 12
        )  # tune-0: 3 stages, matrix, end; tune-1: its run and the same; the trial's end
        server.start()
        tracker.end(study, "FINISHED", {"best_objective": 50.0})  # too early to ask again: it waits, too
        tracker.close()
    assert "sent 13 operations" in caplog.text
    assert not waiting.exists()
    assert_complete(tracker, learned)


def test_what_still_waits_at_the_end_is_sent_when_the_study_is_opened_again(
    server: Server, experiment: str, learned: Learned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = tmp_path / "waiting.jsonl"
    tracker = Tracker.open(server.uri, experiment, tmp_path, spool=waiting)
    server.kill()
    log_study(tracker, learned)
    tracker.close()
    assert f"operations wait in {waiting}" in caplog.text
    with waiting.open("a") as file:
        file.write('{"do": "end", "key": "torn')  # the process was killed as it wrote
    server.start()
    again = Tracker.open(server.uri, experiment, tmp_path, spool=waiting)
    again.close()
    assert not waiting.exists()
    assert_complete(again, learned)


def test_operations_that_were_sent_but_not_yet_forgotten_do_no_harm(
    store: Path, experiment: str, learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after it has sent what waited and before it has emptied the file."""
    waiting = tmp_path / "waiting.jsonl"
    tracker = Tracker.open(None, experiment, store, spool=waiting)
    with monkeypatch.context() as patch:
        patch.setattr(tracker._store, "perform", _away)
        log_study(tracker, learned)
    lines = waiting.read_text()
    Tracker.open(None, experiment, store, spool=waiting).close()
    assert not waiting.exists()
    waiting.write_text(lines)
    Tracker.open(None, experiment, store, spool=waiting).close()
    assert_complete(tracker, learned)


def _away(*_: object, **__: object) -> None:
    raise ConnectionError("the network is away")
