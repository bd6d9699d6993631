"""γ/√3 is a learning rate in disguise: the two forms run along one trajectory, in float64, with GAO and momentum."""

from __future__ import annotations

import math

import pytest
import torch

from tests.loda.toy_problem import Problem, snapshot


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
