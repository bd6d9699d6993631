"""A conditional variational autoencoder of flattened LoRA weights (Shao et al. 2025, ICM-LoRA)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loda.seeds import derive_seed, generator

CHANNELS = (4, 8, 16)
STRIDE = 4


@dataclass(frozen=True)
class Scaling:
    """Each coordinate's mean and standard deviation over samples; one that never varies keeps its length."""

    mean_P: Tensor
    deviation_P: Tensor

    @classmethod
    def of(cls, samples_NP: Tensor) -> Scaling:
        """Of samples (N, P), in float64."""
        samples_NP = samples_NP.double()
        deviation_P = samples_NP.std(0, correction=0)
        return cls(samples_NP.mean(0), torch.where(deviation_P > 0, deviation_P, torch.ones_like(deviation_P)))

    def apply(self, samples_NP: Tensor) -> Tensor:
        """z-scores."""
        return (samples_NP.double() - self.mean_P) / self.deviation_P

    def undo(self, scores_NP: Tensor) -> Tensor:
        """The inverse of :meth:`apply`."""
        return scores_NP.double() * self.deviation_P + self.mean_P


class LoraGenerator(nn.Module):
    """Encoder and decoder of one-dimensional convolutions, both told the condition.

    Args:
        length: P, numbers in a flattened LoRA.
        condition: D, width of a task vector.
        latent: width of the latent code.
    """

    def __init__(self, length: int, condition: int, latent: int) -> None:
        super().__init__()
        self.length, self.latent = length, latent
        self.short = math.ceil(length / STRIDE ** len(CHANNELS))
        sizes = (1, *CHANNELS)
        steps = list(itertools.pairwise(sizes))
        self.encoder = nn.ModuleList([nn.Conv1d(i, o, STRIDE, STRIDE) for i, o in steps])
        self.to_latent = nn.Linear(CHANNELS[-1] * self.short + condition, 2 * latent)
        self.from_latent = nn.Linear(latent + condition, CHANNELS[-1] * self.short)
        self.decoder = nn.ModuleList([nn.ConvTranspose1d(o, i, STRIDE, STRIDE) for i, o in reversed(steps)])

    def encode(self, scores_NP: Tensor, condition_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code, (N, latent) each."""
        padding = self.short * STRIDE ** len(CHANNELS) - self.length
        hidden = F.pad(scores_NP, (0, padding))[:, None]
        for layer in self.encoder:
            hidden = F.silu(layer(hidden))
        mean_NZ, log_variance_NZ = self.to_latent(torch.cat([hidden.flatten(1), condition_ND], dim=1)).chunk(2, dim=1)
        return mean_NZ, log_variance_NZ

    def decode(self, code_NZ: Tensor, condition_ND: Tensor) -> Tensor:
        """z-scored LoRAs, (N, P)."""
        hidden = self.from_latent(torch.cat([code_NZ, condition_ND], dim=1)).view(len(code_NZ), CHANNELS[-1], -1)
        for index, layer in enumerate(self.decoder):
            hidden = layer(F.silu(hidden)) if index else layer(hidden)
        return hidden[:, 0, : self.length]


def trained_generator(
    scores_NP: Tensor,
    condition_ND: Tensor,
    *,
    latent: int,
    kl_weight: float,
    steps: int,
    lr: float,
    seed: int,
) -> LoraGenerator:
    """A generator fitted to z-scored LoRAs: mean squared error plus ``kl_weight`` times the Kullback-Leibler term.

    Adam on all samples at once, on the CPU in float32, whatever the device: the same bits everywhere that a CPU gives.

    Args:
        scores_NP: (N, P).
        condition_ND: (N, D), each sample's task vector, standardised.
        seed: of the start and the codes' noise.
    """
    scores_NP, condition_ND = scores_NP.float().cpu(), condition_ND.float().cpu()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(derive_seed(seed, "generator start"))
        model = LoraGenerator(scores_NP.shape[1], condition_ND.shape[1], latent)
        noise = generator(seed, "generator noise")
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(steps):
            mean_NZ, log_variance_NZ = model.encode(scores_NP, condition_ND)
            draws_NZ = torch.randn(mean_NZ.shape, generator=noise)
            code_NZ = mean_NZ + (0.5 * log_variance_NZ).exp() * draws_NZ
            error = F.mse_loss(model.decode(code_NZ, condition_ND), scores_NP)
            divergence = 0.5 * (mean_NZ.square() + log_variance_NZ.exp() - 1 - log_variance_NZ).sum(1).mean()
            optimizer.zero_grad()
            (error + kl_weight * divergence).backward()
            optimizer.step()
    return model.requires_grad_(False)
