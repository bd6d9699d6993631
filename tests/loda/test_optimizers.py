"""The optimisers of a run: what they do to parameters, and that the default's keys are those that it always had."""

from __future__ import annotations

import pytest
import torch

from loda.methods import build_method
from loda.settings import TrainingSettings
from loda.training import build_optimizer
from loda.workbench import canonical_digest, open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import ORDER, artifact_of, digests, keys_of, reread, run_all


def _step(optimizer: str, weight_decay: float) -> tuple[float, float]:
    """How far a branch and a head parameter of 2 move under a gradient of 3."""
    parameters = [torch.tensor([2.0]) for _ in range(2)]
    settings = TrainingSettings(optimizer=optimizer, lr=0.1, head_lr=0.01, weight_decay=weight_decay)  # type: ignore[arg-type]
    built = build_optimizer(parameters[:1], parameters[1:], settings)
    for parameter in parameters:
        parameter.grad = torch.tensor([3.0])
    built.step()
    return float(parameters[0] - 2), float(parameters[1] - 2)


def test_first_steps_are_those_of_the_formulas() -> None:
    decay = 0.5
    assert _step("sgd", decay) == pytest.approx((-0.1 * (3 + decay * 2), -0.01 * (3 + decay * 2)), rel=1e-5)
    assert _step("adam", decay) == pytest.approx((-0.1, -0.01), rel=1e-4)  # a sign step; decay is part of the gradient
    assert _step("adamw", decay) == pytest.approx((-0.1 * (1 + decay * 2), -0.01 * (1 + decay * 2)), rel=1e-4)


def test_the_default_optimiser_is_in_no_key(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    training = settings.training.model_dump()
    assert training.pop("optimizer") == "sgd"
    head = settings.head
    classes = bench.tasks[ORDER[0]].classes
    observe = canonical_digest({"step": "observe", "parent": bench.root_key, "classes": classes})
    expected = canonical_digest(
        {
            "step": "adapt",
            "observe": observe,
            "method": ["loda", 1],
            "settings": build_method(settings.method).adapt_reads(0),
            "training": training,
            "head": {"start": head.start, "scale": head.scale, "margin": head.margin},
        }
    )
    assert keys_of(settings)["adapt", 0] == expected


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_another_optimiser_has_keys_and_results_of_its_own_and_resumes(
    optimizer: str, tiny_settings: SettingsFactory
) -> None:
    plain = tiny_settings(training={"lr": 0.01})
    settings = tiny_settings(training={"lr": 0.01, "optimizer": optimizer})
    assert keys_of(settings)["adapt", 0] != keys_of(plain)["adapt", 0]
    assert keys_of(settings)["observe", 0] == keys_of(plain)["observe", 0]
    whole = run_all(settings)
    assert digests(run_all(settings, known={n.key: reread(whole[1][n.key]) for n in whole[0][:6]})) == digests(whole)
    assert artifact_of(whole, "adapt", 0).digest != artifact_of(run_all(plain), "adapt", 0).digest
