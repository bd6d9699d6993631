"""RanPAC: ridge regression on random features, whatever the order of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loda.errors import ConfigError
from loda.methods.ranpac import RIDGES, RanPac, RanPacSettings
from loda.run import run_sequence
from loda.workbench import memory_tensors, open_workbench
from orchestrate.merged import write_merged
from tests.conftest import SettingsFactory
from tests.loda.running import ORDER, artifact_of, run_all


def _learned(settings: RanPacSettings, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> RanPac:
    method = RanPac(settings)
    for features_ND, labels_N in parts:
        method.learn_classifier(features_ND, labels_N)
    return method


def _features(count: int, classes: int, seed: int = 0, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(count) % classes
    centres_CD = torch.randn(classes, width, generator=draws)
    return centres_CD[labels_N] + torch.randn(count, width, generator=draws), labels_N


def test_the_order_of_tasks_does_not_matter_at_a_fixed_ridge(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "ranpac", "projection": 60, "ridge": 1.0})
    bench = open_workbench(settings)
    images = bench.images(bench.splits["test"])
    features_ND, _ = bench.pass_over(images)
    scores = []
    for order in ((0, 1, 2), (2, 0, 1)):
        result = run_sequence(settings, order, bench=bench)
        method = RanPac(settings.method)  # type: ignore[arg-type]
        method.load_state_tensors(memory_tensors(result.state), bench.backbone)
        logits_NC = method.logits(features_ND)
        scores.append({label: logits_NC[:, i] for i, label in enumerate(result.state.meta["classes"])})
    for label in range(6):
        torch.testing.assert_close(scores[0][label], scores[1][label], rtol=1e-8, atol=1e-8)


def test_accuracy_is_that_of_a_ridge_regression_written_out(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "ranpac", "projection": 50, "ridge": 10.0})
    run = run_all(settings)
    bench = open_workbench(settings)
    seen = [label for index in ORDER for label in bench.tasks[index].classes]

    def hidden(rows: np.ndarray) -> np.ndarray:
        method = RanPac(settings.method)  # type: ignore[arg-type]
        return np.concatenate(
            [method.random_features(bench.pass_over(bench.images(np.asarray([row])))[0]).numpy() for row in rows]
        )

    train, test = bench.indices(seen, "train"), bench.indices(seen, "test")
    H, Y = hidden(train), np.eye(6)[bench.labels(train, seen).numpy()]
    weight = np.linalg.inv(H.T @ H + 10.0 * np.eye(50)) @ H.T @ Y
    predicted, labels = (hidden(test) @ weight).argmax(1), bench.labels(test, seen).numpy()
    meta = artifact_of(run, "evaluate", 2).meta
    for position, index in enumerate(ORDER):
        inside = np.isin(labels, [seen.index(label) for label in bench.tasks[index].classes])
        assert meta["correct"][position] == int((predicted == labels)[inside].sum())
    assert meta["classifier"] == "ranpac" and sum(meta["correct"]) > sum(meta["count"]) / 6


def test_random_features_are_relu_of_one_fixed_projection() -> None:
    method = RanPac(RanPacSettings(projection=500))
    features_ND, _ = _features(8, 2)
    h_NM = method.random_features(features_ND)
    assert h_NM.dtype == torch.float64 and float(h_NM.min()) == 0
    assert 0.3 < float((h_NM > 0).double().mean()) < 0.7
    torch.testing.assert_close(method.random_features(4 * features_ND), 4 * h_NM)
    assert torch.equal(RanPac(RanPacSettings(projection=500)).random_features(features_ND), h_NM)
    other = RanPac(RanPacSettings(projection=500, projection_seed=1)).random_features(features_ND)
    assert not torch.equal(other, h_NM)


@pytest.mark.parametrize("projection", [12, 80])
def test_the_ridge_is_the_best_on_held_out_images(projection: int) -> None:
    """Fewer and more random features than images: the two forms of the same regression."""
    method = RanPac(RanPacSettings(projection=projection))
    features_ND, labels_N = _features(50, 3)
    method.learn_classifier(features_ND, labels_N)
    from loda.seeds import generator

    order = torch.randperm(50, generator=generator(0, "ranpac held out", 50)).numpy()
    fitted, held_out = order[:40], order[40:]
    H, Y = method.random_features(features_ND).numpy(), np.eye(3)[labels_N.numpy()]
    errors = []
    for ridge in RIDGES:
        matrix = H[fitted].T @ H[fitted] + ridge * np.eye(projection)
        weight = np.linalg.lstsq(matrix, H[fitted].T @ Y[fitted], rcond=None)[0]
        errors.append(((H[held_out] @ weight - Y[held_out]) ** 2).mean())
    assert method.facts["ridge"] == RIDGES[int(np.argmin(errors))]
    assert 1e-8 < method.facts["ridge"] < 1e8


def test_statistics_add_up_over_tasks_and_survive_as_tensors() -> None:
    settings = RanPacSettings(projection=20, ridge=1.0)
    one, two = _features(30, 3, seed=1), _features(20, 2, seed=2)
    method = _learned(settings, [one, two])
    both_ND = torch.cat([one[0], two[0]])
    H = method.random_features(both_ND)
    torch.testing.assert_close(method.gram_MM, H.mT @ H)
    assert method.products_MC.shape == (20, 5)
    again = RanPac(settings)
    again.load_state_tensors(method.state_tensors(), None)  # type: ignore[arg-type]
    assert torch.equal(again.logits(both_ND), method.logits(both_ND))


def test_a_plain_model_is_refused_with_the_reason(tiny_settings: SettingsFactory, tmp_path: Path) -> None:
    settings = tiny_settings(method={"name": "ranpac", "projection": 20})
    run = run_all(settings)
    chain: Any = [artifact_of(run, "consolidate", position) for position in range(3)]
    with pytest.raises(ConfigError, match="ranpac can't be exported as one plain model: its classifier isn't linear"):
        write_merged(open_workbench(settings), settings, chain, artifact_of(run, "evaluate", 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    json.dumps(chain[-1].meta)
