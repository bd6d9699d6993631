"""A study small enough to be run again and again through the command line, and ways to run it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from orchestrate import cli
from tests.conftest import TINY_VIT

SEARCH_SPACE = {
    "method": "loda",
    "parameters": {
        "training.lr": {"type": "float", "low": 0.001, "high": 0.5, "log": True},
        "method.recalibration": {"type": "categorical", "choices": ["diagonal", "none"]},
    },
}
COMMAND = [sys.executable, "-m", "orchestrate.cli"]
TASKS = 3


def study_values(parquet: Path, **sections: Any) -> dict[str, Any]:
    """The tiny study; sections given by keyword are merged into it, one level deep."""
    values: dict[str, Any] = {
        "name": "tiny",
        "stream": {"dataset": f"parquet:{parquet}", "tasks": TASKS, "partition": "random", "validation": 0.25},
        "backbone": {**TINY_VIT, "target": ["attn.qkv", "mlp.fc2"]},
        "method": {"name": "loda", "rank_general": 4, "rank_isolated": 4, "rho_max": 0.02},
        "training": {"epochs": 1, "batch_size": 6, "lr": 0.004},
        "head": {"start": "class_means", "classifier": "lda"},
        "compute": {"device": "cpu", "threads": 1, "batch_size": 16},
        "orders": {"tune": 1, "evaluate": 2},
        "search": {"space": "space.yaml", "trials": 2},
        "resources": {"concurrent_trials": 1},
    }
    for name, given in sections.items():
        merged = isinstance(given, Mapping) and isinstance(values.get(name), Mapping)
        values[name] = {**values[name], **given} if merged else given
    return values


@functools.cache
def _empty_mlflow() -> bytes:
    """MLflow's SQLite file, made once: it takes seconds, and every folder needs one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{file}", f"sqlite:///{file}").search_experiments()
        return file.read_bytes()


def write_study(folder: Path, parquet: Path, *, mlflow: bool = True, **sections: Any) -> Path:
    """``study.yaml`` and its search space in a folder, with a prepared MLflow database unless that is not wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(SEARCH_SPACE, sort_keys=False))
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study_values(parquet, **sections), sort_keys=False))
    if mlflow and not (folder / "mlflow.db").exists():
        (folder / "mlflow.db").write_bytes(_empty_mlflow())
    return file


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def values(self) -> dict[str, Any]:
        """The one JSON document on stdout, of a command that succeeded."""
        assert self.code == 0, self.err[-3000:]
        return json.loads(self.out)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


def start(folder: Path, *words: str, group: bool = False) -> subprocess.Popen[str]:
    """The command as a user's shell starts it, in a folder; ``group``: a process group of its own, for a Ctrl-C."""
    return subprocess.Popen(
        [*COMMAND, *words],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_interruptible,
        start_new_session=group,
    )


def finish(process: subprocess.Popen[str], timeout: float = 400) -> Done:
    """Wait for a command's end; one that doesn't end is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Done(process.returncode, out, err)


def orchestrate(folder: Path, *words: str) -> Done:
    """Run a command in a process of its own."""
    return finish(start(folder, *words))


def call(folder: Path, *words: str, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> Done:
    """Run a command in this process: quicker, where neither Ray nor a signal is needed."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["orchestrate", *words])
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:  # any other exception is a traceback for the user
        cli.main()
    out, err = capture.readouterr()
    return Done(int(ended.value.code or 0), out, err)
