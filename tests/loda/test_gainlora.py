"""GainLoRA: gates that stay shut for earlier tasks, a stack that is frozen, InfLoRA when all gates are open."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loda.gates import Gate, Gates, off_span
from loda.methods.base import Observation
from loda.methods.gainlora import GainLora
from loda.settings import RunSettings
from loda.workbench import Workbench, memory_tensors, merge_factors, open_workbench
from tests.conftest import ALL_TARGETS, SettingsFactory
from tests.loda.attached import moments
from tests.loda.running import ORDER, Run, artifact_of, run_all

Learned = tuple[RunSettings, Run]


@pytest.fixture(scope="module")
def learned(tiny_settings: SettingsFactory) -> Learned:
    """Three tasks; every gate input of a task is remembered, momentum and weight decay pull hard."""
    settings = tiny_settings(
        method={"name": "gainlora", "rank": 4, "gate_energy": 1.0, "gate_hidden": 40},
        backbone={"target": list(ALL_TARGETS)},
        training={"epochs": 3, "lr": 0.3, "weight_decay": 0.05},
    )
    return settings, run_all(settings)


def _after(learned: Learned, position: int) -> tuple[Workbench, GainLora]:
    """The method with what it remembers after a task, on a fresh backbone."""
    bench = open_workbench(learned[0])
    method = GainLora(learned[0].method)  # type: ignore[arg-type]
    method.load_state_tensors(memory_tensors(artifact_of(learned[1], "consolidate", position)), bench.backbone)
    return bench, method


def _gate_values(bench: Workbench, task: int) -> Tensor:
    """(n, T) of a task's training images, with whatever gates are attached."""
    images = bench.images(bench.indices(bench.tasks[task].classes, "train"))
    with torch.no_grad():
        bench.backbone.features(bench.backbone.normalize(images.float() / 255))
    gates = bench.backbone.shared["gates"]
    assert isinstance(gates, Gates) and gates.values_BT is not None
    return gates.values_BT.clone()


def test_a_gate_is_what_its_formula_says() -> None:
    draws = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 5, generator=draws), torch.randn(1, 3, generator=draws)]
    x = torch.randn(5, generator=draws)
    hidden = [sum(float(weights[0][h, d]) * float(x[d]) for d in range(5)) for h in range(3)]
    silu = [h / (1 + math.exp(-h)) for h in hidden]
    b = sum(float(weights[1][0, h]) * silu[h] for h in range(3))
    expected = abs(2 / (1 + math.exp(-b)) - 1)
    assert float(Gate(weights)(x[None]).detach()) == pytest.approx(expected, rel=1e-5)
    assert float(Gate(weights)(torch.zeros(1, 5)).detach()) == 0


def test_off_span_leaves_nothing_in_the_span_and_all_that_is_beside_it() -> None:
    draws = torch.Generator().manual_seed(0)
    basis_Dk = torch.linalg.qr(torch.randn(7, 3, generator=draws, dtype=torch.float64)).Q
    weight_OD = torch.randn(4, 7, generator=draws)
    cut_OD = off_span(weight_OD, basis_Dk)
    assert float((cut_OD.double() @ basis_Dk).abs().max()) < 1e-6
    rest_D = torch.linalg.qr(torch.cat([basis_Dk, torch.randn(7, 1, generator=draws).double()], dim=1)).Q[:, -1]
    torch.testing.assert_close(cut_OD.double() @ rest_D, weight_OD.double() @ rest_D, rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", [1, 2])
def test_what_a_gate_learns_is_off_the_span_of_its_earlier_inputs(position: int, learned: Learned) -> None:
    _, method = _after(learned, position - 1)
    trained = artifact_of(learned[1], "adapt", position).tensors
    update_HD = trained["trained/gate.0"] - method.gates[-1][0]
    bases = [method.gate_memory.protected(f"gate.{index}").float() for index in (0, 1)]
    assert all(0 < basis.shape[1] < basis.shape[0] for basis in bases)
    assert float(update_HD.norm()) > 1e-3
    assert float((update_HD @ bases[0]).norm() / update_HD.norm()) < 1e-4
    output_1H = trained["trained/gate.1"]  # its start has no part in the span, so what it ends as has none
    assert float(output_1H.norm()) > 1e-3
    assert float((output_1H @ bases[1]).norm() / output_1H.norm()) < 1e-4


@pytest.mark.parametrize("position", [1, 2])
def test_a_new_gate_is_silent_on_all_earlier_images_and_open_on_its_own(position: int, learned: Learned) -> None:
    bench, method = _after(learned, position - 1)
    images_BCHW = bench.backbone.normalize(bench.images(bench.splits["train"]).float() / 255)
    method.begin_task(bench.backbone, Observation(moments(bench.backbone, images_BCHW), position))
    for earlier in ORDER[:position]:
        assert float(_gate_values(bench, earlier)[:, -1].max()) <= 1e-5
    bench, method = _after(learned, position)
    method.attach_for_prediction(bench.backbone)
    own = float(_gate_values(bench, ORDER[position])[:, -1].mean())
    for earlier in ORDER[:position]:
        silent = float(_gate_values(bench, earlier)[:, -1].max())
        assert silent <= 1e-5 and own > 20 * silent


def test_old_branches_and_gates_keep_their_bits(learned: Learned) -> None:
    memories = [memory_tensors(artifact_of(learned[1], "consolidate", position)) for position in range(3)]
    frozen = [name for name in memories[0] if name.startswith(("stack/", "weights/"))]
    assert len(frozen) == 8 * 2 + 2
    for later in memories[1:]:
        assert all(torch.equal(memories[0][name], later[name]) for name in frozen)
    stacks = [sum(name.startswith("stack/") for name in memory) for memory in memories]
    assert stacks == [16, 32, 48]
    assert not any(merge_factors(artifact_of(learned[1], "consolidate", position)) for position in range(3))


def test_a_layer_adds_each_branch_as_its_gate_says_image_by_image(learned: Learned) -> None:
    bench, method = _after(learned, 2)
    method.attach_for_prediction(bench.backbone)
    values_BT = _gate_values(bench, 0)
    for branched in bench.backbone.attached.values():
        x_BND = torch.randn(len(values_BT), 3, branched.base.in_features, generator=torch.Generator().manual_seed(0))
        for image, x_ND in enumerate(x_BND):
            expected_NO = branched.base(x_ND)
            for task, branch in enumerate(branched.branches.values()):
                expected_NO = expected_NO + values_BT[image, task] * (x_ND @ branch.delta().mT)
            torch.testing.assert_close(branched(x_BND)[image], expected_NO, rtol=1e-4, atol=1e-5)
    assert float(values_BT.std()) > 0


def test_with_all_gates_open_it_is_inflora(learned: Learned) -> None:
    bench, method = _after(learned, 2)
    images_BCHW = bench.backbone.normalize(bench.images(bench.splits["train"][:8]).float() / 255)
    method.attach_for_prediction(bench.backbone)
    factors: dict[str, Tensor] = {}
    with torch.no_grad():
        gated_BD = bench.backbone.features(images_BCHW)
        for name, branched in bench.backbone.attached.items():
            branched.weigh = lambda x: torch.ones(1, 3)
            for task, branch in branched.branches.items():
                factors[f"{task}.{name}.up"], factors[f"{task}.{name}.down"] = branch.scaled_up(), branch.down
        open_BD = bench.backbone.features(images_BCHW)
        bench.backbone.detach()
        merges = [
            {n.removeprefix(f"task{t}."): f for n, f in factors.items() if n.startswith(f"task{t}.")} for t in range(3)
        ]
        bench.backbone.load_merges(merges)
        merged_BD = bench.backbone.features(images_BCHW)
    torch.testing.assert_close(open_BD, merged_BD, rtol=0, atol=1e-4)
    assert float((gated_BD - merged_BD).abs().max()) > 1e-3


def test_class_means_and_predictions_are_of_the_gated_stack(learned: Learned) -> None:
    bench, method = _after(learned, 2)
    state = artifact_of(learned[1], "consolidate", 2)
    images: Any = bench.images(bench.indices(state.meta["classes"][-1:], "train"))
    method.attach_for_prediction(bench.backbone)
    features_ND, _ = bench.pass_over(images)
    torch.testing.assert_close(state.tensors["class_means"][-1], features_ND.mean(0), rtol=1e-4, atol=1e-5)
    bench.backbone.detach()
    plain_ND, _ = bench.pass_over(images)
    assert float((plain_ND - features_ND).abs().max()) > 1e-3
