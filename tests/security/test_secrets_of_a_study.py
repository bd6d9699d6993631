"""A whole study with a secret in the environment: it connects with it, and nothing that it leaves has it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.e2e.studies import call, write_study

SECRET = "hunter22-swordfish"


@pytest.fixture
def folder(tmp_path: Path, shapes_parquet: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study whose MLflow database lies where only the environment says."""
    monkeypatch.setenv("MLFLOW_DB_TOKEN", SECRET)
    uri = f"sqlite:///{tmp_path}/${{MLFLOW_DB_TOKEN}}/mlflow.db?api_key=${{MLFLOW_DB_TOKEN}}"
    write_study(tmp_path, shapes_parquet, orders={"evaluate": 1}, tracking={"uri": uri, "register_model": False})
    (tmp_path / SECRET).mkdir()
    (tmp_path / "mlflow.db").rename(tmp_path / SECRET / "mlflow.db")
    return tmp_path


def holders(folder: Path) -> list[str]:
    """Files that hold the secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != SECRET]
    return [str(path.relative_to(folder)) for path in files if SECRET.encode() in path.read_bytes()]


def test_nothing_that_a_study_leaves_holds_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ("run", "study.yaml", "--local", "--json"),
        ("show", "tiny"),
        ("report", "tiny"),
        ("doctor", "study.yaml"),
    ):
        done = call(folder, *words, patch=monkeypatch, capture=capsys)
        assert done.code == 0, done.err
        assert SECRET not in done.out + done.err
    assert holders(folder) == []
    assert "${MLFLOW_DB_TOKEN}" in (folder / "runs/tiny/study.yaml").read_text()
    assert "${MLFLOW_DB_TOKEN}" in (folder / "runs/tiny/summary.json").read_text()
    with sqlite3.connect(folder / SECRET / "mlflow.db") as database:  # it was written to
        params = dict(database.execute("select key, value from params where key like 'tracking%'").fetchall())
        texts = [value for table in ("params", "tags") for (value,) in database.execute(f"select value from {table}")]
    assert params["tracking.uri"].count("${MLFLOW_DB_TOKEN}") == 2
    assert not [text for text in texts if SECRET in text]


def test_a_variable_that_is_not_set_is_named_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_DB_TOKEN")
    done = call(folder, "run", "study.yaml", "--local", patch=monkeypatch, capture=capsys)
    assert done.code == 2
    assert "tracking.uri" in done.err
    assert "aren't set here: MLFLOW_DB_TOKEN" in done.err
    assert not list(folder.glob("stages/??"))


def test_a_secret_written_out_in_a_study_is_refused_and_not_repeated(
    folder: Path, shapes_parquet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images.parquet").write_bytes(shapes_parquet.read_bytes())
    (folder / f"{SECRET}.parquet").symlink_to(folder / "images.parquet")
    change = f"stream.dataset=parquet:{SECRET}.parquet"
    done = call(folder, "run", "study.yaml", "--local", "-s", change, patch=monkeypatch, capture=capsys)
    assert done.code == 2
    assert "stream.dataset: holds the value of the environment variable MLFLOW_DB_TOKEN" in done.err
    assert SECRET not in done.err
    done = call(
        folder, "run", "study.yaml", "-s", "tracking.uri=http://me:hunter33@h", patch=monkeypatch, capture=capsys
    )
    assert (done.code, "hunter33" in done.err) == (2, False)
    assert not (folder / "runs").exists()
