"""ICM-LoRA: the generator of LoRAs, and images sent to the nearest task."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loda.generator import LoraGenerator, Scaling, trained_generator
from loda.methods.icmlora import IcmLora, NearestTask, standardised
from loda.settings import RunSettings
from loda.workbench import Workbench, memory_tensors, open_workbench
from tests.conftest import ALL_TARGETS, SettingsFactory
from tests.loda.running import ORDER, Run, artifact_of, run_all

Learned = tuple[RunSettings, Run]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def learned(tiny_settings: SettingsFactory) -> Learned:
    settings = tiny_settings(
        method={"name": "icmlora", "rank": 2, "latent": 8, "generator_steps": 150},
        backbone={"target": list(ALL_TARGETS)},
        training={"epochs": 3, "lr": 0.1},
    )
    return settings, run_all(settings)


def _after(learned: Learned, position: int) -> tuple[Workbench, IcmLora]:
    bench = open_workbench(learned[0])
    method = IcmLora(learned[0].method)  # type: ignore[arg-type]
    method.load_state_tensors(memory_tensors(artifact_of(learned[1], "consolidate", position)), bench.backbone)
    return bench, method


def test_normalising_round_trips() -> None:
    samples_NP = 1e3 * _randn(5, 7) + 50
    samples_NP[:, 2] = 3.0  # never varies
    scaling = Scaling.of(samples_NP)
    scores_NP = scaling.apply(samples_NP)
    torch.testing.assert_close(scaling.undo(scores_NP), samples_NP, rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(scores_NP.mean(0), torch.zeros(7).double(), rtol=0, atol=1e-12)
    moving = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(scores_NP.std(0, correction=0)[moving], torch.ones(6).double())
    assert not scores_NP[:, 2].any()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_generator_gives_loras_of_any_length(length: int) -> None:
    model = LoraGenerator(length, 3, 5)
    mean_NZ, log_variance_NZ = model.encode(torch.randn(2, length), torch.randn(2, 3))
    assert mean_NZ.shape == log_variance_NZ.shape == (2, 5)
    assert model.decode(mean_NZ, torch.randn(2, 3)).shape == (2, length)


def test_a_decoded_condition_is_nearest_to_its_own_tasks_loras() -> None:
    centres_TP, condition_TD = 2 * _randn(4, 90), standardised(_randn(4, 6, seed=1) * 1e-3 + 40)
    samples_TKP = centres_TP[:, None] + 0.3 * _randn(4, 3, 90, seed=2)
    samples_NP = samples_TKP.flatten(0, 1)
    scaling = Scaling.of(samples_NP)
    fitted = trained_generator(
        scaling.apply(samples_NP),
        condition_TD.repeat_interleave(3, dim=0),
        latent=8,
        kl_weight=0.005,
        steps=200,
        lr=3e-3,
        seed=0,
    )
    with torch.no_grad():
        decoded_TP = scaling.undo(fitted.decode(torch.zeros(4, 8), condition_TD))
        swapped_TP = scaling.undo(fitted.decode(torch.zeros(4, 8), condition_TD.flip(0)))
    assert torch.cdist(decoded_TP, samples_TKP.mean(1)).argmin(1).tolist() == [0, 1, 2, 3]
    assert torch.cdist(swapped_TP, samples_TKP.mean(1)).argmin(1).tolist() == [3, 2, 1, 0]


def test_the_same_seed_gives_the_same_generator_and_leaves_other_draws_alone() -> None:
    def fit(seed: int) -> Tensor:
        options = {"latent": 4, "kl_weight": 0.1, "steps": 3, "lr": 1e-2}
        return trained_generator(_randn(4, 30), _randn(4, 2), **options, seed=seed).from_latent.weight  # type: ignore[arg-type]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(fit(0), fit(0)) and not torch.equal(fit(0), fit(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_task_trains_alone_on_the_frozen_backbone(learned: Learned) -> None:
    bench, method = _after(learned, 2)
    for position, task in enumerate(ORDER):
        trained = artifact_of(learned[1], "adapt", position).tensors
        pairs = [trained[f"branch/{layer}/lora/{part}"] for layer in bench.backbone.layers for part in ("down", "up")]
        assert torch.equal(method.snapshots[position][-1], torch.cat([pair.flatten() for pair in pairs]))
        assert not torch.equal(method.snapshots[position][-2], method.snapshots[position][-1])
        images = bench.images(bench.indices(bench.tasks[task].classes, "train"))
        frozen_ND, _ = bench.pass_over(images)
        torch.testing.assert_close(method.vectors[position], frozen_ND.double().mean(0), rtol=1e-5, atol=1e-6)


def test_generated_loras_are_nearest_to_their_own_tasks(learned: Learned) -> None:
    assert artifact_of(learned[1], "consolidate", 2).meta["facts"]["generated_nearest_to"] == [0, 1, 2]
    _, method = _after(learned, 2)
    fitted, scaling, condition_TD = method.fit()
    with torch.no_grad():
        again_TP = scaling.undo(fitted.decode(torch.zeros(3, 8), condition_TD)).float()
    assert torch.equal(again_TP, torch.stack(method.generated))


def test_an_image_gets_the_lora_of_the_nearest_task(learned: Learned) -> None:
    bench, method = _after(learned, 2)
    backbone = bench.backbone
    inputs = backbone.normalize(bench.images(bench.splits["test"]).float() / 255)
    with torch.no_grad():
        frozen_ND = backbone.features(inputs)
        nearest = [
            min(range(3), key=lambda t: math.dist(feature.tolist(), method.vectors[t].tolist()))
            for feature in frozen_ND
        ]
        assert len(set(nearest)) > 1
        method.attach_for_prediction(backbone)
        routed_ND = backbone.features(inputs)
        branches = {n: list(branched.branches.values()) for n, branched in backbone.attached.items()}
        backbone.detach()
        for image, task in enumerate(nearest):
            merge = {}
            for name, tasks in branches.items():
                merge |= {f"{name}.up": tasks[task].scaled_up(), f"{name}.down": tasks[task].down}
            backbone.load_merges([merge])
            torch.testing.assert_close(
                routed_ND[image], backbone.features(inputs[image : image + 1])[0], rtol=0, atol=1e-4
            )
    assert float((routed_ND - frozen_ND).abs().max()) > 1e-3


def test_routing_happens_in_the_frozen_backbone(learned: Learned) -> None:
    bench, method = _after(learned, 1)
    inputs = bench.backbone.normalize(bench.images(bench.splits["test"]).float() / 255)
    with torch.no_grad():
        frozen_ND = bench.backbone.features(inputs)
        method.generated = [100 * lora_P for lora_P in method.generated]  # were they at work, features would be far off
        method.attach_for_prediction(bench.backbone)
        bench.backbone.features(inputs)
        weights = next(iter(bench.backbone.attached.values())).weigh
        assert weights is not None
        expected = torch.cdist(frozen_ND.double(), torch.stack(method.vectors)).argmin(1)
        assert torch.equal(weights(inputs), F.one_hot(expected, 2).float())
    bench.backbone.detach()
    assert bench.backbone.route is None
    assert NearestTask(torch.zeros(1, 2)).weights_BT is None
