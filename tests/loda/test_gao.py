"""Gradient-aligned steps: halves by class, a descent move of known length, everything put back, two steps a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loda.branch import BranchedLinear
from loda.gao import class_halves, gradient_aligned_step, plain_step
from loda.head import CosineHead, cosface_loss

WIDTH, HIDDEN, OUT, CLASSES, BATCH = 7, 11, 5, 4, 16


@settings(max_examples=80, deadline=None)
@given(labels=st.lists(st.integers(-3, 9), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_halves_are_label_disjoint_and_cover_the_batch(labels: list[int], seed: int) -> None:
    labels_B = torch.tensor(labels)
    first, second = class_halves(labels_B, torch.Generator().manual_seed(seed))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(labels)))
    in_first, in_second = set(labels_B[first].tolist()), set(labels_B[second].tolist())
    assert not in_first & in_second
    assert len(in_first) == max(1, len(set(labels)) // 2)


def test_halves_are_drawn_anew_and_repeat_with_the_generator() -> None:
    labels_B = torch.arange(12) % 6

    def draw(generator: torch.Generator) -> tuple[int, ...]:
        return tuple(sorted(set(labels_B[class_halves(labels_B, generator)[0]].tolist())))

    generator = torch.Generator().manual_seed(0)
    draws = [draw(generator) for _ in range(300)]
    assert len(set(draws)) == math.comb(6, 3)  # every choice of three classes of six comes up
    again = torch.Generator().manual_seed(0)
    assert draws == [draw(again) for _ in range(300)]


def test_a_batch_of_one_class_has_an_empty_second_half() -> None:
    first, second = class_halves(torch.full((5,), 3), torch.Generator().manual_seed(0))
    assert first.tolist() == list(range(5)) and len(second) == 0


@dataclass
class Problem:
    """Two non-square branched layers under a cosine head, in float64, with all that an optimiser step sees recorded."""

    train_down: bool = False
    scales: tuple[float, float] = (0.25, 0.5)
    down_scale: float = 1 / math.sqrt(3)
    start_up: float = 0.3
    calls: list[tuple[list[int], list[Tensor], list[Tensor]]] = field(default_factory=list)
    steps: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        draws = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws, dtype=torch.float64)

        self.layers = []
        for d_in, d_out in ((WIDTH, HIDDEN), (HIDDEN, OUT)):
            base = nn.Linear(d_in, d_out, dtype=torch.float64).requires_grad_(False)
            base.weight.copy_(randn(d_out, d_in) / d_in**0.5)
            base.bias.copy_(randn(d_out) / 10)
            layer = BranchedLinear(base)
            for name, rank, scale in (("general", 3, self.scales[0]), ("isolated", 2, self.scales[1])):
                down_rD = torch.linalg.qr(randn(d_in, rank)).Q.mT * self.down_scale
                # B as it would be with scale 1 and orthonormal A, brought to this scale: equal functions at the start.
                up_Or = self.start_up * randn(d_out, rank) / (scale * self.down_scale)
                layer.add(name, down_rD, up_Or, scale=scale, train_down=self.train_down)
            self.layers.append(layer)
        self.head = CosineHead(randn(CLASSES, OUT))
        self.images_BD = randn(BATCH, WIDTH)
        self.labels_B = torch.arange(BATCH) % CLASSES
        self.branch = [p for layer in self.layers for p in layer.branches.parameters() if p.requires_grad]
        self.halves = class_halves(self.labels_B, torch.Generator().manual_seed(1))

    def loss(self, indices: Tensor) -> Tensor:
        hidden = torch.tanh(self.layers[0](self.images_BD[indices]))
        cosines = self.head(self.layers[1](hidden))
        return cosface_loss(cosines, self.labels_B[indices], scale=5.0) / len(indices)

    def recorded_loss(self, indices: Tensor) -> Tensor:
        self.calls.append((indices.tolist(), snapshot(self.branch), snapshot(self.head.parameters())))
        return self.loss(indices)

    def sgd(self, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-2) -> Callable[[], None]:
        optimizer = torch.optim.SGD(
            [*self.branch, *self.head.parameters()], lr=lr, momentum=momentum, weight_decay=weight_decay
        )

        def step() -> None:
            self.steps.append((snapshot(self.branch), [p.grad.clone() for p in self.branch]))  # type: ignore[union-attr]
            optimizer.step()

        return step

    def gao_step(self, rho: float, step: Callable[[], None], **options: object) -> float:
        head = list(self.head.parameters())
        return gradient_aligned_step(self.recorded_loss, self.halves, rho, self.branch, head, step, **options)  # type: ignore[arg-type]


def snapshot(parameters: object) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]  # type: ignore[attr-defined]


def test_rho_zero_equals_two_plain_steps_first_on_group_two_then_on_group_one() -> None:
    ours, slow = Problem(), Problem()
    step = ours.sgd()
    for _ in range(3):
        ours.gao_step(0.0, step)
    parameters = [*slow.branch, *slow.head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        for target in (slow.halves[1], slow.halves[0]):
            optimizer.zero_grad()
            slow.loss(target).backward()
            optimizer.step()
    for a, b in zip([*ours.branch, *ours.head.parameters()], parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rho", [1e-3, 0.3, 2.0])
def test_each_tensor_moves_by_rho_against_the_source_gradient(rho: float) -> None:
    problem = Problem()
    problem.gao_step(rho, problem.sgd())
    assert [call[0] for call in problem.calls] == [problem.halves[i].tolist() for i in (0, 1, 1, 0)]
    for source, target in ((0, 1), (2, 3)):
        before, after = problem.calls[source][1], problem.calls[target][1]
        for parameter, value in zip(problem.branch, before, strict=True):
            parameter.data.copy_(value)
        for parameter, value in zip(problem.head.parameters(), problem.calls[source][2], strict=True):
            parameter.data.copy_(value)
        gradients = torch.autograd.grad(problem.loss(torch.tensor(problem.calls[source][0])), problem.branch)
        for a, b, gradient in zip(before, after, gradients, strict=True):
            move = b - a
            assert float(move.norm()) == pytest.approx(rho, rel=1e-9)
            assert float((move * gradient).sum()) == pytest.approx(-rho * float(gradient.norm()), rel=1e-9)


def test_the_head_is_not_moved() -> None:
    problem = Problem()
    problem.gao_step(0.5, problem.sgd())
    for source, target in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(problem.calls[source][2], problem.calls[target][2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_are_put_back_bit_for_bit_before_the_optimiser_steps(dtype: torch.dtype) -> None:
    problem = Problem()
    for module in (*problem.layers, problem.head):
        module.to(dtype)
    problem.images_BD = problem.images_BD.to(dtype)
    problem.gao_step(0.7, problem.sgd())
    assert len(problem.steps) == 2
    for (at_step, _), source in zip(problem.steps, (0, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(at_step, problem.calls[source][1], strict=True))


def test_the_step_uses_the_target_gradient_at_the_moved_point() -> None:
    problem = Problem()
    problem.gao_step(0.4, problem.sgd())
    for parameter, value in zip(problem.branch, problem.calls[1][1], strict=True):
        parameter.data.copy_(value)
    for parameter, value in zip(problem.head.parameters(), problem.calls[1][2], strict=True):
        parameter.data.copy_(value)
    expected = torch.autograd.grad(problem.loss(problem.halves[1]), problem.branch)
    for a, b in zip(problem.steps[0][1], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_look_ahead_rewards_agreement_of_the_groups() -> None:
    """L2(θ - ρ ĝ1) = L2 - ρ ĝ1·g2 to first order: descent, not ascent."""
    problem, rho = Problem(), 1e-5
    g1, g2 = (torch.autograd.grad(problem.loss(half), problem.branch) for half in problem.halves)
    agreement = sum(float((a / a.norm() * b).sum()) for a, b in zip(g1, g2, strict=True))
    here = float(problem.loss(problem.halves[1]).detach())
    problem.gao_step(rho, lambda: None)
    for parameter, value in zip(problem.branch, problem.calls[1][1], strict=True):
        parameter.data.copy_(value)
    ahead = float(problem.loss(problem.halves[1]).detach())
    assert (here - ahead) / rho == pytest.approx(agreement, rel=1e-3)


def test_two_optimiser_steps_a_batch_and_the_mean_of_the_stepped_losses() -> None:
    problem = Problem()
    loss = problem.gao_step(0.2, problem.sgd(lr=0.0))
    stepped = []
    for call in (1, 3):
        for parameter, value in zip(problem.branch, problem.calls[call][1], strict=True):
            parameter.data.copy_(value)
        stepped.append(float(problem.loss(torch.tensor(problem.calls[call][0])).detach()))
    assert len(problem.steps) == 2
    assert loss == pytest.approx(sum(stepped) / 2, rel=1e-12)


def test_one_class_gives_one_plain_step() -> None:
    ours, slow = Problem(), Problem()
    for problem in (ours, slow):
        problem.labels_B = torch.zeros(BATCH, dtype=torch.int64)
        problem.halves = class_halves(problem.labels_B, torch.Generator().manual_seed(0))
    ours.gao_step(0.5, ours.sgd())
    plain_step(slow.loss, torch.arange(BATCH), [*slow.branch, *slow.head.parameters()], slow.sgd())
    assert len(ours.steps) == 1
    assert all(torch.equal(a, b) for a, b in zip(ours.branch, slow.branch, strict=True))


@pytest.mark.parametrize("rho", [0.3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_without_gradient_stays_where_it_is(rho: float, dtype: torch.dtype) -> None:
    problem = Problem(train_down=True, start_up=0.0)  # B = 0: the loss has no gradient with respect to A
    for module in (*problem.layers, problem.head):
        module.to(dtype)
    problem.images_BD = problem.images_BD.to(dtype)
    problem.gao_step(rho, problem.sgd())
    downs = [i for i, p in enumerate(problem.branch) if any(p is b.down for la in problem.layers for b in la.branches.values())]  # fmt: skip
    assert len(downs) == 4
    for index in downs:
        assert torch.equal(problem.calls[0][1][index], problem.calls[1][1][index])
    assert all(bool(torch.isfinite(p).all()) for p in problem.branch)


def test_relative_moves_have_the_share_rho_of_each_tensors_norm() -> None:
    problem = Problem(train_down=True)
    problem.gao_step(0.1, problem.sgd(), scale="relative")
    for before, after in zip(problem.calls[0][1], problem.calls[1][1], strict=True):
        assert float((after - before).norm()) == pytest.approx(0.1 * float(before.norm()), rel=1e-9)


def test_gradients_are_reduced_over_workers_before_they_are_used() -> None:
    """Twice the gradient from the reduction: the move keeps its length, the step sees twice the gradient."""
    plain, doubled = Problem(), Problem()
    plain.gao_step(0.3, plain.sgd())

    def double(gradients: object) -> None:
        torch._foreach_mul_(list(gradients), 2.0)  # type: ignore[call-overload]

    doubled.gao_step(0.3, doubled.sgd(), reduce_gradients=double)
    for a, b in zip(plain.calls[1][1], doubled.calls[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(plain.steps[0][1], doubled.steps[0][1], strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaling_law_gamma_over_root_three_is_a_learning_rate(momentum: float) -> None:
    """κ = γ/√3: orthonormal A, no γ, with lr·κ², wd/κ² and κρ run along the same trajectory."""
    gammas, rho, lr, weight_decay = (0.25, 0.5), 0.3, 0.5, 1e-2
    published, folded = Problem(scales=gammas), Problem(scales=(1.0, 1.0), down_scale=1.0)
    kappa_of = [gammas[index % 2] / math.sqrt(3) for index in range(len(published.branch))]  # general, isolated, ...

    def optimiser(problem: Problem, kappas: list[float]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "lr": lr * k**2, "weight_decay": weight_decay / k**2}
            for p, k in zip(problem.branch, kappas, strict=True)
        ]
        head = {"params": list(problem.head.parameters()), "lr": lr, "weight_decay": weight_decay}
        return torch.optim.SGD([*groups, head], lr=lr, momentum=momentum)

    first, second = optimiser(published, [1.0] * len(kappa_of)), optimiser(folded, kappa_of)
    # One ρ serves a whole call, and the two branches have two κ: the folded run takes its moves tensor by tensor.
    parameters = [*folded.branch, *folded.head.parameters()]
    start = snapshot(folded.branch)
    for _ in range(10):
        published.gao_step(rho, first.step)
        for source, target in ((0, 1), (1, 0)):
            gradients = torch.autograd.grad(folded.loss(folded.halves[source]), folded.branch)
            kept = snapshot(folded.branch)
            with torch.no_grad():
                for p, g, kappa in zip(folded.branch, gradients, kappa_of, strict=True):
                    p -= kappa * rho * g / g.norm()
            for p, g in zip(
                parameters, torch.autograd.grad(folded.loss(folded.halves[target]), parameters), strict=True
            ):
                p.grad = g
            with torch.no_grad():
                for p, value in zip(folded.branch, kept, strict=True):
                    p.copy_(value)
            second.step()
        for one, two in zip(published.layers, folded.layers, strict=True):
            for name in ("general", "isolated"):
                torch.testing.assert_close(
                    one.branches[name].delta(), two.branches[name].delta(), rtol=1e-9, atol=1e-11
                )
    moved = max(float((p.detach() - value).norm()) for p, value in zip(folded.branch, start, strict=True))
    assert moved > 1e-2  # the trajectories went somewhere


def test_scaling_law_with_one_branch_kind_through_the_same_step() -> None:
    """The same law where all tensors share one κ, so that both runs go through the code under test."""
    gamma, rho, lr, weight_decay = 0.5, 0.3, 0.5, 1e-2
    kappa = gamma / math.sqrt(3)
    one, two = Problem(scales=(gamma, gamma)), Problem(scales=(1.0, 1.0), down_scale=1.0)
    optimisers = []
    for problem, factor in ((one, 1.0), (two, kappa)):
        branch = {"params": problem.branch, "lr": lr * factor**2, "weight_decay": weight_decay / factor**2}
        head = {"params": list(problem.head.parameters()), "lr": lr, "weight_decay": weight_decay}
        optimisers.append(torch.optim.SGD([branch, head], lr=lr, momentum=0.9))
    for _ in range(10):
        loss = one.gao_step(rho, optimisers[0].step)
        assert loss == pytest.approx(two.gao_step(kappa * rho, optimisers[1].step), rel=1e-9)
    for a, b in zip(one.branch, two.branch, strict=True):
        torch.testing.assert_close(kappa * a, b, rtol=1e-8, atol=1e-10)
