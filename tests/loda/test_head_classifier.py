"""Cosine heads, the CosFace loss, class statistics, their transport, and the linear classifiers made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loda.classifier import ClassStatistics, drift_map, linear_classifier
from loda.head import CosineHead, cosface_loss, cosines, random_head_weight

D, CLASSES = 6, 4


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _clusters(per_class: int = 30, seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    """Features around one mean a class, with one correlated noise for all classes."""
    labels_N = torch.arange(CLASSES).repeat(per_class)
    noise_ND = _randn(len(labels_N), D, seed=seed) @ _randn(D, D, seed=seed + 1)
    return _randn(CLASSES, D, seed=seed + 2)[labels_N] + spread * noise_ND, labels_N


def test_cosines_are_angles() -> None:
    features_BD, weight_CD = _randn(5, D, seed=1), _randn(CLASSES, D, seed=2)
    found = CosineHead(weight_CD)(features_BD)
    for b in range(5):
        for c in range(CLASSES):
            x, w = features_BD[b].tolist(), weight_CD[c].tolist()
            expected = sum(i * j for i, j in zip(x, w, strict=True)) / math.hypot(*x) / math.hypot(*w)
            assert float(found[b, c].detach()) == pytest.approx(expected, abs=1e-6)


def test_lengths_of_features_and_weights_do_not_matter() -> None:
    features_BD, weight_CD = _randn(5, D, seed=1), _randn(CLASSES, D, seed=2)
    torch.testing.assert_close(cosines(9 * features_BD, weight_CD * 0.01), cosines(features_BD, weight_CD))


def test_the_head_has_no_bias_and_its_own_copy() -> None:
    weight_CD = _randn(CLASSES, D)
    head = CosineHead(weight_CD)
    weight_CD.zero_()
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert bool(head.weight.detach().any())


@pytest.mark.parametrize("scale,margin", [(20.0, 0.0), (20.0, 0.15), (5.0, 0.4)])
def test_cosface_is_cross_entropy_with_a_margin_on_the_true_class(scale: float, margin: float) -> None:
    cosines_BC, labels_B = torch.tanh(_randn(7, CLASSES, seed=3)).double(), torch.arange(7) % CLASSES
    expected = 0.0
    for row, label in zip(cosines_BC.tolist(), labels_B.tolist(), strict=True):
        logits = [scale * (value - (margin if c == label else 0)) for c, value in enumerate(row)]
        expected += math.log(sum(math.exp(value) for value in logits)) - logits[label]
    assert float(cosface_loss(cosines_BC, labels_B, scale, margin)) == pytest.approx(expected, rel=1e-10)


def test_a_margin_makes_the_loss_harder_and_changes_no_input() -> None:
    cosines_BC, labels_B = torch.tanh(_randn(7, CLASSES, seed=3)), torch.arange(7) % CLASSES
    kept = cosines_BC.clone()
    assert cosface_loss(cosines_BC, labels_B, margin=0.2) > cosface_loss(cosines_BC, labels_B)
    assert torch.equal(cosines_BC, kept)


def test_the_loss_adds_up_over_shares_of_a_batch() -> None:
    cosines_BC, labels_B = torch.tanh(_randn(9, CLASSES, seed=4)).double(), torch.arange(9) % CLASSES
    parts = sum(cosface_loss(cosines_BC[rank::2], labels_B[rank::2]) for rank in range(2))
    torch.testing.assert_close(parts, cosface_loss(cosines_BC, labels_B), rtol=1e-12, atol=0)


def test_random_heads_start_as_a_linear_layer_does() -> None:
    weight_CD = random_head_weight(200, 64, torch.Generator().manual_seed(0))
    assert float(weight_CD.abs().max()) <= 1 / 8
    assert float(weight_CD.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.03)
    assert torch.equal(weight_CD, random_head_weight(200, 64, torch.Generator().manual_seed(0)))


def test_statistics_equal_the_slow_formulas() -> None:
    features_ND, labels_N = _clusters()
    found = ClassStatistics.of(features_ND, labels_N, CLASSES, per_class=True)
    scatter_DD = torch.zeros(D, D, dtype=torch.float64)
    assert found.covariances_CDD is not None
    for c in range(CLASSES):
        own_ND = features_ND[labels_N == c].double()
        mean_D = own_ND.mean(0)
        centred_ND = own_ND - mean_D
        scatter_DD += centred_ND.mT @ centred_ND
        torch.testing.assert_close(found.means_CD[c], mean_D.float())
        torch.testing.assert_close(found.covariances_CDD[c], torch.cov(own_ND.mT).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.scatter_DD, scatter_DD, rtol=1e-5, atol=1e-6)
    assert found.counts_C.tolist() == [30.0] * CLASSES


def test_a_class_of_one_image_has_no_covariance_to_speak_of() -> None:
    found = ClassStatistics.of(_randn(2, D), torch.tensor([0, 1]), 2, per_class=True)
    assert found.covariances_CDD is not None and not found.covariances_CDD.any()


def test_joined_statistics_are_those_of_all_classes() -> None:
    features_ND, labels_N = _clusters()
    whole = ClassStatistics.of(features_ND, labels_N, CLASSES, per_class=True)
    first, second = labels_N < 1, labels_N >= 1
    joined = ClassStatistics.of(features_ND[first], labels_N[first], 1, per_class=True).joined(
        ClassStatistics.of(features_ND[second], labels_N[second] - 1, CLASSES - 1, per_class=True)
    )
    torch.testing.assert_close(joined.means_CD, whole.means_CD)
    torch.testing.assert_close(joined.scatter_DD, whole.scatter_DD)
    torch.testing.assert_close(joined.covariances_CDD, whole.covariances_CDD)
    assert torch.equal(joined.counts_C, whole.counts_C)


def test_transport_gives_the_statistics_of_the_moved_features() -> None:
    features_ND, labels_N = _clusters()
    map_DD = (torch.eye(D) + 0.3 * _randn(D, D, seed=9)).double()
    moved = ClassStatistics.of(features_ND.double() @ map_DD, labels_N, CLASSES, per_class=True)
    found = ClassStatistics.of(features_ND.double(), labels_N, CLASSES, per_class=True).transported(map_DD)
    torch.testing.assert_close(found.means_CD, moved.means_CD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scatter_DD, moved.scatter_DD, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.covariances_CDD, moved.covariances_CDD, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.counts_C, moved.counts_C)


def test_drift_map_without_drift_is_exactly_the_identity() -> None:
    features_ND, _ = _clusters()
    assert torch.equal(drift_map(features_ND, features_ND, ridge=0.1), torch.eye(D, dtype=torch.float64))


def test_drift_map_without_drift_is_the_identity_with_fewer_images_than_features() -> None:
    features_ND = _randn(3, 40)
    assert torch.equal(drift_map(features_ND, features_ND, ridge=0.1), torch.eye(40, dtype=torch.float64))


def test_drift_map_recovers_a_planted_linear_map() -> None:
    features_ND = _clusters(per_class=50)[0].double()
    map_DD = (torch.eye(D) + 0.3 * _randn(D, D, seed=9)).double()
    found = drift_map(features_ND, features_ND @ map_DD, ridge=1e-9)
    torch.testing.assert_close(found, map_DD, rtol=0, atol=1e-6)


def test_drift_map_minimises_its_stated_objective() -> None:
    before_ND, after_ND, ridge = _randn(12, D, seed=1).double(), _randn(12, D, seed=2).double(), 0.3
    weight = ridge * float((before_ND**2).sum()) / D

    def objective(map_DD: Tensor) -> float:
        rest = map_DD - torch.eye(D, dtype=torch.float64)
        return float(((before_ND @ map_DD - after_ND) ** 2).sum() + weight * (rest**2).sum())

    found = drift_map(before_ND, after_ND, ridge)
    best = objective(found)
    for seed in range(20):
        assert objective(found + 1e-3 * _randn(D, D, seed=seed).double()) > best


def test_a_large_drift_ridge_leaves_the_statistics_alone() -> None:
    before_ND, after_ND = _randn(20, D, seed=1), _randn(20, D, seed=2)
    found = drift_map(before_ND, after_ND, ridge=1e9)
    torch.testing.assert_close(found, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-7)


def test_transport_helps_where_features_drift_linearly() -> None:
    features_ND, labels_N = _clusters()
    map_DD = torch.linalg.qr(_randn(D, D, seed=11)).Q
    new_ND = _randn(200, D, seed=12)  # the current task's images: other classes, the same drift
    statistics = ClassStatistics.of(features_ND, labels_N, CLASSES)
    moved = statistics.transported(drift_map(new_ND, new_ND @ map_DD, ridge=1e-3))

    def accuracy(given: ClassStatistics) -> float:
        weight_CD, bias_C = linear_classifier("lda", torch.zeros(CLASSES, D), given, shrinkage=0.01)
        return float((((features_ND @ map_DD) @ weight_CD.mT + bias_C).argmax(1) == labels_N).float().mean())

    assert accuracy(moved) > 0.75 and accuracy(moved) > accuracy(statistics) + 0.3


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_lda_is_the_slow_gaussian_rule(shrinkage: float) -> None:
    features_ND, labels_N = _clusters(per_class=20)
    weight_CD, bias_C = linear_classifier(
        "lda", torch.zeros(CLASSES, D), ClassStatistics.of(features_ND, labels_N, CLASSES), shrinkage
    )
    assert weight_CD.dtype == bias_C.dtype == torch.float32
    means = [features_ND[labels_N == c].double().mean(0) for c in range(CLASSES)]
    pooled_DD = torch.zeros(D, D, dtype=torch.float64)
    for x_D, label in zip(features_ND.double(), labels_N.tolist(), strict=True):
        pooled_DD += torch.outer(x_D - means[label], x_D - means[label])
    pooled_DD /= len(labels_N) - CLASSES  # unbiased: one mean was estimated for each class
    pooled_DD = (1 - shrinkage) * pooled_DD + shrinkage * pooled_DD.trace() / D * torch.eye(D, dtype=torch.float64)
    precision_DD = torch.linalg.inv(pooled_DD)
    for x_D in _randn(50, D, seed=20):
        scores = (weight_CD @ x_D + bias_C).tolist()
        slow = [float(-0.5 * (x_D.double() - m) @ precision_DD @ (x_D.double() - m)) for m in means]
        for c in range(1, CLASSES):  # log posteriors agree up to a term that all classes share
            assert scores[c] - scores[0] == pytest.approx(slow[c] - slow[0], rel=1e-3, abs=1e-3)


def test_lda_beats_class_means_where_noise_is_correlated() -> None:
    features_ND, labels_N = _clusters(per_class=200, spread=0.5)
    statistics = ClassStatistics.of(features_ND, labels_N, CLASSES)
    right = {}
    for kind in ("lda", "class_means"):
        weight_CD, bias_C = linear_classifier(kind, torch.zeros(CLASSES, D), statistics, 0.0)  # type: ignore[arg-type]
        right[kind] = float(((features_ND @ weight_CD.mT + bias_C).argmax(1) == labels_N).float().mean())
    assert right["lda"] > right["class_means"] + 0.05


def test_lda_takes_singular_scatter() -> None:
    features_ND = _randn(8, 40)
    statistics = ClassStatistics.of(features_ND, torch.arange(8) % CLASSES, CLASSES)
    weight_CD, bias_C = linear_classifier("lda", torch.zeros(CLASSES, 40), statistics, 0.1)
    assert bool(torch.isfinite(weight_CD).all()) and bool(torch.isfinite(bias_C).all())
    own = (statistics.means_CD @ weight_CD.mT + bias_C).argmax(1)
    assert own.tolist() == list(range(CLASSES))


@pytest.mark.parametrize("kind", ["trained", "class_means"])
def test_cosine_classifiers_predict_the_largest_cosine(kind: str) -> None:
    features_ND, labels_N = _clusters()
    statistics, heads_CD = ClassStatistics.of(features_ND, labels_N, CLASSES), _randn(CLASSES, D, seed=30)
    weight_CD, bias_C = linear_classifier(kind, heads_CD, statistics, 0.1)  # type: ignore[arg-type]
    source_CD = heads_CD if kind == "trained" else statistics.means_CD
    assert not bias_C.any()
    predicted_N = (features_ND @ weight_CD.mT + bias_C).argmax(1)
    assert torch.equal(predicted_N, cosines(features_ND, source_CD).argmax(1))
