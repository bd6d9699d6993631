"""Classifier alignment: heads that were never trained against each other learn to compete, on samples alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loda.alignment import align_classifier
from loda.classifier import ClassStatistics
from loda.head import cosines

D, SIZES = 16, [3, 3]
CLASSES = sum(SIZES)


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _planted(per_class: int = 40) -> tuple[Tensor, Tensor, ClassStatistics, Tensor]:
    """Two tasks whose heads are right among their own classes, while task 1's lean into the direction that all share.

    Features have a common part, so a head that leans that way wins everywhere: the bias of heads trained apart.
    """
    common_D = F.normalize(_randn(D, seed=1), dim=0)
    means_CD = 2 * common_D + 0.8 * F.normalize(_randn(CLASSES, D, seed=2), dim=-1)
    labels_N = torch.arange(CLASSES).repeat(per_class)
    features_ND = means_CD[labels_N] + 0.1 * _randn(len(labels_N), D, seed=3)
    statistics = ClassStatistics.of(features_ND, labels_N, CLASSES, per_class=True)
    heads_CD = F.normalize(means_CD - 2 * common_D, dim=-1)
    heads_CD[: SIZES[0]] += 0.7 * common_D
    return features_ND, labels_N, statistics, heads_CD


def _accuracy(heads_CD: Tensor, features_ND: Tensor, labels_N: Tensor) -> float:
    return float((cosines(features_ND, heads_CD).argmax(1) == labels_N).float().mean())


def _align(heads_CD: Tensor, statistics: ClassStatistics, seed: int = 0, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    given = {"samples": 64, "epochs": 5, "lr": 0.05, **options}
    return align_classifier(heads_CD, statistics, SIZES, generator, **given)  # type: ignore[arg-type]


def test_alignment_mends_a_planted_bias_between_tasks() -> None:
    features_ND, labels_N, statistics, heads_CD = _planted()
    first = labels_N < SIZES[0]
    assert _accuracy(heads_CD[: SIZES[0]], features_ND[first], labels_N[first]) > 0.95  # right within each task
    second = heads_CD[SIZES[0] :]
    assert _accuracy(second, features_ND[~first], labels_N[~first] - SIZES[0]) > 0.95
    before = _accuracy(heads_CD, features_ND, labels_N)
    after = _accuracy(_align(heads_CD, statistics), features_ND, labels_N)
    assert before < 0.7 and after > 0.9


def test_alignment_repeats_bit_for_bit_and_follows_its_generator() -> None:
    _, _, statistics, heads_CD = _planted()
    assert torch.equal(_align(heads_CD, statistics), _align(heads_CD, statistics))
    assert not torch.equal(_align(heads_CD, statistics), _align(heads_CD, statistics, seed=1))


def test_alignment_draws_nothing_from_the_global_generator() -> None:
    _, _, statistics, heads_CD = _planted()
    torch.manual_seed(1)
    first, state = _align(heads_CD, statistics), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, _align(heads_CD, statistics))


def test_alignment_leaves_its_arguments_alone() -> None:
    _, _, statistics, heads_CD = _planted()
    kept = heads_CD.clone(), statistics.means_CD.clone(), statistics.covariances_CDD.clone()  # type: ignore[union-attr]
    aligned_CD = _align(heads_CD, statistics)
    assert torch.equal(heads_CD, kept[0]) and torch.equal(statistics.means_CD, kept[1])
    assert torch.equal(statistics.covariances_CDD, kept[2])  # type: ignore[arg-type]
    assert aligned_CD.shape == heads_CD.shape and not aligned_CD.requires_grad
    assert not torch.equal(aligned_CD, heads_CD)


def test_classes_with_a_single_image_can_be_aligned() -> None:
    features_ND = _randn(CLASSES, D, seed=5)
    statistics = ClassStatistics.of(features_ND, torch.arange(CLASSES), CLASSES, per_class=True)
    aligned_CD = _align(_randn(CLASSES, D, seed=6), statistics)
    assert bool(torch.isfinite(aligned_CD).all())


def test_alignment_needs_a_covariance_of_each_class() -> None:
    features_ND, labels_N, _, heads_CD = _planted()
    with pytest.raises(ValueError, match="covariance for each class"):
        _align(heads_CD, ClassStatistics.of(features_ND, labels_N, CLASSES))


def test_one_step_is_the_published_loss_on_the_drawn_samples() -> None:
    """One epoch of one batch, without noise to speak of: means scaled by task, logits by their norms, then SGD."""
    common_D = 2 * F.normalize(_randn(D, seed=1), dim=0)  # all cosines positive, and near each other
    means_CD, heads_CD = common_D + _randn(2, D, seed=7) / 4, (common_D + _randn(2, D, seed=8) / 4) / 10
    cancels_ridge_CDD = -1e-3 * (1 - 1e-6) * torch.eye(D, dtype=torch.float64).expand(2, D, D)
    statistics = ClassStatistics(means_CD, torch.ones(2), torch.zeros(D, D, dtype=torch.float64), cancels_ridge_CDD)
    samples, lr, logit_norm = 1, 1.0, 1.0
    found = align_classifier(
        heads_CD, statistics, [1, 1], torch.Generator().manual_seed(0), samples=samples, epochs=1, lr=lr,
        logit_norm=logit_norm,
    )  # fmt: skip
    weight_CD = heads_CD.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([weight_CD], lr=lr, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(0)
    torch.randn(2, samples, D, generator=order)  # the noise is drawn first
    for label in torch.randperm(2, generator=order).tolist():
        x_D = means_CD[label] * (0.95 if label == 0 else 1.0)
        logits_C = F.normalize(x_D, dim=0) @ F.normalize(weight_CD, dim=1).mT
        norm = (logits_C[:1].norm() + logits_C[1:].norm()) / 2
        optimizer.zero_grad()
        F.cross_entropy((logits_C / (norm * logit_norm))[None], torch.tensor([label])).backward()
        optimizer.step()
    torch.testing.assert_close(found, weight_CD.detach(), rtol=0, atol=1e-3)
    assert float((found - heads_CD).abs().max()) > 0.1


def test_samples_have_shortened_means_for_older_tasks_and_a_ridge_on_the_covariance() -> None:
    means_CD = torch.eye(D)[:2]
    covariances_CDD = torch.zeros(2, D, D)
    statistics = ClassStatistics(means_CD, torch.ones(2), torch.zeros(D, D, dtype=torch.float64), covariances_CDD)
    drawn: list[Tensor] = []

    def recording(features_BD: Tensor, weight_CD: Tensor) -> Tensor:
        drawn.append(features_BD.clone())
        return cosines(features_BD, weight_CD)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loda.alignment.cosines", recording)
        draws = torch.Generator().manual_seed(0)
        align_classifier(means_CD.clone(), statistics, [1, 1], draws, samples=2000, epochs=1)
    seen_ND = torch.cat(drawn)
    for label, expected in enumerate((0.95, 1.0)):
        own = seen_ND[seen_ND[:, label] > 0.5]
        assert len(own) == 2000
        assert float(own[:, label].mean()) == pytest.approx(expected, abs=5e-3)
        assert float(own.var(0)[2:].mean()) == pytest.approx(1e-3, rel=0.1)  # the ridge on the covariance
