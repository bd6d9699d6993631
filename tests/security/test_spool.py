"""What waits for MLflow in a run folder that somebody else wrote to: only what we could have written is sent."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loda.errors import ConfigError
from loda.reading import ReadingError
from orchestrate.operations import checked_operation
from orchestrate.spool import Spool
from orchestrate.tracking import Tracker
from orchestrate.tracking_delivery import Delivery

B64 = base64.b64encode(b"content").decode()
SOUND: dict[str, dict[str, Any]] = {
    "run": {"parent": None, "name": "n", "tags": {"a": "b"}, "params": {"c": "d"}, "time": 1},
    "describe": {"text": "t"},
    "metrics": {"metrics": [["a", 0.5, 1, 2], ["b", 1, 1, 2]]},
    "files": {"folder": "figures", "files": {"a.png": B64}},
    "data": {"name": "n", "digest": "d", "source": "s", "context": "training"},
    "best": {"trial": "digest/trial-0001"},
    "end": {"status": "FINISHED", "metrics": {"a": 1.0}, "tags": {"a": "b"}, "time": 1},
}


def operation(do: str, /, **changes: Any) -> dict[str, Any]:
    return {"do": do, "key": "digest", **SOUND[do], **changes}


class Remembered:
    """A store that only remembers what it was asked to do."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    def perform(self, operation: dict[str, Any], again: bool = False) -> None:
        self.done.append(operation)


@pytest.fixture
def replay(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Put lines into a spool and open it, as a study that is resumed does; what was done."""

    def run(*lines: Any) -> list[dict[str, Any]]:
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / "mlflow-waiting.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
        store: Any = Remembered()
        Delivery(store, "http://127.0.0.1:1", tmp_path / "mlflow-waiting.jsonl").flush()
        return store.done

    return run


@pytest.mark.parametrize("do", SOUND)
def test_every_operation_of_ours_is_replayed_as_it_was(replay: Callable[..., list[Any]], do: str) -> None:
    assert replay(operation(do)) == [operation(do)]


HOSTILE: dict[str, dict[str, Any]] = {
    "a file name with ..": operation("files", files={"../../.bashrc": B64}),
    "an absolute file name": operation("files", files={"/etc/cron.d/x": B64}),
    "a folder with ..": operation("files", folder="../../other-run"),
    "an absolute folder": operation("files", folder="/etc"),
    "content that isn't base 64": operation("files", files={"a.png": "not base 64!"}),
    "an unknown operation": operation("data", do="delete_experiment"),
    "a method of the store": operation("data", do="__class__"),
    "an operation of another kind": operation("data", do=["data"]),
    "a key that ends the filter": operation("best", trial="x' OR tags.best = 'true"),
    "a key with a quote": operation("end", key="x' OR '1'='1"),
    "a field more": operation("data", run_id="0123"),
    "a field less": {"do": "data", "key": "k"},
    "a tag of another kind": operation("run", tags={"a": ["b"]}),
    "a status of its own": operation("end", status="DELETED"),
    "a metric that is text": operation("metrics", metrics=[["a", "1", 1, 2]]),
    "a metric too short": operation("metrics", metrics=[["a", 1.0]]),
    "a step that is true": operation("metrics", metrics=[["a", 1.0, 1, True]]),
    "a time without end": operation("run", time=10**30),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_anything_else_is_kept_aside_and_the_rest_is_sent(
    replay: Callable[..., list[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    before, after = operation("describe", text="before"), operation("describe", text="after")
    assert replay(before, HOSTILE[what], after) == [before, after]
    (refused,) = (tmp_path / "mlflow-waiting-refused.jsonl").read_text().splitlines()
    assert json.loads(json.loads(refused)["line"]) == HOSTILE[what]
    assert "line 2 is not sent" in caplog.text
    assert not (tmp_path / "mlflow-waiting.jsonl").exists()


@pytest.mark.parametrize("line", [b"[" * 10**5, b"7", b"null", b"\xff\xfe", b'{"do": 1e999}', b'"do"', b"{" * 9])
def test_lines_that_are_no_objects(replay: Callable[..., list[Any]], tmp_path: Path, line: bytes) -> None:
    assert replay(operation("best"), line, operation("end")) == [operation("best"), operation("end")]
    assert (tmp_path / "mlflow-waiting-refused.jsonl").is_file()


def registration(directory: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"do": "register", "key": "digest", "name": "tiny-merged", "alias": "chosen", "tags": {}}
    return {**fixed, "directory": str(directory), **changes}


def test_no_file_from_elsewhere_is_uploaded_as_a_model(replay: Callable[..., list[Any]], tmp_path: Path) -> None:
    home, model = tmp_path.parent / f"{tmp_path.name}-home", tmp_path / "model"
    home.mkdir()
    (home / "id_ed25519").write_text("secret")
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    assert replay(registration(model)) == [registration(model)]
    assert replay(registration(home), registration(tmp_path / ".." / home.name), registration(Path("/"))) == []
    (tmp_path / "linked").symlink_to(home)
    assert replay(registration(tmp_path / "linked")) == []
    (model / "config.json").symlink_to(home / "id_ed25519")
    assert replay(registration(model)) == []
    with pytest.raises(ReadingError, match="name"):
        checked_operation(registration(tmp_path, name="x' OR name = 'y"), tmp_path)


def test_what_the_tracker_writes_has_the_form(tmp_path: Path) -> None:
    """Every kind of operation, from the tracker's own methods; the form must not be narrower than they are."""
    import numpy as np

    store: Any = Remembered()
    tracker = Tracker(store, "http://127.0.0.1:1", tmp_path, tmp_path / "waiting.jsonl")
    study = tracker.study_run("tiny", "0" * 64, {"a": {"b": [1, None]}}, {"data_digest": "x"})
    trial = tracker.trial_run("trial-0001", {"training.lr": 0.1})
    order = tracker.order_run(trial, "evaluate-2-0-1", (2, 0, 1), title="a title (chosen)")
    tracker.log_stage(order, 1, {"accuracy on/ü": 1, "seconds": np.float64(0.5)}, [0.5, float("nan")])
    tracker.log_matrix(order, np.eye(3), (2, 0, 1), ["a", "b", "c"])
    tracker.log_files(study, {"ü.txt": "text", "b": b"bytes"}, "figures")
    tracker.log_setup(study, "name: tiny")
    tracker.log_data(study, "tiny", "0" * 64, "parquet:/data")
    tracker.describe(None, "text")
    tracker.describe(study, "text")
    tracker.mark_best("trial-0001")
    tracker.end(trial, "KILLED", {"a": np.float32(1)}, {"reason": "stopped"})
    (tmp_path / "model").mkdir()
    tracker.register(study, tmp_path / "model", "tiny-merged")
    assert {done["do"] for done in store.done} == {*SOUND, "register"}
    for done in store.done:
        read_back = json.loads(json.dumps(done))
        assert checked_operation(read_back, tmp_path) == read_back


@pytest.mark.timeout(20)
def test_a_spool_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert len(Spool(tmp_path / "pipe.jsonl")) == 0  # no file, so nothing waits
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.jsonl").touch()
    os.truncate(tmp_path / "large.jsonl", 2**30 + 1)
    with pytest.raises(ConfigError, match=r"large\.jsonl can't be read: 1,073,741,825 bytes"):
        Spool(tmp_path / "large.jsonl")
