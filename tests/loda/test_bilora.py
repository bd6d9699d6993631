"""BiLoRA: sparse spectra in a half-plane, dealt task by task."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loda.methods.bilora import SpectralChange, dealt_frequencies, dense, half_plane
from loda.seeds import generator
from loda.workbench import merge_factors
from tests.conftest import ALL_TARGETS, SettingsFactory
from tests.loda.running import artifact_of, run_all

SHAPES = [(4, 6), (5, 3), (6, 4), (7, 7), (1, 5)]


def _basis(shape: tuple[int, int], frequencies_n2: Tensor) -> Tensor:
    """(n, d_out · d_in): the change that each coefficient alone makes."""
    one = [dense(torch.ones(1, dtype=torch.float64), pair[None], shape).flatten() for pair in frequencies_n2]
    return torch.stack(one)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_is_the_sum_of_its_waves(shape: tuple[int, int]) -> None:
    rows, columns = shape
    frequencies_n2 = half_plane(shape)[:: max(1, rows // 2)]
    spectrum_n = torch.randn(len(frequencies_n2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_OD = torch.zeros(shape, dtype=torch.float64)
    for m in range(rows):
        for n in range(columns):
            for coefficient, (k, j) in zip(spectrum_n.tolist(), frequencies_n2.tolist(), strict=True):
                wave = math.cos(2 * math.pi * (k * m / rows + j * n / columns))
                expected_OD[m, n] += coefficient * wave / math.sqrt(rows * columns)
    torch.testing.assert_close(dense(spectrum_n, frequencies_n2, shape), expected_OD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_half_plane_is_an_orthogonal_basis_and_one_index_more_is_not(shape: tuple[int, int]) -> None:
    frequencies_H2 = half_plane(shape)
    basis_HF = _basis(shape, frequencies_H2)
    gram_HH = basis_HF @ basis_HF.mT
    off = gram_HH - gram_HH.diagonal().diag()
    assert float(off.abs().max()) < 1e-12 and float(gram_HH.diagonal().min()) > 0.49
    inside = {tuple(pair) for pair in frequencies_H2.tolist()}
    outside = [(k, j) for k in range(shape[0]) for j in range(shape[1]) if (k, j) not in inside]
    assert outside
    for k, j in outside:  # the conjugate of one inside: the same wave
        twin_1F = _basis(shape, torch.tensor([[k, j]]))
        assert float((basis_HF @ twin_1F.mT).abs().max()) > 0.49


@pytest.mark.parametrize("shape", SHAPES)
def test_tasks_get_frequencies_of_their_own_until_all_are_dealt(shape: tuple[int, int]) -> None:
    everything = {tuple(pair) for pair in half_plane(shape).tolist()}
    count = max(1, len(everything) // 3)
    hands = [dealt_frequencies(shape, count, position, generator(3, "layer")) for position in range(3)]
    dealt = [tuple(pair) for hand in hands for pair in hand.tolist()]
    assert len(set(dealt)) == len(dealt) == 3 * count and set(dealt) <= everything
    gram = _basis(shape, hands[0]) @ _basis(shape, hands[1]).mT
    assert float(gram.abs().max()) < 1e-12
    whole = dealt_frequencies(shape, 10**6, 5, generator(3, "layer"))
    assert {tuple(pair) for pair in whole.tolist()} == everything


def test_the_layer_computes_with_the_dense_change() -> None:
    frequencies_n2 = half_plane((4, 6))[2:9]
    change = SpectralChange(torch.arange(7.0), frequencies_n2, (4, 6), scale=0.5)
    x_BND = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected_OD = dense(0.5 * torch.arange(7.0), frequencies_n2, (4, 6))
    torch.testing.assert_close(change(x_BND), x_BND @ expected_OD.mT, rtol=1e-5, atol=1e-6)


def test_changes_of_different_tasks_are_orthogonal_and_stored_sparsely(tiny_settings: SettingsFactory) -> None:
    method = {"name": "bilora", "frequencies": 100}
    run = run_all(tiny_settings(method=method, backbone={"target": list(ALL_TARGETS)}, training={"lr": 0.2}))
    factors = [merge_factors(artifact_of(run, "consolidate", position)) for position in range(3)]
    layers = [name.removesuffix(".shape") for name in factors[0] if name.endswith(".shape")]
    assert len(layers) == 8
    for layer in layers:
        deltas = []
        for task in factors:
            rows, columns = task[f"{layer}.shape"].tolist()
            assert task[f"{layer}.coefficients"].shape == (100,)
            deltas.append(dense(task[f"{layer}.coefficients"].double(), task[f"{layer}.frequencies"], (rows, columns)))
        for one in range(3):
            assert float(deltas[one].norm()) > 1e-3
            for other in range(one):
                cosine = (deltas[one] * deltas[other]).sum() / deltas[one].norm() / deltas[other].norm()
                assert abs(float(cosine)) < 1e-9
