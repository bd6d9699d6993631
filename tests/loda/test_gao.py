"""Gradient-aligned steps: halves by class, a descent move of known length, everything put back, two steps a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loda.gao import class_halves, plain_step
from tests.loda.toy_problem import BATCH, Problem


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
    downs = {id(branch.down) for layer in problem.layers for branch in layer.branches.values()}
    positions = [index for index, parameter in enumerate(problem.branch) if id(parameter) in downs]
    assert len(positions) == 4
    for index in positions:
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

    def double(gradients: Sequence[Tensor]) -> None:
        for gradient in gradients:
            gradient.mul_(2)

    doubled.gao_step(0.3, doubled.sgd(), reduce_gradients=double)
    for a, b in zip(plain.calls[1][1], doubled.calls[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(plain.steps[0][1], doubled.steps[0][1], strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-12, atol=1e-14)
