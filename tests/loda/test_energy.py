"""Second moments: streamed, sharded and in any order they are the brute-force product; ranks by energy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loda.backbone import Backbone
from loda.energy import SecondMoment, pack_symmetric, projection_energy, rank_by_energy, unpack_symmetric
from loda.moments import LayerMoments, MomentRecorder
from loda.subspace import isolated_subspace
from tests.conftest import BackboneFactory

WIDTH = 7


def _tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws) @ torch.randn(shape[-1], shape[-1], generator=draws)


def _brute_force(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row)
    return total / len(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_streaming_equals_brute_force(batch_size: int) -> None:
    x_BND = _tokens(20, 5, WIDTH)
    moment = SecondMoment(WIDTH)
    for batch in x_BND.split(batch_size):
        moment.update(batch)
    torch.testing.assert_close(moment.value()[0], _brute_force(x_BND), rtol=1e-5, atol=1e-6)
    assert moment.value().dtype == torch.float64
    assert moment.value().shape == (1, WIDTH, WIDTH)


def test_each_layer_has_its_own_moment() -> None:
    inputs = [_tokens(6, 5, WIDTH, seed=layer) for layer in range(3)]
    moment = SecondMoment(WIDTH, layers=3)
    moment.update([x[:2] for x in inputs])
    moment.update([x[2:] for x in inputs])
    for layer, x in enumerate(inputs):
        torch.testing.assert_close(moment.value()[layer], _brute_force(x), rtol=1e-5, atol=1e-6)


def test_float64_streaming_is_exact_to_rounding() -> None:
    x_BND = _tokens(20, 5, WIDTH).double()
    moment = SecondMoment(WIDTH)
    for batch in x_BND.split(3):
        moment.update(batch)
    torch.testing.assert_close(moment.value()[0], _brute_force(x_BND), rtol=1e-13, atol=1e-13)


def test_sharded_over_workers_equals_one_worker() -> None:
    x_BND = _tokens(21, 5, WIDTH).double()
    whole, shards = SecondMoment(WIDTH), [SecondMoment(WIDTH) for _ in range(4)]
    whole.update(x_BND)
    for rank, shard in enumerate(shards):
        shard.update(x_BND[rank::4])
    for shard in shards[1:]:
        shards[0].merge(shard)
    torch.testing.assert_close(shards[0].value(), whole.value(), rtol=1e-13, atol=1e-13)


def test_order_of_batches_is_irrelevant() -> None:
    batches = _tokens(40, 5, WIDTH).split(4)
    forward, backward = SecondMoment(WIDTH), SecondMoment(WIDTH)
    for batch in batches:
        forward.update(batch)
    for batch in reversed(batches):
        backward.update(batch)
    torch.testing.assert_close(forward.value(), backward.value(), rtol=1e-14, atol=1e-14)


def test_moments_are_per_token() -> None:
    x_BND = _tokens(4, 5, WIDTH).double()
    once, thrice = SecondMoment(WIDTH), SecondMoment(WIDTH)
    once.update(x_BND)
    for _ in range(3):
        thrice.update(x_BND)
    torch.testing.assert_close(once.value(), thrice.value(), rtol=1e-14, atol=0)


def test_small_batches_are_not_lost_beside_a_large_sum() -> None:
    moment = SecondMoment(1)
    moment.update(torch.full((1, 1), 1e4))  # 1e8: float32 sums would swallow every 1 that follows
    for _ in range(2000):
        moment.update(torch.ones(1, 1))
    assert float(moment.sums_LDD) == 1e8 + 2000


def test_rounding_of_products_does_not_reach_the_isolated_subspace() -> None:
    """Inputs after a LayerNorm: a strong mean and a direction without energy, both of which the pencil magnifies.

    Float32 sums of the products leave noise of 1e-7 of the largest eigenvalue, more than the ridge, where there should
    be nothing; on a DeiT's first layers that turned the isolated subspace by up to 0.1.
    """
    width = 24
    moments = {}
    for task in range(2):
        x_ND = torch.nn.functional.layer_norm(_tokens(600, width, seed=task) / 8, (width,))
        x_ND = x_ND + 12 * torch.linspace(-1, 1, width)  # LayerNorm's bias
        for batch_size in (600, 50):
            moment = SecondMoment(width)
            for batch in x_ND.split(batch_size):
                moment.update(batch)
            moments[task, batch_size] = moment.value()
    bases = [isolated_subspace(moments[1, size], moments[0, size], 4).basis[0] for size in (600, 50)]
    projectors = [basis_Dr @ basis_Dr.mT for basis_Dr in bases]
    assert float((projectors[0] - projectors[1]).abs().max()) < 1e-6


def test_value_is_exactly_symmetric() -> None:
    moment = SecondMoment(33)
    for batch in _tokens(50, 9, 33).split(7):
        moment.update(batch)
    value_LDD = moment.value()
    assert torch.equal(value_LDD, value_LDD.mT)


def test_wrong_use_is_refused() -> None:
    moment = SecondMoment(WIDTH, layers=2)
    with pytest.raises(ValueError, match="no tokens"):
        moment.value()
    with pytest.raises(ValueError, match="expected 2 tensors"):
        moment.update([_tokens(2, WIDTH)])
    with pytest.raises(ValueError, match="cannot merge"):
        moment.merge(SecondMoment(WIDTH, layers=1))


def test_packing_halves_the_numbers_and_loses_none() -> None:
    x = _tokens(3, 11, 11).double()
    symmetric_LDD = x + x.mT
    packed_LP = pack_symmetric(symmetric_LDD)
    assert packed_LP.shape == (3, 66)
    assert torch.equal(unpack_symmetric(packed_LP), symmetric_LDD)


@pytest.mark.parametrize("width", [1, 2, 32, 768, 3072])
def test_width_is_recovered_from_the_packed_size(width: int) -> None:
    packed_LP = torch.zeros(1, 1, dtype=torch.float64).expand(1, width * (width + 1) // 2)
    assert unpack_symmetric(packed_LP[:, : packed_LP.shape[1]]).shape == (1, width, width)


def test_projection_energy_is_the_captured_share() -> None:
    S_DD = _brute_force(_tokens(50, WIDTH))
    values_D, vectors_DD = torch.linalg.eigh(S_DD)
    share = projection_energy(S_DD, vectors_DD[:, -3:])
    torch.testing.assert_close(share, values_D[-3:].sum() / values_D.sum())
    torch.testing.assert_close(projection_energy(S_DD, torch.eye(WIDTH, dtype=torch.float64)), S_DD.new_ones(()))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e3), min_size=1, max_size=12).filter(lambda v: sum(v) > 1e-6),
    energy=st.floats(0.01, 1),
    cap=st.integers(1, 12),
)
def test_rank_by_energy_is_the_smallest_that_holds_the_share(values: list[float], energy: float, cap: int) -> None:
    values = sorted(values, reverse=True)
    cap = min(cap, len(values))
    rank = int(rank_by_energy(torch.tensor([values], dtype=torch.float64), energy, cap))
    total, slack = sum(values), 1e-9
    assert 1 <= rank <= cap
    if rank < cap:
        assert sum(values[:rank]) >= energy * total * (1 - slack)
    if rank > 1:
        assert sum(values[: rank - 1]) <= energy * total * (1 + slack)


def test_rank_differs_from_layer_to_layer() -> None:
    eigenvalues_LD = torch.tensor([[90.0, 9, 1, 0], [25, 25, 25, 25], [1, 0, 0, 0]], dtype=torch.float64)
    assert rank_by_energy(eigenvalues_LD, 0.9, 4).tolist() == [1, 4, 1]
    assert rank_by_energy(eigenvalues_LD, 0.99, 4).tolist() == [2, 4, 1]
    assert rank_by_energy(eigenvalues_LD, 1.0, 4).tolist() == [3, 4, 1]
    assert rank_by_energy(eigenvalues_LD, 1.0, 2).tolist() == [2, 2, 1]
    assert rank_by_energy(eigenvalues_LD, None, 2).tolist() == [2, 2, 2]


def test_rounding_below_zero_counts_as_no_energy() -> None:
    eigenvalues_LD = torch.tensor([[1.0, -1e-17, -1e-16]], dtype=torch.float64)
    assert rank_by_energy(eigenvalues_LD, 1.0, 3).tolist() == [1]


@pytest.mark.parametrize("energy,rank", [(0.5, 0), (0.5, 5), (None, 5), (0.0, 2), (1.1, 2)])
def test_impossible_ranks_and_shares_are_refused(energy: float | None, rank: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        rank_by_energy(torch.ones(1, 4, dtype=torch.float64), energy, rank)


def _record(backbone: Backbone, batches: tuple[torch.Tensor, ...]) -> LayerMoments:
    modules = {name: backbone.model.get_submodule(name) for name in backbone.layers}
    recorder = MomentRecorder(modules, backbone.layers_by_width, backbone.device)
    with torch.inference_mode():
        for batch in batches:
            backbone.features(batch)
    recorder.close()
    return recorder.value()


def test_recorder_sees_all_tokens_that_enter_each_layer(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    images_BCHW = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        backbone.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0])
        )
        for name in backbone.layers
    ]
    moments = _record(backbone, (images_BCHW,))
    assert sorted(moments.values) == [32, 128]  # fc2 takes 128, the other three 32
    assert len(moments.names[32]) == 6 and len(moments.names[128]) == 2
    for width, names in moments.names.items():
        for index, name in enumerate(names):
            assert seen[name].shape == (10, 17, width)  # 16 patches and the class token
            torch.testing.assert_close(moments.values[width][index], _brute_force(seen[name]), rtol=1e-4, atol=1e-6)
    for handle in handles:
        handle.remove()


def test_recorded_moments_do_not_depend_on_batches(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    images_BCHW = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole = _record(backbone, (images_BCHW,))
    parts = _record(backbone, images_BCHW.flip(0).split(5))
    for width in whole.values:
        torch.testing.assert_close(whole.values[width], parts.values[width], rtol=1e-5, atol=1e-6)


def test_recorder_leaves_no_hooks(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    _record(backbone, (torch.rand(2, 3, 32, 32),))
    assert not any(module._forward_pre_hooks for module in backbone.model.modules())


def test_layer_moments_survive_packing(tiny_backbone: BackboneFactory) -> None:
    backbone = tiny_backbone()
    moments = _record(backbone, (torch.rand(4, 3, 32, 32),))
    again = LayerMoments.unpacked(backbone.layers_by_width, moments.packed())
    for width in moments.values:
        assert torch.equal(again.values[width], moments.values[width])
        assert torch.equal((moments + again).values[width], moments.scaled(2).values[width])
