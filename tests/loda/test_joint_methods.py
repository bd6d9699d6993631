"""Joint methods that know the task of each image: gradient surgery, task mixtures, dealt ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loda.backbone import Backbone
from loda.branch import BranchedLinear
from loda.methods.base import Batch, Learner, Observation
from loda.methods.mtllora import MtlLora, MtlLoraSettings, TaskMixture
from loda.methods.ortholora import OrthoLora, OrthoLoraSettings, surgery
from loda.methods.thanora import ThanoRa, ThanoRaSettings, deal_ranks, overlap, spectral_entropy, spectrum
from loda.moments import LayerMoments
from loda.run import run_sequence
from loda.workbench import open_workbench
from tests.conftest import ALL_TARGETS, BackboneFactory, SettingsFactory
from tests.loda.attached import images, moments
from tests.loda.running import artifact_of, run_all

TASKS = 3


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _slow_surgery(gradients: list[Tensor]) -> Tensor:
    """The rule, number by number."""
    flat = [gradient.double().flatten().tolist() for gradient in gradients]
    total = [0.0] * len(flat[0])
    for i, own in enumerate(flat):
        kept = list(own)
        for j, other in enumerate(flat):
            inner = math.fsum(a * b for a, b in zip(kept, other, strict=True))
            if i != j and inner < 0:
                square = math.fsum(b * b for b in other)
                kept = [a - inner / square * b for a, b in zip(kept, other, strict=True)]
        total = [a + b for a, b in zip(total, kept, strict=True)]
    return torch.tensor(total, dtype=torch.float64).view_as(gradients[0])


@pytest.mark.parametrize("seed", range(3))
def test_surgery_is_the_rule(seed: int) -> None:
    gradients = [_randn(5, 3, seed=10 * seed + task) for task in range(TASKS)]
    change = surgery(gradients)
    assert change is not None
    found = torch.stack(gradients).sum(0).double() + change.double()
    torch.testing.assert_close(found, _slow_surgery(gradients), rtol=0, atol=1e-5)


def test_surgery_leaves_agreeing_and_absent_gradients_alone() -> None:
    one = _randn(5, 3)
    assert surgery([one, one * 0.5]) is None
    assert surgery([one, torch.zeros_like(one)]) is None
    assert surgery([one, -one]) is not None


Step = tuple[list[Tensor], list[Tensor]]


def _one_step(losses: list[Callable[[Tensor, Tensor], Tensor]], method: OrthoLora | None) -> Step:
    """Matrices A, B and their gradients at a step on a batch with one image of each task."""
    down_rD, up_Or = (tensor.requires_grad_(True) for tensor in (_randn(2, 5, seed=1), _randn(4, 2, seed=2)))

    def loss_of(indices: Tensor) -> Tensor:
        return torch.stack([losses[int(index)](down_rD, up_Or) for index in indices]).mean()

    batch = Batch(torch.arange(len(losses)), loss_of, tasks=torch.arange(len(losses)))
    gradients: list[Tensor] = []

    def step() -> None:
        gradients.extend(p.grad.clone() for p in (down_rD, up_Or) if p.grad is not None)

    learner: Any = Learner(
        branch_parameters=[down_rD, up_Or],
        head_parameters=[],
        step=step,
        reduce_gradients=lambda tensors: None,
        generator=torch.Generator(),
        model=None,  # type: ignore[arg-type]
        lr=lambda: 0.1,
    )
    trainer = method or OrthoLora(OrthoLoraSettings())
    (OrthoLora.__mro__[1].training_step if method is None else OrthoLora.training_step)(trainer, learner, batch)
    return [down_rD.detach(), up_Or.detach()], gradients


def test_without_conflict_a_step_is_plain_to_the_bit() -> None:
    weights = [_randn(2, 5, seed=5), _randn(4, 2, seed=6)]
    losses = [lambda a, b, f=f: f * ((a * weights[0]).sum() + (b * weights[1]).sum()) for f in (1.0, 0.3, 2.0)]
    ortho, plain = (_one_step(losses, method) for method in (OrthoLora(OrthoLoraSettings()), None))
    assert all(torch.equal(one, other) for one, other in zip(ortho[1], plain[1], strict=True))


def test_a_conflict_in_a_alone_leaves_b_as_it_is() -> None:
    """Over both matrices together the tasks agree, so a projection of the whole gradient would change nothing."""
    weights = [_randn(2, 5, seed=5), 100 * _randn(4, 2, seed=6)]
    losses = [lambda a, b, f=f: f * (a * weights[0]).sum() + (b * weights[1]).sum() for f in (1.0, -0.5)]
    ortho, plain = (_one_step(losses, method) for method in (OrthoLora(OrthoLoraSettings()), None))
    assert torch.equal(ortho[1][1], plain[1][1])
    torch.testing.assert_close(ortho[1][0], torch.zeros(2, 5), rtol=0, atol=1e-6)  # opposed: each loses all
    assert float(plain[1][0].norm()) > 0.1


def test_with_a_single_task_it_is_joint_training_to_the_bit(tiny_settings: SettingsFactory) -> None:
    adapted = []
    for name in ("joint", "ortholora"):
        settings = tiny_settings(method={"name": name, "rank": 4}, stream={"tasks": 1})
        adapted.append(artifact_of(run_all(settings, (0,)), "adapt", 0).tensors)
    assert list(adapted[0]) == list(adapted[1])
    assert all(torch.equal(tensor, adapted[1][name]) for name, tensor in adapted[0].items())


@pytest.mark.parametrize("name", ["ortholora", "mtllora", "thanora"])
def test_the_cut_into_tasks_matters_and_the_order_does_not(name: str, tiny_settings: SettingsFactory) -> None:
    method = {"name": name, "rank": 4}
    runs = {}
    for tasks in (2, 3):
        settings = tiny_settings(method=method, stream={"tasks": tasks})
        runs[tasks] = run_all(settings, tuple(range(tasks)))
        again = run_all(settings, tuple(reversed(range(tasks))))
        assert [node.key for node in again[0]] == [node.key for node in runs[tasks][0]] and len(again[0]) == 4
    assert artifact_of(runs[2], "adapt", 0).digest != artifact_of(runs[3], "adapt", 0).digest
    assert runs[2][0][1].key != runs[3][0][1].key
    assert runs[2][0][0].key == runs[3][0][0].key  # what is observed first doesn't depend on it


def _mixture(layer: BranchedLinear, rank: int = 4, ups: int = 3, seed: int = 0, **options: Any) -> TaskMixture:
    parts = {
        "down_rD": _randn(rank, layer.base.in_features, seed=seed),
        "ups_nOr": _randn(ups, layer.base.out_features, rank, seed=seed + 1),
        "mixing_Trr": _randn(TASKS, rank, rank, seed=seed + 2),
        "weighing_Tn": _randn(TASKS, ups, seed=seed + 3),
        "scale": 0.5,
        "temperature": 0.7,
        "tasks": lambda: torch.tensor([2, 0]),
    }
    return TaskMixture(**(parts | options))


def test_a_task_mixture_is_what_its_formula_says(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    backbone.attach()
    for layer in backbone.attached.values():
        mixture = _mixture(layer)
        x_BND = _randn(2, 5, layer.base.in_features)
        found_BNO = mixture(x_BND)
        for image, task in enumerate((2, 0)):
            exps = [math.exp(w / 0.7) for w in mixture.weighing[task].tolist()]
            delta_OD = sum(
                0.5 * exps[i] / sum(exps) * mixture.ups[i] @ mixture.mixing[task] @ mixture.down for i in range(3)
            )
            torch.testing.assert_close(found_BNO[image], x_BND[image] @ delta_OD.mT, rtol=1e-4, atol=1e-4)


def test_with_one_up_projection_and_no_mixing_it_is_plain_lora(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    backbone.attach()
    for layer in backbone.attached.values():
        mixture = _mixture(layer, ups=1, mixing_Trr=torch.eye(4).repeat(TASKS, 1, 1))
        x_BND = _randn(2, 5, layer.base.in_features)
        expected_BNO = 0.5 * F.linear(F.linear(x_BND, mixture.down), mixture.ups[0])
        torch.testing.assert_close(mixture(x_BND), expected_BNO, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_task_gives_other_tasks_no_gradient_at_all(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = MtlLora(MtlLoraSettings(rank=4))
    method.begin_task(backbone, Observation(moments(backbone, images()), 0, tasks=TASKS))
    mixtures = [layer.extra for layer in backbone.attached.values()]
    with torch.no_grad():
        for mixture in mixtures:
            assert isinstance(mixture, TaskMixture)
            assert torch.equal(mixture.mixing, torch.eye(4).repeat(TASKS, 1, 1))
            mixture.ups.copy_(0.1 * _randn(*mixture.ups.shape))
    backbone.features(images(), torch.full((12,), 1)).square().sum().backward()
    for mixture in mixtures:
        assert isinstance(mixture, TaskMixture)
        for gradient in (mixture.mixing.grad, mixture.weighing.grad):
            assert gradient is not None and bool(gradient[1].any())
            assert not bool(gradient[0].any()) and not bool(gradient[2].any())


def test_without_a_task_it_says_what_is_missing(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    MtlLora(MtlLoraSettings(rank=4)).begin_task(backbone, Observation(moments(backbone, images()), 0, tasks=TASKS))
    with pytest.raises(ValueError, match="needs each image's task"):
        backbone.features(images())


def test_mtllora_reports_the_accuracy_with_and_without_the_task(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "mtllora", "rank": 4}, training={"epochs": 4, "lr": 0.2})
    bench = open_workbench(settings)
    result = run_sequence(settings, bench=bench)
    meta, state = result.evaluations[0].meta, result.state
    weight_CD = result.evaluations[0].tensors["classifier.weight"]
    method = MtlLora(settings.method)  # type: ignore[arg-type]
    memory = {n.removeprefix("memory/"): t for n, t in state.tensors.items() if n.startswith("memory/")}
    method.load_state_tensors(memory, bench.backbone)
    method.attach_for_prediction(bench.backbone)
    classes = state.meta["classes"]
    with_id, without = [0] * 3, [0] * 3
    with torch.no_grad():
        for task in range(3):
            rows = bench.indices(bench.tasks[task].classes, "test")
            inputs = bench.backbone.normalize(bench.images(rows).float() / 255)
            for x, label in zip(inputs, bench.dataset.labels[rows], strict=True):
                best = (-math.inf, -1)
                for other in range(3):
                    logits_C = bench.backbone.features(x[None], torch.tensor([other]))[0] @ weight_CD.mT
                    if other == task:
                        with_id[task] += classes[int(logits_C.argmax())] == label
                    best = max(best, *((float(logits_C[classes.index(c)]), c) for c in bench.tasks[other].classes))
                without[task] += best[1] == label
    assert meta["correct"] == with_id and meta["correct_without_task_id"] == without


def test_dealt_ranks_sum_to_the_rank_and_nobody_goes_without() -> None:
    for tasks, rank in itertools.product((1, 2, 3, 5), (6, 7, 16, 33)):
        entropies = [float(value) for value in torch.rand(tasks, generator=torch.Generator().manual_seed(rank))]
        ranks = deal_ranks(rank, entropies)
        assert len(ranks) == tasks + 1 and sum(ranks) == rank and min(ranks) >= 1
        assert ranks[-1] == rank // (tasks + 1)
        order = sorted(range(tasks), key=lambda t: entropies[t])
        assert [ranks[t] for t in order] == sorted(ranks[:-1])
    assert deal_ranks(5, [0.0, 0.0, 0.0, 0.0]) == [1, 1, 1, 1, 1]
    assert deal_ranks(12, [3.0, 1.0]) == [6, 2, 4]  # 4 for all, 1 each, and of the other 6 three for each one


def test_spectra_and_entropies_agree_with_the_singular_values(tiny_backbone: BackboneFactory) -> None:
    weight_OD, x_ND = _randn(9, 6), _randn(50, 6, seed=1)
    S_DD = (x_ND.mT @ x_ND / 50).double()
    values, vectors = torch.linalg.eigh(S_DD)
    root_DD = vectors @ values.sqrt().diag() @ vectors.mT
    left_OO, sigma_D, _ = torch.linalg.svd(weight_OD.double() @ root_DD)
    squares_O, found_OO = spectrum(weight_OD, S_DD)
    torch.testing.assert_close(squares_O[:6], sigma_D.square(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close((found_OO[:, :3].mT @ left_OO[:, :3]).abs(), torch.eye(3).double(), rtol=0, atol=1e-5)
    shares = (sigma_D.square() / sigma_D.square().sum()).tolist()
    assert spectral_entropy(squares_O) == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-6)
    assert spectral_entropy(torch.tensor([4.0, 4.0])) == pytest.approx(math.log(2))
    assert spectral_entropy(torch.tensor([4.0, 0.0])) == 0


def test_the_overlap_is_zero_exactly_when_blocks_are_orthogonal() -> None:
    blocks = [_randn(2, 9), _randn(3, 9, seed=1), _randn(1, 9, seed=2)]
    expected = sum(
        float((one @ other.mT).square().sum()) for index, one in enumerate(blocks) for other in blocks[index + 1 :]
    )
    assert float(overlap(blocks)) == pytest.approx(expected, rel=1e-5)
    eye_DD = torch.eye(9)
    assert float(overlap([eye_DD[:2], eye_DD[2:5], eye_DD[7:8]])) == 0
    assert float(overlap([eye_DD[:2], eye_DD[1:4]])) == 1
    assert float(overlap([blocks[0]])) == 0


def _thanora(backbone: Backbone, rank: int) -> ThanoRa:
    parts = [moments(backbone, images(seed=seed) ** (seed + 1)) for seed in range(TASKS)]
    whole = LayerMoments(parts[0].names, {w: sum(p.values[w] for p in parts) / TASKS for w in parts[0].values})  # type: ignore[misc]
    method = ThanoRa(ThanoRaSettings(rank=rank))
    method.begin_task(backbone, Observation(whole, 0, tasks=TASKS, of_tasks=tuple(parts)))
    return method


def test_blocks_start_where_the_task_drives_the_layer_most(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    method = _thanora(backbone, 9)
    for name, layer in backbone.attached.items():
        ranks = method.facts["ranks"][name]
        assert [len(branch.down) for branch in layer.branches.values()] == ranks and sum(ranks) == 9
        own = moments(tiny_backbone(), images(seed=1) ** 2)
        S_DD = next(own.values[w][names.index(name)] for w, names in own.names.items() if name in names)
        left_OO = torch.linalg.svd(
            layer.base.weight.double() @ torch.linalg.cholesky(S_DD + 1e-12 * torch.eye(len(S_DD)))
        ).U
        rows_rD = left_OO[:, : ranks[1]].mT @ layer.base.weight.double()
        down_rD = layer.branches["task1"].down.double()
        torch.testing.assert_close(down_rD @ down_rD.mT, torch.eye(ranks[1]).double() / 3, rtol=0, atol=1e-5)
        kept_rD = rows_rD @ (3 * down_rD.mT @ down_rD)  # the same row space
        torch.testing.assert_close(kept_rD, rows_rD, rtol=0, atol=1e-4)


def test_the_penalty_pulls_blocks_apart(tiny_settings: SettingsFactory) -> None:
    overlaps = []
    for weight in (0.0, 1.0):
        method = {"name": "thanora", "rank": 8, "orthogonality": weight}
        run = run_all(tiny_settings(method=method, training={"epochs": 3, "lr": 0.02}), (0, 1, 2))
        tensors = artifact_of(run, "adapt", 0).tensors
        layers = sorted({name.split("/")[1] for name in tensors if name.startswith("branch/")})
        downs = [
            [t for n, t in tensors.items() if n.startswith(f"branch/{x}/") and n.endswith("/down")] for x in layers
        ]
        overlaps.append(sum(float(overlap(blocks)) for blocks in downs))
    assert overlaps[1] < 0.5 * overlaps[0]


def test_a_rank_that_cannot_be_dealt_is_a_problem_before_any_work(tiny_settings: SettingsFactory) -> None:
    from loda.errors import ConfigError

    with pytest.raises(ConfigError, match=r"method\.rank: 3 can't give 3 tasks .* use at least 4"):
        open_workbench(tiny_settings(method={"name": "thanora", "rank": 3}))
    open_workbench(tiny_settings(method={"name": "thanora", "rank": 4}, backbone={"target": list(ALL_TARGETS)}))
