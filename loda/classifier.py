"""Class statistics of the features, their transport as features drift, and linear classifiers from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ClassifierKind = Literal["trained", "class_means", "lda"]


@dataclass(frozen=True)
class ClassStatistics:
    """First and second moments of class features; no image is kept.

    Attributes:
        means_CD: (C, D) float32.
        counts_C: (C,) float32, images per class.
        scatter_DD: (D, D) float64, within-class scatter summed over all classes.
        covariances_CDD: (C, D, D) float32 or None; only classifier alignment needs one for each class.
    """

    means_CD: Tensor
    counts_C: Tensor
    scatter_DD: Tensor
    covariances_CDD: Tensor | None = None

    @classmethod
    def of(cls, features_ND: Tensor, labels_N: Tensor, classes: int, per_class: bool = False) -> ClassStatistics:
        """Statistics of features (N, D) with labels 0..classes-1, each present."""
        one_hot_NC = F.one_hot(labels_N, classes).to(torch.float64)
        counts_C = one_hot_NC.sum(0)
        features_ND = features_ND.to(torch.float64)
        means_CD = (one_hot_NC.mT @ features_ND) / counts_C[:, None]
        centred_ND = features_ND - means_CD[labels_N]
        covariances = None
        if per_class:
            covariances = torch.stack(
                [
                    centred_ND[labels_N == c].mT @ centred_ND[labels_N == c] / max(1.0, float(counts_C[c]) - 1)
                    for c in range(classes)
                ]
            ).float()
        return cls(means_CD.float(), counts_C.float(), centred_ND.mT @ centred_ND, covariances)

    def transported(self, map_DD: Tensor) -> ClassStatistics:
        """The statistics after features moved by ``f ↦ f M``."""
        map_DD = map_DD.to(torch.float64)
        covariances = self.covariances_CDD
        if covariances is not None:
            covariances = (map_DD.mT @ covariances.to(torch.float64) @ map_DD).float()
        means_CD = (self.means_CD.to(torch.float64) @ map_DD).float()
        return ClassStatistics(means_CD, self.counts_C, map_DD.mT @ self.scatter_DD @ map_DD, covariances)

    def joined(self, other: ClassStatistics) -> ClassStatistics:
        """These classes, then the other's."""
        covariances = None
        if self.covariances_CDD is not None and other.covariances_CDD is not None:
            covariances = torch.cat([self.covariances_CDD, other.covariances_CDD])
        return ClassStatistics(
            torch.cat([self.means_CD, other.means_CD]),
            torch.cat([self.counts_C, other.counts_C]),
            self.scatter_DD + other.scatter_DD,
            covariances,
        )


def drift_map(before_ND: Tensor, after_ND: Tensor, ridge: float) -> Tensor:
    """The linear map nearest to the identity that takes a task's features from before its training to after.

    Minimises ``‖F_before M - F_after‖² + ridge · s · ‖M - I‖²`` with ``s`` the mean diagonal of ``F_beforeᵀF_before``.
    Ours, after learnable drift compensation (Gomez-Villa et al. 2024): it is learned on the current task's own
    images, the only ones at hand, and moves the statistics of older classes. (D, D) float64.
    """
    before_ND, after_ND = before_ND.to(torch.float64), after_ND.to(torch.float64)
    gram_DD = before_ND.mT @ before_ND
    eye_DD = torch.eye(gram_DD.shape[0], dtype=torch.float64, device=gram_DD.device)
    weight = ridge * gram_DD.diagonal().mean()
    change_DD = torch.linalg.solve(gram_DD + weight * eye_DD, before_ND.mT @ (after_ND - before_ND))
    return eye_DD + change_DD


def linear_classifier(
    kind: ClassifierKind, head_weight_CD: Tensor, statistics: ClassStatistics, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) whose argmax is the prediction over all seen classes.

    Args:
        kind: ``trained``: the cosine heads as trained (published); ``class_means``: cosine to the class means;
            ``lda``: linear discriminant analysis with one shared covariance, ``Σ⁻¹μ`` and ``-½ μᵀΣ⁻¹μ``.
        head_weight_CD: (C, D), the trained heads.
        statistics: of the same classes, in the same order.
        shrinkage: share of the shared covariance that is replaced by a multiple of the identity (LDA only).
    """
    if kind == "lda":
        width = statistics.scatter_DD.shape[0]
        freedom = max(1.0, float(statistics.counts_C.sum()) - len(statistics.counts_C))
        covariance_DD = statistics.scatter_DD / freedom
        scale = covariance_DD.diagonal().mean()
        eye_DD = torch.eye(width, dtype=torch.float64, device=covariance_DD.device)
        covariance_DD = (1 - shrinkage) * covariance_DD + (shrinkage * scale + 1e-12) * eye_DD
        means_CD = statistics.means_CD.to(torch.float64)
        weight_CD = torch.linalg.solve(covariance_DD, means_CD.mT).mT
        bias_C = -0.5 * (means_CD * weight_CD).sum(-1)
        return weight_CD.float().contiguous(), bias_C.float()
    source_CD = head_weight_CD if kind == "trained" else statistics.means_CD
    weight_CD = F.normalize(source_CD.float(), dim=-1)
    return weight_CD, weight_CD.new_zeros(len(weight_CD))
