"""InfLoRA, KeepLoRA and CoSO: what is trained stays off the protected input directions, on layers of any shape."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loda.distributed import WorkerGroup
from loda.energy import unpack_symmetric
from loda.gradients import LossGradients
from loda.head import CosineHead, random_head_weight
from loda.memory import SubspaceMemory
from loda.methods.base import Batch, Learner, Observation
from loda.methods.coso import Coso, CosoSettings
from loda.methods.inflora import InfLora, InfLoraSettings
from loda.methods.keeplora import KeepLora, KeepLoraSettings
from loda.seeds import generator
from loda.training import trainable_parameters
from loda.workbench import memory_tensors, merge_factors, open_workbench
from tests.conftest import BackboneFactory, SettingsFactory
from tests.loda.attached import images, moments
from tests.loda.running import ORDER, Run, artifact_of, run_all

TARGETS = ["attn.qkv", "mlp.fc1", "mlp.fc2"]  # 32 -> 96, 32 -> 128, 128 -> 32
METHODS: dict[str, dict[str, Any]] = {
    "inflora": {"rank": 4, "energy": 0.7},
    "inflora retaining": {"name": "inflora", "rank": 4, "energy": 0.997, "energy_tasks": 1000},
    "keeplora": {"rank": 4, "energy_weights": 0.4, "energy_features": 0.6},
    "coso": {"rank": 3, "refresh": 2, "energy": 0.9},
}


@pytest.fixture(scope="module", params=sorted(METHODS))
def trained(request: pytest.FixtureRequest, tiny_settings: SettingsFactory) -> Run:
    settings = tiny_settings(
        method={"name": request.param, **METHODS[request.param]},
        backbone={"target": TARGETS},
        training={"epochs": 2, "weight_decay": 5e-4},
    )
    return run_all(settings)


def _memory_before(run: Run, position: int) -> SubspaceMemory:
    memory = SubspaceMemory()
    memory.load_state_tensors(memory_tensors(artifact_of(run, "consolidate", position - 1)), torch.device("cpu"))
    return memory


def _change(run: Run, position: int, layer: str) -> Tensor:
    factors = merge_factors(artifact_of(run, "consolidate", position))
    if f"{layer}.delta" in factors:
        return factors[f"{layer}.delta"].double()
    return factors[f"{layer}.up"].double() @ factors[f"{layer}.down"].double()


def _layers(run: Run) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in merge_factors(artifact_of(run, "consolidate", 0))})


@pytest.mark.parametrize("position", [1, 2])
def test_a_tasks_change_is_zero_on_what_was_protected_before_it(position: int, trained: Run) -> None:
    memory = _memory_before(trained, position)
    for layer in _layers(trained):
        change_OD = _change(trained, position, layer)
        assert float(change_OD.norm()) > 1e-4
        protected_Dk, free_Df = memory.protected(layer), memory.free(layer)
        assert protected_Dk.shape[1] > 0
        assert float((change_OD @ protected_Dk).norm()) < 1e-5 * float(change_OD.norm())
        if layer in memory.retaining:  # the same, said with what is kept: the change lives in the free directions
            rest_OD = change_OD - change_OD @ free_Df @ free_Df.mT
            assert float(rest_OD.norm()) < 1e-5 * float(change_OD.norm())


def test_both_forms_of_the_memory_occur(tiny_settings: SettingsFactory) -> None:
    retaining = []
    for name in ("inflora", "inflora retaining"):
        settings = tiny_settings(
            method={"name": "inflora", **METHODS[name]}, backbone={"target": TARGETS}, training={"epochs": 1}
        )
        retaining.append(len(_memory_before(run_all(settings), 1).retaining))
    assert retaining[0] == 0 < retaining[1]


def test_earlier_inputs_give_nearly_the_outputs_that_they_gave(trained: Run) -> None:
    """What protection is for: the second task's change is small on the first task's inputs, for its size."""
    if any(name.endswith(".delta") for name in artifact_of(trained, "consolidate", 0).tensors):
        return  # CoSO protects the updates' directions, not the inputs'
    moments_by_width = artifact_of(trained, "observe", 0).tensors
    layers = [name for name in _layers(trained) if "fc2" not in name]
    for index, layer in enumerate(layers):
        S_DD = unpack_symmetric(moments_by_width["moments.32"])[index]
        change_OD = _change(trained, 1, layer)
        felt = float((change_OD @ S_DD @ change_OD.mT).trace() / change_OD.square().sum())
        assert felt < 0.5 * float(torch.linalg.eigvalsh(S_DD)[-1])


def _prepared(backbone: Any) -> tuple[Any, Any]:
    return moments(backbone, images(seed=1)), moments(backbone, images(seed=2) ** 3)


def test_infloras_down_projection_is_that_of_the_formula(tiny_backbone: BackboneFactory) -> None:
    """Left singular vectors of ``S - MMᵀS``, by NumPy, on every layer."""
    backbone = tiny_backbone()
    old, new = _prepared(backbone)
    method = InfLora(InfLoraSettings(rank=5, energy=0.8))
    method.end_task(Observation(old, 0), None, old)
    method.begin_task(backbone, Observation(new, 1))
    for width, names in new.names.items():
        for index, name in enumerate(names):
            S, M = new.values[width][index].numpy(), method.memory.protected(name).numpy()
            U = np.linalg.svd(S - M @ M.T @ S)[0][:, :5]
            A = backbone.attached[name].branches["inflora"].down.detach().double().numpy() * math.sqrt(3)
            np.testing.assert_allclose(A.T @ A, U @ U.T, atol=1e-5)
            np.testing.assert_allclose(A @ A.T, np.eye(5), atol=1e-5)
            assert not backbone.attached[name].branches["inflora"].down.requires_grad


def test_infloras_protected_share_rises_linearly_to_one() -> None:
    method = InfLora(InfLoraSettings(energy=0.95, energy_tasks=10))
    assert [method.threshold(position) for position in (0, 5, 10, 15)] == pytest.approx([0.95, 0.975, 1.0, 1.0])


def test_a_layer_without_enough_free_directions_gets_those_that_it_has(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv",))
    _, new = _prepared(backbone)
    for rank_left in (2, 0):
        method = InfLora(InfLoraSettings(rank=4))
        for name in backbone.layers:
            method.memory.bases[name] = torch.linalg.qr(torch.eye(32, 32 - rank_left, dtype=torch.float64)).Q
        method.begin_task(backbone, Observation(new, 1))
        before = backbone.features(images(2))
        assert all(b.branches["inflora"].down.shape == (rank_left, 32) for b in backbone.attached.values())
        assert bool(torch.isfinite(before).all())


def _loss_gradients(backbone: Any) -> LossGradients:
    head = CosineHead(random_head_weight(3, 32, generator(0, "test head")))
    labels_N = torch.arange(12) % 3
    return LossGradients(backbone, head, (255 * images(seed=2)).to(torch.uint8), labels_N, 10.0, 0.0, 5, WorkerGroup())


def test_keeploras_start_is_that_of_the_formula(tiny_backbone: BackboneFactory) -> None:
    """``Ĝ = G - G M'M'ᵀ`` by NumPy, with M' = [W_p, M] put together from its parts."""
    backbone = tiny_backbone()
    old, new = _prepared(backbone)
    settings = KeepLoraSettings(rank=3, energy_weights=0.4, energy_features=0.5)
    method = KeepLora(settings)
    method.begin_task(backbone, Observation(old, 0, _loss_gradients(backbone)))
    principal = {}
    for name in backbone.layers:
        _, values, Vh = np.linalg.svd(backbone.original[name].double().numpy())
        share = np.cumsum(values**2) / (values**2).sum()
        principal[name] = Vh[: int(np.argmax(share >= 0.4)) + 1].T
        W_p = method.memory.protected(name).numpy()
        np.testing.assert_allclose(W_p @ W_p.T, principal[name] @ principal[name].T, atol=1e-6)
    method.end_task(Observation(old, 0), None, old)
    backbone.detach()
    passes = _loss_gradients(backbone)
    method.begin_task(backbone, Observation(new, 1, passes))
    backbone.detach()
    gradients = passes.mean()
    method.begin_task(backbone, Observation(new, 1, passes))
    for name in backbone.layers:
        M, G = method.memory.protected(name).numpy(), gradients[name].numpy()
        np.testing.assert_allclose(M @ (M.T @ principal[name]), principal[name], atol=1e-8)  # W_p is part of M'
        U, values, Vh = np.linalg.svd(G - G @ M @ M.T, full_matrices=False)
        branch = backbone.attached[name].branches["lora"]
        A, B = branch.down.detach().double().numpy(), branch.up.detach().double().numpy()
        np.testing.assert_allclose(A.T @ A, Vh[:3].T @ Vh[:3], atol=1e-4)
        np.testing.assert_allclose(B @ A, (U[:, :3] * values[:3]) @ Vh[:3], atol=1e-5 * max(1.0, values[0]))
        assert branch.up.requires_grad and not branch.down.requires_grad
        assert not bool(branch.delta().any())  # the reset weight under it leaves outputs as they were


def test_keeplora_starts_a_later_task_where_the_last_one_ended(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "keeplora", **METHODS["keeplora"]}, backbone={"target": TARGETS})
    run = run_all(settings)
    bench = open_workbench(settings)
    chain = [artifact_of(run, "consolidate", position) for position in (0, 1)]
    bench.backbone.load_merges([merge_factors(state) for state in chain])
    before_ND, recorded = bench.pass_over(bench.images(bench.splits["test"]), record_moments=True)
    method = KeepLora(settings.method)  # type: ignore[arg-type]
    method.load_state_tensors(memory_tensors(chain[-1]), bench.backbone)
    rows = bench.indices(bench.tasks[ORDER[2]].classes, "train")
    labels_N = bench.labels(rows, bench.tasks[ORDER[2]].classes)
    head = CosineHead(random_head_weight(2, 32, generator(0, "test head")))
    passes = LossGradients(bench.backbone, head, bench.images(rows), labels_N, 20.0, 0.0, 16, WorkerGroup())
    assert recorded is not None
    method.begin_task(bench.backbone, Observation(recorded, 2, passes))
    after_ND, _ = bench.pass_over(bench.images(bench.splits["test"]))
    assert torch.equal(after_ND, before_ND)


class _Quadratic:
    """Coso on layers whose loss is ``½ Σ ‖Δ - C‖²``, so that every gradient is known."""

    def __init__(self, backbone: Any, settings: CosoSettings, memory: SubspaceMemory | None = None) -> None:
        self.method = Coso(settings)
        if memory is not None:
            self.method.memory = memory
        self.method.begin_task(backbone, Observation(moments(backbone, images()), 1))
        self.weights = trainable_parameters(backbone)
        draws = torch.Generator().manual_seed(8)
        # Of all ranks, with noise that changes from step to step: the subspace has to move.
        self.noise = [[torch.randn(w.shape, generator=draws) for w in self.weights] for _ in range(12)]
        self.head = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([*self.weights, self.head], lr=0.1, weight_decay=0.1)
        self.learner = Learner(
            self.weights, [self.head], optimizer.step, lambda g: None, torch.Generator(), backbone, lambda: 0.01
        )

    def gradient(self, step: int, layer: int) -> Tensor:
        return self.weights[layer].detach() - self.noise[step][layer]

    def run(self, steps: int, start: int = 0) -> None:
        for step in range(start, start + steps):
            noise = self.noise[step]

            def loss_of(indices: Tensor, noise: list[Tensor] = noise) -> Tensor:
                terms = [(w - c).square().sum() / 2 for w, c in zip(self.weights, noise, strict=True)]
                return torch.stack(terms).sum() + (self.head - 1).square().sum()

            self.method.training_step(self.learner, Batch(torch.arange(2), loss_of))


def test_cosos_steps_are_adam_in_the_leading_directions_of_the_projected_gradient(
    tiny_backbone: BackboneFactory,
) -> None:
    """The first subspace by NumPy's SVD, with Adam written out; two steps inside it."""
    backbone = tiny_backbone(("mlp.fc1",))
    memory = SubspaceMemory()
    for name in backbone.layers:
        memory.bases[name] = torch.linalg.qr(torch.randn(32, 6, dtype=torch.float64)).Q
    toy = _Quadratic(backbone, CosoSettings(rank=4, refresh=50), memory)
    first = [toy.gradient(0, layer).double().numpy() for layer in range(len(toy.weights))]
    toy.run(1)
    second = [toy.gradient(1, layer).double().numpy() for layer in range(len(toy.weights))]
    expected = []
    for layer, name in enumerate(backbone.layers):
        M = memory.protected(name).numpy()
        V = np.linalg.svd(first[layer] @ (np.eye(32) - M @ M.T))[2][:4].T
        V *= np.sign(V[np.abs(V).argmax(0), np.arange(4)])  # Adam isn't blind to a turn of V, but to its signs
        mean = square = 0.0
        weight = np.zeros(first[layer].shape)
        for count, gradient in enumerate((first[layer], second[layer]), start=1):
            inside = gradient @ V
            mean, square = 0.9 * mean + 0.1 * inside, 0.999 * square + 0.001 * inside**2
            corrected = (mean / (1 - 0.9**count)) / (np.sqrt(square / (1 - 0.999**count)) + 1e-8)
            weight -= 0.01 * corrected @ V.T
        expected.append(weight)
    toy.run(1, start=1)
    for weight, slow in zip(toy.weights, expected, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), slow, atol=2e-5)


@pytest.mark.parametrize("refresh,exceeds", [(1, True), (3, True), (50, False)])
def test_cosos_change_has_a_larger_rank_than_its_steps(
    refresh: int, exceeds: bool, tiny_backbone: BackboneFactory
) -> None:
    backbone = tiny_backbone(("attn.qkv", "mlp.fc2"))
    toy = _Quadratic(backbone, CosoSettings(rank=2, refresh=refresh, sketch=12))
    toy.run(9)
    for weight in toy.weights:
        values = torch.linalg.svdvals(weight.detach().double())
        rank = int((values > 1e-4 * values[0]).sum())
        assert rank > 2 if exceeds else rank == 2
    assert bool((toy.head != 0).all())  # the head takes the optimiser's steps


def test_cosos_memory_holds_the_directions_of_its_updates(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("mlp.fc1",))
    toy = _Quadratic(backbone, CosoSettings(rank=2, refresh=3, sketch=8, energy=0.9999))
    toy.run(9)
    toy.method.trained = toy.method.finish_training(backbone, Observation(moments(backbone, images()), 1))
    toy.method.end_task(Observation(moments(backbone, images()), 1), None, None)
    for name, weight in zip(backbone.layers, toy.weights, strict=True):
        protected_Dk = toy.method.memory.protected(name)
        assert 2 < protected_Dk.shape[1] <= 6  # three subspaces of two directions
        change_OD = weight.detach().double()
        assert float((change_OD - change_OD @ protected_Dk @ protected_Dk.mT).norm()) < 0.05 * float(change_OD.norm())


def test_coso_goes_on_when_nothing_is_free(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone(("attn.qkv",))
    memory = SubspaceMemory()
    for name in backbone.layers:
        memory.bases[name] = torch.eye(32, dtype=torch.float64)
    toy = _Quadratic(backbone, CosoSettings(rank=2, refresh=2), memory)
    toy.run(3)
    assert not any(bool(weight.any()) for weight in toy.weights)
    found = toy.method.finish_training(backbone, Observation(moments(backbone, images()), 1))
    assert all(not bool(tensor.any()) for tensor in found.values())
