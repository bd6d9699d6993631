"""Λ keeps the new task's update where the old tasks are silent, and drops it where they are not."""

from __future__ import annotations

import pytest
import torch

from loda.recalibration import recalibration

R, D, OUT = 4, 9, 6
GAMMA_M = 3.0


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moment(seed: int, tokens: int = 30) -> torch.Tensor:
    x_ND = _random(tokens, D, seed=seed) @ _random(D, D, seed=seed + 1000)
    return x_ND.mT @ x_ND / tokens


def _down(seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(_random(D, R, seed=seed)).Q.mT / 3**0.5


def _objective(
    L_rr: torch.Tensor, B_Or: torch.Tensor, A_rD: torch.Tensor, old: torch.Tensor, new: torch.Tensor
) -> float:
    """J, from outputs: energy of what the merged update does to old inputs, and of what it loses on new ones."""
    G_old, G_new = A_rD @ old @ A_rD.mT, A_rD @ new @ A_rD.mT
    rest = L_rr - torch.eye(R, dtype=torch.float64)
    return float((B_Or @ L_rr @ G_old @ L_rr.mT @ B_Or.mT).trace()) + GAMMA_M * float(
        (B_Or @ rest @ G_new @ rest.mT @ B_Or.mT).trace()
    )


def test_diagonal_is_the_published_formula() -> None:
    A_rD, old, new = _down(), _moment(1), _moment(2)
    found = recalibration(A_rD, old, new, GAMMA_M)
    for i in range(R):
        g_old, g_new = float(A_rD[i] @ old @ A_rD[i]), float(A_rD[i] @ new @ A_rD[i])
        assert float(found[i, i]) == pytest.approx(GAMMA_M * g_new / (g_old + GAMMA_M * g_new + 1e-12), rel=1e-12)
    assert torch.equal(found, torch.diag(found.diagonal()))


@pytest.mark.parametrize("seed", range(10))
def test_each_lambda_is_between_zero_and_one(seed: int) -> None:
    A_rD, old, new = _down(seed), _moment(seed), _moment(seed + 100)
    lambda_r = recalibration(A_rD, old, new, GAMMA_M, "diagonal").diagonal()
    assert bool((lambda_r > 0).all()) and bool((lambda_r < 1).all())
    eigenvalues_r = torch.linalg.eigvals(recalibration(A_rD, old, new, GAMMA_M, "full"))
    assert float(eigenvalues_r.imag.abs().max()) < 1e-9
    assert bool((eigenvalues_r.real > 0).all()) and bool((eigenvalues_r.real < 1).all())


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_update_is_kept_as_old_inputs_vanish_and_dropped_as_new_ones_do(kind: str) -> None:
    A_rD, old, new = _down(), _moment(3), _moment(4)
    eye_rr = torch.eye(R, dtype=torch.float64)
    kept = recalibration(A_rD, 1e-9 * old, new, GAMMA_M, kind)  # type: ignore[arg-type]
    dropped = recalibration(A_rD, old, 1e-9 * new, GAMMA_M, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(kept, eye_rr, rtol=0, atol=1e-5)
    torch.testing.assert_close(dropped, torch.zeros_like(eye_rr), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_full_is_the_exact_minimiser_for_every_up_projection(seed: int) -> None:
    A_rD, old, new = _down(seed), _moment(seed + 10), _moment(seed + 20)
    full = recalibration(A_rD, old, new, GAMMA_M, "full")
    diagonal = recalibration(A_rD, old, new, GAMMA_M, "diagonal")
    eye_rr = torch.eye(R, dtype=torch.float64)
    for b in range(5):
        B_Or = _random(OUT, R, seed=1000 * seed + b)
        B_Or[:, : b % R] = 0  # rank-deficient ones as well
        best = _objective(full, B_Or, A_rD, old, new)
        slack = 1 + 1e-9
        assert best <= _objective(diagonal, B_Or, A_rD, old, new) * slack
        assert best <= _objective(eye_rr, B_Or, A_rD, old, new) * slack
        assert best <= _objective(torch.zeros_like(eye_rr), B_Or, A_rD, old, new) * slack
        assert best <= _objective(full + 1e-3 * _random(R, R, seed=b), B_Or, A_rD, old, new) * slack


def test_full_is_strictly_better_than_diagonal_where_directions_are_coupled() -> None:
    A_rD, old, new = _down(), _moment(5), _moment(6)
    B_Or = _random(OUT, R, seed=7)
    full = _objective(recalibration(A_rD, old, new, GAMMA_M, "full"), B_Or, A_rD, old, new)
    assert full < 0.999 * _objective(recalibration(A_rD, old, new, GAMMA_M, "diagonal"), B_Or, A_rD, old, new)


def test_full_equals_diagonal_where_directions_are_uncoupled() -> None:
    A_rD = torch.eye(D, dtype=torch.float64)[:R] / 3**0.5
    old, new = (torch.diag(_random(D, seed=s).square() + 0.1) for s in (8, 9))
    full, diagonal = (recalibration(A_rD, old, new, GAMMA_M, kind) for kind in ("full", "diagonal"))  # type: ignore[arg-type]
    torch.testing.assert_close(full, diagonal, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_larger_weight_of_the_new_task_keeps_more(kind: str) -> None:
    A_rD, old, new = _down(), _moment(10), _moment(11)
    traces = [float(recalibration(A_rD, old, new, g, kind).trace()) for g in (0.1, 1.0, 3.0, 30.0)]  # type: ignore[arg-type]
    assert traces == sorted(traces) and len(set(traces)) == 4


def test_the_result_does_not_depend_on_the_length_of_the_down_projection() -> None:
    A_rD, old, new = _down(), _moment(12), _moment(13)
    for kind in ("diagonal", "full"):
        one, two = recalibration(A_rD, old, new, 3.0, kind), recalibration(7 * A_rD, old, new, 3.0, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_none_is_the_identity() -> None:
    found = recalibration(_down(), _moment(14), _moment(15), kind="none")
    assert torch.equal(found, torch.eye(R, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["diagonal", "full", "none"])
def test_layers_can_be_batched(kind: str) -> None:
    A_LrD = torch.stack([_down(s) for s in range(3)])
    old_LDD, new_LDD = (torch.stack([_moment(s + o) for s in range(3)]) for o in (16, 26))
    batched = recalibration(A_LrD, old_LDD, new_LDD, 3.0, kind)  # type: ignore[arg-type]
    for layer in range(3):
        alone = recalibration(A_LrD[layer], old_LDD[layer], new_LDD[layer], 3.0, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(batched[layer], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_directions_without_any_energy_stay_finite(kind: str) -> None:
    zero_DD = torch.zeros(D, D, dtype=torch.float64)
    thin_DD = torch.zeros(D, D, dtype=torch.float64)
    thin_DD[0, 0] = 1.0
    for old, new in ((zero_DD, zero_DD), (thin_DD, thin_DD), (zero_DD, thin_DD)):
        assert bool(torch.isfinite(recalibration(_down(), old, new, 3.0, kind)).all())  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="recalibration must be"):
        recalibration(_down(), _moment(16), _moment(17), kind="half")  # type: ignore[arg-type]


def test_float32_input_is_computed_in_float64() -> None:
    assert recalibration(_down().float(), _moment(18).float(), _moment(19).float()).dtype == torch.float64
