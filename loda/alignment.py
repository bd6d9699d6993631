"""Classifier alignment: after each task, train all heads on Gaussian samples of the features of every seen class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loda.classifier import ClassStatistics
from loda.head import cosines

# As published (Zhang et al. 2023, SLCA; the same values in He et al. 2026).
COVARIANCE_RIDGE = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def align_classifier(
    head_weight_CD: Tensor,
    statistics: ClassStatistics,
    task_sizes: list[int],
    generator: torch.Generator,
    *,
    samples: int = 256,
    epochs: int = 5,
    lr: float = 0.01,
    logit_norm: float = 0.2,
) -> Tensor:
    """The heads of all seen classes, re-trained on samples (He et al. 2026, option +CA).

    Class means are scaled by ``0.9 + 0.1 · task / t``; logits are divided by the mean of their per-task norms
    times ``logit_norm``; cross-entropy over all seen classes; SGD with a cosine schedule per epoch.

    Args:
        head_weight_CD: (C, D) cosine heads of all seen classes, tasks in order.
        statistics: with a covariance for each class.
        task_sizes: classes of each task so far, summing to C.
        generator: draws samples and batches.
        samples: per class and epoch, also the batch size.

    Returns:
        (C, D), a new tensor.
    """
    if statistics.covariances_CDD is None:
        raise ValueError("classifier alignment needs a covariance for each class")
    classes, width = statistics.means_CD.shape
    tasks = len(task_sizes)
    task_C = torch.repeat_interleave(torch.arange(1, tasks + 1), torch.tensor(task_sizes))
    scale_C1 = (0.9 + 0.1 * task_C / tasks)[:, None].to(statistics.means_CD)
    means_CD = statistics.means_CD * scale_C1
    ridge_DD = COVARIANCE_RIDGE * torch.eye(width, dtype=torch.float64)
    factors_CDD = torch.linalg.cholesky(statistics.covariances_CDD.to(torch.float64) + ridge_DD).float()
    weight_CD = head_weight_CD.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([weight_CD], lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    labels_N = torch.arange(classes).repeat_interleave(samples)
    for _ in range(epochs):
        noise_CSD = torch.randn(classes, samples, width, generator=generator)
        features_ND = (means_CD[:, None] + noise_CSD @ factors_CDD.mT).flatten(0, 1)
        for batch_S in torch.randperm(len(labels_N), generator=generator).split(samples):
            logits_SC = cosines(features_ND[batch_S], weight_CD)
            norms_TS = torch.stack([part.norm(dim=-1) for part in logits_SC.split(task_sizes, dim=1)]) + 1e-7
            loss = F.cross_entropy(logits_SC / (norms_TS.mean(0)[:, None] * logit_norm), labels_N[batch_S])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return weight_CD.detach()
