"""The general subspace captures the most energy; the isolated one solves the generalised eigenproblem."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from loda.energy import projection_energy
from loda.subspace import RELATIVE_RIDGE, general_subspace, isolated_subspace

D, R = 12, 4


def _moment(width: int = D, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """A symmetric positive definite matrix with eigenvalues from 1 to ``spread``, in random directions."""
    draws = torch.Generator().manual_seed(seed)
    Q_DD = torch.linalg.qr(torch.randn(width, width, generator=draws, dtype=torch.float64)).Q
    values_D = torch.linspace(1, spread, width, dtype=torch.float64)
    return (Q_DD * values_D) @ Q_DD.mT


def _projector(basis_Dr: torch.Tensor) -> torch.Tensor:
    Q_Dr = torch.linalg.qr(basis_Dr).Q
    return Q_Dr @ Q_Dr.mT


def _distance(first_Dr: torch.Tensor, second_Dr: torch.Tensor) -> float:
    """Sine of the largest angle between two spans."""
    return float(torch.linalg.matrix_norm(_projector(first_Dr) - _projector(second_Dr), 2))


def _ratio_trace(U_Dr: torch.Tensor, S_new_DD: torch.Tensor, S_old_DD: torch.Tensor) -> float:
    return float(torch.linalg.solve(U_Dr.mT @ S_old_DD @ U_Dr, U_Dr.mT @ S_new_DD @ U_Dr).trace())


def test_general_energy_is_the_sum_of_the_top_eigenvalues() -> None:
    S_DD = _moment(spread=20)
    found = general_subspace(S_DD, R)
    U_Dr = found.basis[0]
    eigenvalues_D = torch.linalg.eigvalsh(S_DD).flip(0)
    torch.testing.assert_close((U_Dr.mT @ S_DD @ U_Dr).trace(), eigenvalues_D[:R].sum())
    torch.testing.assert_close(found.eigenvalues[0], eigenvalues_D)
    torch.testing.assert_close(projection_energy(S_DD, U_Dr), eigenvalues_D[:R].sum() / eigenvalues_D.sum())


def test_general_energy_is_more_than_that_of_random_directions() -> None:
    S_DD = _moment(spread=20)
    best = projection_energy(S_DD, general_subspace(S_DD, R).basis[0])
    for seed in range(20):
        other_Dr = torch.linalg.qr(torch.randn(D, R, generator=torch.Generator().manual_seed(seed)).double()).Q
        assert projection_energy(S_DD, other_Dr) < best


@pytest.mark.parametrize("kind", ["general", "isolated"])
def test_bases_are_orthonormal_and_eigenvalues_descend(kind: str) -> None:
    S_new_LDD, S_old_LDD = (torch.stack([_moment(seed=s + o) for s in range(3)]) for o in (0, 10))
    found = general_subspace(S_new_LDD, R) if kind == "general" else isolated_subspace(S_new_LDD, S_old_LDD, R)
    assert found.basis.shape == (3, D, R) and found.basis.dtype == torch.float64
    assert found.eigenvalues.shape == (3, D) and found.ranks.tolist() == [R] * 3 and found.ridge.shape == (3,)
    eye_Lrr = torch.eye(R, dtype=torch.float64).expand(3, R, R)
    torch.testing.assert_close(found.basis.mT @ found.basis, eye_Lrr, rtol=0, atol=1e-12)
    assert bool((found.eigenvalues.diff(dim=-1) <= 1e-12).all())


@pytest.mark.parametrize("kind", ["general", "isolated"])
def test_layers_in_a_batch_do_not_touch_each_other(kind: str) -> None:
    S_new_LDD, S_old_LDD = (torch.stack([_moment(seed=s + o) for s in range(3)]) for o in (0, 10))
    S_old_LDD[1] *= 1e6
    for layer in range(3):
        if kind == "general":
            batched, alone = general_subspace(S_new_LDD, R), general_subspace(S_new_LDD[layer], R)
        else:
            batched = isolated_subspace(S_new_LDD, S_old_LDD, R)
            alone = isolated_subspace(S_new_LDD[layer], S_old_LDD[layer], R)
        assert _distance(batched.basis[layer], alone.basis[0]) < 1e-10
        torch.testing.assert_close(batched.eigenvalues[layer], alone.eigenvalues[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, R, D])
def test_isolated_agrees_with_scipy(seed: int, rank: int) -> None:
    S_new_DD, S_old_DD = _moment(seed=seed, spread=10), _moment(seed=seed + 50, spread=5)
    found = isolated_subspace(S_new_DD, S_old_DD, rank)
    values_D, vectors_DD = scipy.linalg.eigh(S_new_DD.numpy(), S_old_DD.numpy())
    expected_Dr = torch.from_numpy(vectors_DD[:, ::-1][:, :rank].copy())
    assert _distance(found.basis[0], expected_Dr) < 1e-5
    torch.testing.assert_close(found.eigenvalues[0], torch.from_numpy(values_D[::-1].copy()), rtol=1e-5, atol=0)
    # With the recorded ridge counted in, up to rounding.
    ridged = S_old_DD + float(found.ridge) * torch.eye(D, dtype=torch.float64)
    values_D, vectors_DD = scipy.linalg.eigh(S_new_DD.numpy(), ridged.numpy())
    assert _distance(found.basis[0], torch.from_numpy(vectors_DD[:, ::-1][:, :rank].copy())) < 1e-10
    torch.testing.assert_close(found.eigenvalues[0], torch.from_numpy(values_D[::-1].copy()), rtol=1e-11, atol=0)


def test_isolated_maximises_the_ratio_trace() -> None:
    S_new_DD, S_old_DD = _moment(seed=1, spread=10), _moment(seed=2, spread=5)
    found = isolated_subspace(S_new_DD, S_old_DD, R)
    best = _ratio_trace(found.basis[0], S_new_DD, S_old_DD)
    assert best == pytest.approx(float(found.eigenvalues[0, :R].sum()), rel=1e-5)
    others = [general_subspace(S_new_DD, R).basis[0], general_subspace(torch.linalg.inv(S_old_DD), R).basis[0]]
    others += [torch.randn(D, R, generator=torch.Generator().manual_seed(s)).double() for s in range(20)]
    assert all(_ratio_trace(other_Dr, S_new_DD, S_old_DD) < best for other_Dr in others)


@pytest.mark.parametrize("factor", [1e-4, 0.1, 2.0, 1e5])
def test_isolated_span_is_unchanged_when_the_old_moment_is_scaled(factor: float) -> None:
    S_new_DD, S_old_DD = _moment(seed=3, spread=10), _moment(seed=4, spread=5)
    found, scaled = isolated_subspace(S_new_DD, S_old_DD, R), isolated_subspace(S_new_DD, factor * S_old_DD, R)
    assert _distance(found.basis[0], scaled.basis[0]) < 1e-7
    torch.testing.assert_close(scaled.eigenvalues * factor, found.eigenvalues, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_isolated_is_equivariant_under_congruence_and_plain_pca_is_not(seed: int) -> None:
    left_DD, right_DD = (torch.linalg.eigh(_moment(seed=100 + seed + side)).eigenvectors for side in (0, 10))
    T_DD = (left_DD * torch.linspace(0.3, 3, D, dtype=torch.float64)) @ right_DD.mT
    S_new_DD, S_old_DD = _moment(seed=seed, spread=10), _moment(seed=seed + 50, spread=5)

    def changed(S_DD: torch.Tensor) -> torch.Tensor:
        moved_DD = T_DD @ S_DD @ T_DD.mT
        return (moved_DD + moved_DD.mT) / 2

    before, after = isolated_subspace(S_new_DD, S_old_DD, R), isolated_subspace(changed(S_new_DD), changed(S_old_DD), R)
    mapped_Dr = torch.linalg.solve(T_DD.mT, before.basis[0])
    assert _distance(after.basis[0], mapped_Dr) < 1e-3  # the ridge is not congruent, but small
    torch.testing.assert_close(after.eigenvalues, before.eigenvalues, rtol=1e-4, atol=0)
    # The same demand on the principal directions of the new task fails by far: the test can tell the two apart.
    pca_before, pca_after = general_subspace(S_new_DD, R), general_subspace(changed(S_new_DD), R)
    assert _distance(pca_after.basis[0], torch.linalg.solve(T_DD.mT, pca_before.basis[0])) > 0.5


def test_isolated_finds_planted_private_directions_below_strong_shared_ones() -> None:
    Q_DD = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    shared_Ds, private_Dp = Q_DD[:, :5], Q_DD[:, 5:8]
    floor_DD = 1e-3 * torch.eye(D, dtype=torch.float64)
    S_old_DD = 100 * shared_Ds @ shared_Ds.mT + floor_DD
    S_new_DD = 100 * shared_Ds @ shared_Ds.mT + private_Dp @ private_Dp.mT + floor_DD
    found = isolated_subspace(S_new_DD, S_old_DD, 3)
    assert _distance(found.basis[0], private_Dp) < 1e-6
    # 100 times weaker than what is shared, they are beyond plain PCA of the new task.
    assert float((private_Dp.mT @ general_subspace(S_new_DD, 3).basis[0]).norm()) < 1e-6


def test_isolated_is_not_made_orthogonal_to_the_general_subspace() -> None:
    S_new_DD, S_old_DD = _moment(seed=6, spread=10), _moment(seed=7, spread=2)
    isolated = isolated_subspace(S_new_DD, S_old_DD, R).basis[0]
    general = general_subspace(S_old_DD + S_new_DD, R).basis[0]
    assert float((general.mT @ isolated).norm()) > 0.5


@pytest.mark.parametrize("c", [0.2, 1.0, 7.0])
def test_a_new_moment_proportional_to_the_old_has_equal_eigenvalues(c: float) -> None:
    S_old_DD = _moment(seed=8, spread=5)
    found = isolated_subspace(c * S_old_DD, S_old_DD, R)
    torch.testing.assert_close(found.eigenvalues[0], torch.full((D,), c, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["general", "isolated"])
def test_a_smaller_rank_is_a_prefix_of_a_larger_one(kind: str) -> None:
    S_new_DD, S_old_DD = _moment(seed=9, spread=10), _moment(seed=10, spread=5)

    def basis(rank: int) -> torch.Tensor:
        found = general_subspace(S_new_DD, rank) if kind == "general" else isolated_subspace(S_new_DD, S_old_DD, rank)
        return found.basis[0]

    torch.testing.assert_close(basis(2), basis(7)[:, :2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["general", "isolated"])
def test_ranks_follow_each_layers_energy(kind: str) -> None:
    eye_DD = torch.eye(D, dtype=torch.float64)
    steep, flat = torch.full((D,), 1e-3, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    steep[0] = 10.0
    S_new_LDD = torch.stack([torch.diag(steep), torch.diag(flat)])
    old_LDD = eye_DD.expand(2, D, D)
    if kind == "general":
        found = general_subspace(S_new_LDD, R, energy=0.9)
    else:
        found = isolated_subspace(S_new_LDD, old_LDD, R, energy=0.9)
    assert found.ranks.tolist() == [1, R]  # the flat layer would need 11 of 12, and is capped
    assert torch.equal(found.basis[0, :, 1:], torch.zeros(D, R - 1, dtype=torch.float64))
    torch.testing.assert_close(found.basis.norm(dim=1)[1], torch.ones(R, dtype=torch.float64))


def test_isolated_energy_is_that_of_the_pencil_not_of_the_new_moment() -> None:
    old_D, new_D = torch.ones(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    old_D[:3], new_D[:3] = 1e-2, 2.0  # three of twelve directions hold most of S_old⁻¹ S_new
    found = isolated_subspace(torch.diag(new_D), torch.diag(old_D), D, energy=0.9)
    assert found.ranks.tolist() == [3]


def test_ridge_is_relative_and_recorded() -> None:
    S_old_DD = _moment(seed=11, spread=5)
    found = isolated_subspace(_moment(seed=12), S_old_DD, R)
    torch.testing.assert_close(found.ridge[0], RELATIVE_RIDGE * S_old_DD.trace() / D)
    assert float(general_subspace(S_old_DD, R).ridge) == 0


def test_ridge_grows_tenfold_only_in_the_layer_that_needs_it() -> None:
    good_DD = _moment(seed=13, spread=5)
    values_D = torch.ones(D, dtype=torch.float64)
    values_D[0] = -5e-5  # rounding of a float32 moment: below what the first ridge lifts
    found = isolated_subspace(_moment(seed=14).expand(2, D, D), torch.stack([good_DD, torch.diag(values_D)]), R)
    first_L = RELATIVE_RIDGE * torch.stack([good_DD.trace(), values_D.sum()]) / D
    torch.testing.assert_close(found.ridge[0], first_L[0])
    torch.testing.assert_close(found.ridge[1], first_L[1] * 100)
    assert bool(torch.isfinite(found.basis).all())


def test_a_rank_deficient_old_moment_gives_its_null_space() -> None:
    Q_DD = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(15), dtype=torch.float64)).Q
    S_old_DD = Q_DD[:, : D - 3] @ Q_DD[:, : D - 3].mT
    found = isolated_subspace(torch.eye(D, dtype=torch.float64), S_old_DD, 3)
    assert _distance(found.basis[0], Q_DD[:, D - 3 :]) < 1e-6
    assert float(found.eigenvalues[0, 0]) > 1e5


def test_an_empty_old_moment_gives_the_principal_directions() -> None:
    S_new_DD = _moment(seed=16, spread=10)
    found = isolated_subspace(S_new_DD, torch.zeros(D, D), R)
    assert _distance(found.basis[0], general_subspace(S_new_DD, R).basis[0]) < 1e-6


@pytest.mark.parametrize("kind", ["general", "isolated"])
def test_the_same_moments_give_the_same_bits_and_a_fixed_sign(kind: str) -> None:
    S_new_DD, S_old_DD = _moment(seed=17, spread=10), _moment(seed=18, spread=5)

    def basis() -> torch.Tensor:
        found = general_subspace(S_new_DD, R) if kind == "general" else isolated_subspace(S_new_DD, S_old_DD, R)
        return found.basis[0]

    first_Dr = basis()
    assert torch.equal(first_Dr, basis())
    assert bool((first_Dr.gather(0, first_Dr.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("rank", [0, D + 1])
def test_a_rank_beyond_the_width_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be from 1 to"):
        general_subspace(_moment(), rank)
    with pytest.raises(ValueError, match="rank must be from 1 to"):
        isolated_subspace(_moment(), _moment(seed=1), rank)


def test_float32_moments_are_decomposed_in_float64() -> None:
    found = isolated_subspace(_moment(seed=19).float(), _moment(seed=20).float(), R)
    assert found.basis.dtype == found.eigenvalues.dtype == torch.float64
