"""Ray Train worker groups, inline Tune functions and a plain walk give the same bits; MLflow and Optuna hold them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from tests.e2e.studies import TASKS, call, orchestrate, write_study

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TEST_IMAGES = 24


@dataclass(frozen=True)
class Swept:
    folder: Path
    name: str
    values: dict[str, Any]

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / self.name

    def step(self, step: str, position: int) -> dict[str, Any]:
        """Tensors of the first stored step of a kind at a position."""
        timings = pd.read_parquet(self.runs / "timings.parquet")
        key = timings[(timings["step"] == step) & (timings["position"] == position)].iloc[0]["key"]
        return load_file(self.folder / "stages" / key[:2] / key / "tensors.safetensors")


def sweep(folder: Path, parquet: Path, executor: str) -> Swept:
    """One trial, the study's own setting, with a store of its own."""
    name = f"tiny-{executor}"
    write_study(folder, parquet, name=name, search={"trials": 1}, resources={"executor": executor})
    return Swept(folder, name, orchestrate(folder, "sweep", "study.yaml", "--json").values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_parquet: Path) -> Swept:
    """A sweep whose trials are Ray Train worker groups."""
    return sweep(tmp_path_factory.mktemp("train"), shapes_parquet, "train")


@pytest.fixture
def local(
    tmp_path: Path, shapes_parquet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Swept:
    """The same setting over the same orders, walked in this process."""
    write_study(tmp_path, shapes_parquet)
    done = call(tmp_path, "run", "study.yaml", "--local", "--json", patch=monkeypatch, capture=capsys)
    return Swept(tmp_path, "tiny", done.values)


def test_a_sweep_is_searched_chosen_and_judged(trained: Swept) -> None:
    values = trained.values
    assert values["trials"] == {"complete": 1}
    assert values["best"]["trial"] == 0
    assert values["best"]["settings"] == {"training.lr": 0.004, "method.recalibration": "diagonal"}
    assert values["stages_requested"] == 3 * TASKS  # one tune order and two evaluation orders
    assert values["stages_run"] + values["stages_reused"] == values["stages_requested"]
    assert 0 < values["stage_seconds"] < values["wall_seconds"]
    results = pd.read_parquet(trained.runs / "results.parquet")
    sizes = results.groupby(["trial", "split"])["order_name"].nunique().to_dict()
    assert sizes == {("trial-0000", "validation"): 1, ("chosen", "test"): 2}
    assert set(results.groupby("order_name").size()) == {TASKS * (TASKS + 1) // 2}


def test_all_executors_give_the_same_bits(
    trained: Swept, local: Swept, tmp_path_factory: pytest.TempPathFactory, shapes_parquet: Path
) -> None:
    inline = sweep(tmp_path_factory.mktemp("inline"), shapes_parquet, "inline")
    assert len(trained.values["state_digests"]) == 2
    for other in (inline, local):
        for key in ("state_digests", "accuracy_matrix", "a_last", "a_avg"):
            assert other.values[key] == trained.values[key], key
    assert inline.values["best"] == trained.values["best"]


def test_a_second_sweep_computes_nothing(trained: Swept) -> None:
    again = orchestrate(trained.folder, "sweep", "study.yaml", "--json").values
    assert again["stages_run"] == again["steps_run"] == 0
    assert again["trials"] == {"complete": 1}
    for key in ("state_digests", "a_last", "a_avg", "best"):
        assert again[key] == trained.values[key], key


def test_mlflow_has_study_trial_and_order_runs(trained: Swept) -> None:
    uri = f"sqlite:///{trained.folder / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name(trained.name)
    assert experiment is not None
    assert trained.values["mlflow"] == {"uri": uri, "experiment_id": experiment.experiment_id}
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags.get("order", run.info.run_name): run for run in found}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    ids = {run.info.run_id: name for name, run in runs.items()}
    above = {name: ids.get(parent) if parent else None for name, parent in parents.items()}
    orders = trained.values["orders"]
    tune = next(name for name in runs if name.startswith("tune-"))
    assert above == {
        trained.name: None,
        "trial-0000": trained.name,
        "chosen": trained.name,
        tune: "trial-0000",
        **dict.fromkeys(orders, "chosen"),
    }
    assert Counter(run.info.status for run in runs.values()) == {"FINISHED": len(runs)}
    for name in orders:
        assert runs[name].info.run_name == f"{name} (chosen)"
        assert runs[name].data.metrics["a_last"] == pytest.approx(trained.values["a_last"]["per_order"][name])
        assert runs[name].data.tags["state_digest"] == trained.values["state_digests"][name]
        steps = [entry.step for entry in client.get_metric_history(runs[name].info.run_id, "accuracy_seen")]
        assert sorted(steps) == list(range(1, TASKS + 1))
    study = runs[trained.name].data
    assert study.metrics["test/a_avg"] == pytest.approx(trained.values["a_avg"]["mean"])
    assert study.params["training.lr"] == "0.004"
    version = client.get_model_version(f"{trained.name}-merged", trained.values["model_version"])
    assert version.run_id == runs[trained.name].info.run_id


def test_optuna_opens_the_search(trained: Swept) -> None:
    study = optuna.load_study(study_name=trained.name, storage=f"sqlite:///{trained.runs / 'optuna.db'}")
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert trial.params == trained.values["best"]["settings"]
    assert [trial.value] == list(trained.values["best"]["objectives"].values())


def test_two_workers_agree_with_one(
    local: Swept, tmp_path_factory: pytest.TempPathFactory, shapes_parquet: Path
) -> None:
    """Sums are taken in another order: at most 2 of the 24 test images apart, second moments to 1 part in 10,000."""
    folder = tmp_path_factory.mktemp("pair")
    write_study(folder, shapes_parquet, resources={"workers": 2})
    pair = Swept(folder, "tiny", orchestrate(folder, "run", "study.yaml", "--json").values)
    assert set(pair.values["state_digests"]) == set(local.values["state_digests"])
    for name in local.values["orders"]:
        apart = abs(pair.values["a_last"]["per_order"][name] - local.values["a_last"]["per_order"][name])
        assert apart <= 100 * 2 / TEST_IMAGES + 0.02
    for width in (32, 128):
        one, two = (swept.step("observe", 0)[f"moments.{width}"].numpy() for swept in (local, pair))
        assert np.abs(one - two).max() <= 1e-4 * np.abs(one).max()
    # The first task has one branch; the second has both, and its directions come from the moments of two tasks.
    for position in (0, 1):
        one, two = local.step("adapt", position), pair.step("adapt", position)
        downs = [name for name in one if name.endswith("/down")]
        assert downs
        for name in downs:
            assert np.abs(_projector(one[name].numpy()) - _projector(two[name].numpy())).max() < 0.01, name


def _projector(rows: np.ndarray) -> np.ndarray:
    """The orthogonal projector on the span of the rows, which doesn't depend on the basis."""
    basis = np.linalg.qr(rows.T.astype(np.float64))[0]
    return basis @ basis.T
