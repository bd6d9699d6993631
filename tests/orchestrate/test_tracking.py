"""MLflow tracking on a real SQLite store: structure, histories, resuming, secrets."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image

from loda.settings import RunSettings
from orchestrate.tracking import Tracker
from orchestrate.tracking_uri import tracking_uri
from tests.orchestrate.tracked import (
    ORDERS,
    PARAMS,
    Learned,
    assert_complete,
    history,
    learn_two_orders,
    log_study,
    runs_of,
)


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


def test_runs_are_nested_and_hold_every_number_once(store: Path, experiment: str, learned: Learned) -> None:
    with Tracker.open(None, experiment, store) as tracker:
        log_study(tracker, learned)
    assert tracker.uri == f"sqlite:///{store}/mlflow.db"
    assert_complete(tracker, learned)
    runs = runs_of(tracker)
    parent = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    assert parent["shapes"] is None
    assert parent["t001"] == runs["shapes"].info.run_id
    assert parent["tune-0"] == parent["tune-1"] == runs["t001"].info.run_id
    study = runs["shapes"]
    assert study.data.params["method.rank_general"] == "4"
    assert study.data.params["backbone.target"] == '["attn.qkv"]'
    assert study.data.tags["backbone_digest"] == learned.bench.backbone.digest
    assert study.inputs is not None
    assert study.inputs.dataset_inputs[0].dataset.digest == learned.bench.dataset.digest[:36]
    assert not (store / "mlflow-waiting.jsonl").exists()


def test_an_order_shows_layers_tasks_seconds_and_the_machine(store: Path, experiment: str, learned: Learned) -> None:
    with Tracker.open(None, experiment, store) as tracker:
        log_study(tracker, learned)
    run = runs_of(tracker)["tune-1"]
    metrics = run.data.metrics
    adapt = learned.stages["tune-1"][2]["adapt"]
    for layer, rank in adapt.meta["facts"]["rank_general"].items():
        assert metrics[f"rank_general/{layer}"] == rank
        assert 0 < metrics[f"energy_general/{layer}"] <= 1
    last_row = learned.results["tune-1"].accuracy_matrix[-1]
    for index, expected in zip(ORDERS["tune-1"], last_row, strict=True):
        assert metrics[f"accuracy_on/{index} {learned.names[index]}"] == pytest.approx(expected)
    assert metrics["seconds/adapt"] == adapt.timings["seconds"]
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert run.data.params["order"] == "2,0,1"


def test_artifacts_can_be_opened(store: Path, experiment: str, learned: Learned, tmp_path: Path) -> None:
    with Tracker.open(None, experiment, store) as tracker:
        log_study(tracker, learned)
    client, runs = MlflowClient(tracker.uri, tracker.uri), runs_of(tracker)
    table = pq.read_table(
        client.download_artifacts(runs["tune-1"].info.run_id, "accuracy_matrix.parquet", str(tmp_path))
    )
    matrix = np.full((3, 3), np.nan)
    for row in table.to_pylist():
        matrix[row["after"] - 1, ORDERS["tune-1"].index(row["task"])] = row["accuracy"]
        assert row["task_name"] == learned.names[row["task"]]
    np.testing.assert_array_equal(matrix, learned.results["tune-1"].accuracy_matrix)
    picture = client.download_artifacts(runs["tune-1"].info.run_id, "accuracy_matrix.png", str(tmp_path))
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 200
    software = client.download_artifacts(runs["shapes"].info.run_id, "software.json", str(tmp_path))
    assert {"python", "torch", "timm", "ray", "mlflow"} <= set(json.loads(Path(software).read_text()))
    assert (store / "mlartifacts").is_dir()


def test_a_resumed_study_continues_its_runs(store: Path, experiment: str, learned: Learned) -> None:
    with Tracker.open(None, experiment, store) as tracker:
        log_study(tracker, learned, stages=2)
    first = {name: run.info.run_id for name, run in runs_of(tracker).items()}
    with Tracker.open(None, experiment, store) as again:
        log_study(again, learned)
    assert {name: run.info.run_id for name, run in runs_of(again).items()} == first
    assert_complete(again, learned)


def test_logging_all_of_it_twice_changes_nothing(store: Path, experiment: str, learned: Learned) -> None:
    for _ in range(2):
        with Tracker.open(None, experiment, store) as tracker:
            log_study(tracker, learned)
    assert_complete(tracker, learned)


def test_a_killed_run_is_running_again_after_a_resume(store: Path, experiment: str) -> None:
    with Tracker.open(None, experiment, store) as tracker:
        tracker.end(tracker.study_run("shapes", "d1", PARAMS), "KILLED")
    assert runs_of(tracker)["shapes"].info.status == "KILLED"
    with Tracker.open(None, experiment, store) as tracker:
        tracker.study_run("shapes", "d1", {**PARAMS, "resources": {"workers": 2}})
    run = runs_of(tracker)["shapes"]
    assert run.info.status == "RUNNING"
    assert run.data.params["resources.workers"] == "2"


def test_another_study_file_is_another_run(store: Path, experiment: str) -> None:
    with Tracker.open(None, experiment, store) as tracker:
        first, second = tracker.study_run("shapes", "d1", PARAMS), tracker.study_run("shapes", "d2", PARAMS)
        assert tracker.run_id(first) != tracker.run_id(second)


def test_long_and_many_parameters_are_logged(store: Path, experiment: str) -> None:
    params = {f"section.key_{index}": index for index in range(250)} | {"long": "x" * 10_000}
    with Tracker.open(None, experiment, store) as tracker:
        tracker.study_run("shapes", "d1", params)
    logged = runs_of(tracker)["shapes"].data.params
    assert len(logged) == 251
    assert logged["long"] == "x" * 6000


def test_more_metrics_than_a_call_takes_are_logged_once(store: Path, experiment: str) -> None:
    metrics = {f"energy_general/layer_{index}": index / 2500 for index in range(2500)}
    for _ in range(2):
        with Tracker.open(None, experiment, store) as tracker:
            run = tracker.study_run("shapes", "d1", {})
            tracker.log_stage(run, 1, metrics | {"broken": float("nan")})
    found = runs_of(tracker)["shapes"]
    assert metrics.items() <= found.data.metrics.items()
    assert "broken" not in found.data.metrics
    for name in ("energy_general/layer_0", "energy_general/layer_1700", "energy_general/layer_2499"):
        assert len(history(tracker, found, name)) == 1


def test_a_model_is_registered_once_under_its_alias(store: Path, experiment: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    versions = []
    for _ in range(2):
        with Tracker.open(None, experiment, store) as tracker:
            study = tracker.study_run("shapes", "d1", PARAMS)
            versions.append(tracker.register(study, tmp_path, "shapes-loda", tags={"trial": "t001"}))
    assert versions == ["1", "1"]
    (tmp_path / "config.json").write_text('{"other": 1}')
    with Tracker.open(None, experiment, store) as tracker:
        assert tracker.register(tracker.study_run("shapes", "d1", PARAMS), tmp_path, "shapes-loda") == "2"
    client = MlflowClient(tracker.uri, tracker.uri)
    chosen = client.get_model_version_by_alias("shapes-loda", "chosen")
    run_id = runs_of(tracker)["shapes"].info.run_id
    assert (str(chosen.version), chosen.source) == ("2", f"runs:/{run_id}/model")
    files = [entry.path for entry in client.list_artifacts(run_id, "model")]
    assert sorted(files) == ["model/config.json", "model/model.safetensors"]


def test_what_mlflow_refuses_is_kept_aside_and_stops_nothing(
    store: Path, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker.open(None, experiment, store, spool=tmp_path / "waiting.jsonl") as tracker:
        study = tracker.study_run("shapes", "d1", PARAMS)
        assert tracker.register(study, tmp_path / "nothing", "no-model") is None
        tracker.log_stage(study, 1, {"accuracy_seen": 1.0})
        tracker.end(study)
    assert "MLflow refused 'register'" in caplog.text
    assert "no model files" in caplog.text
    kept = [json.loads(line) for line in (tmp_path / "waiting-refused.jsonl").read_text().splitlines()]
    assert [operation["do"] for operation in kept] == ["register"]
    assert history(tracker, runs_of(tracker)["shapes"], "accuracy_seen") == [(1, 1.0)]


def test_passwords_reach_neither_parameters_nor_files(
    store: Path, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter4")
    secret = "http://me:hunter2@host:5000/x?token=hunter3"
    with Tracker.open(None, experiment, store) as tracker:
        study = tracker.study_run("shapes", "d1", {"tracking": {"uri": secret}}, {"where": secret})
        tracker.log_setup(study, f"tracking:\n  uri: {secret}\n")
        tracker.log_data(study, "images", "0" * 64, secret)
    run = runs_of(tracker)["shapes"]
    assert run.data.params["tracking.uri"] == "http://***@host:5000/x?token=***"
    assert run.inputs is not None
    stored = [run.data.tags["where"], run.inputs.dataset_inputs[0].dataset.source]
    yaml_file = MlflowClient(tracker.uri).download_artifacts(run.info.run_id, "study.yaml", str(tmp_path))
    stored.append(Path(yaml_file).read_text())
    assert not any("hunter" in text for text in stored)
    assert b"hunter" not in (store / "mlflow.db").read_bytes()


def test_the_git_commit_is_a_tag(store: Path, experiment: str, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    uri = tracking_uri(None, store)
    with Tracker.open(uri, experiment, tmp_path) as tracker:
        tracker.study_run("shapes", "d1", PARAMS)
    assert runs_of(tracker)["shapes"].data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
