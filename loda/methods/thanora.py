"""ThanoRA, reconstructed: joint LoRA whose rank is dealt to tasks by what each asks of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Method, MethodSettings, Observation, rank_problems
from loda.subspace import fix_signs

DOWN_NORM = 1 / math.sqrt(3)  # ours: of each row of A at the start, that of a random LoRA start


class ThanoRaSettings(MethodSettings):
    """The total rank is as many directions as LoDA's two branches of 8."""

    name: Literal["thanora"] = "thanora"
    rank: PositiveInt = Field(16, description="of all blocks together; at least one more than there are tasks")
    scale: PositiveFloat = Field(1.0, description="α / r")
    orthogonality: float = Field(0.01, ge=0, description="λ of Σ ‖A_s A_tᵀ‖²")


class ThanoRa(Method):
    """Reconstructed by us. One LoRA pair whose rows are a block for each task and one that all co-operate in.

    The co-operative block has rank ⌊r/(T+1)⌋; the rest is dealt to tasks, layer by layer, in proportion to the spectral
    entropy of ``W S_tᐟ²``, with S_t the second moment of task t's inputs: at least 1 each, largest remainders first.
    The loss has ``λ Σ_{s<t} ‖A_s A_tᵀ‖²`` over all pairs of blocks. All blocks work on every image: they merge, and no
    task id is needed to predict.

    Our readings: the entropy is that of the squared singular values, normalised; a block's A starts at an orthonormal
    basis of the rows ``U_kᵀ W``, U_k the top left singular vectors of ``W S_tᐟ²`` (all images' S for the co-operative
    block), times 1/√3; B starts at zero, so nothing changes before the first step.
    """

    name = "thanora"
    summary = "joint LoRA with a block a task, ranks by spectral entropy, blocks kept orthogonal (reconstructed)"
    source = "Liang et al. 2025, ThanoRA (arXiv 2505.18640), reconstructed"
    Settings = ThanoRaSettings
    reconstructed: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    knows_tasks: ClassVar[bool] = True
    observes_tasks: ClassVar[bool] = True

    settings: ThanoRaSettings

    def problems(self, widths: Mapping[str, tuple[int, int]]) -> list[str]:
        return rank_problems("rank", self.settings.rank, widths)

    def stream_problems(self, tasks: int) -> list[str]:
        if self.settings.rank > tasks:
            return []
        return [
            f"method.rank: {self.settings.rank} can't give {tasks} tasks and the co-operative block a direction each; "
            f"use at least {tasks + 1}"
        ]

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        for width, names in observation.moments.names.items():
            for index, name in enumerate(names):
                weight_OD = model.attached[name].base.weight
                own = [
                    spectrum(weight_OD, moments.values[width][index].to(model.device))
                    for moments in observation.of_tasks
                ]
                ranks = deal_ranks(self.settings.rank, [spectral_entropy(values) for values, _ in own])
                self.facts.setdefault("ranks", {})[name] = ranks
                common = spectrum(weight_OD, observation.moments.values[width][index])
                for block, ((_, left_OO), rank) in enumerate(zip([*own, common], ranks, strict=True)):
                    rows_rD = left_OO[:, :rank].mT @ weight_OD.double()
                    down_rD = fix_signs(torch.linalg.qr(rows_rD.mT).Q).mT * DOWN_NORM
                    title = f"task{block}" if block < len(own) else "cooperative"
                    model.attached[name].add(title, down_rD, scale=self.settings.scale, train_down=True)

    def penalty(self, model: Backbone) -> Tensor | None:
        if not self.settings.orthogonality:
            return None
        terms = [overlap([b.down for b in branched.branches.values()]) for branched in model.attached.values()]
        return self.settings.orthogonality * torch.stack(terms).sum()


def spectrum(weight_OD: Tensor, S_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (d_out,) descending, and left singular vectors (d_out, d_out), of ``W Sᐟ²``; float64."""
    weight_OD = weight_OD.detach().double()
    values_O, left_OO = torch.linalg.eigh(weight_OD @ S_DD.double() @ weight_OD.mT)
    return values_O.flip(0).clamp_min(0), left_OO.flip(1)


def spectral_entropy(squares: Tensor) -> float:
    """``-Σ p log p`` of normalised squared singular values; 0 where there are none."""
    total = float(squares.sum())
    shares = squares / total if total > 0 else squares
    return max(0.0, float(torch.special.entr(shares).sum()))


def deal_ranks(rank: int, entropies: list[float]) -> list[int]:
    """Each task's rank, at least 1, and last the co-operative block's ⌊r/(T+1)⌋; they sum to ``rank``.

    Args:
        rank: r, at least T + 1.
        entropies: one a task; all zero counts as all alike.
    """
    tasks = len(entropies)
    common = rank // (tasks + 1)
    spare = rank - common - tasks
    total = math.fsum(entropies)
    quotas = [spare * (entropy / total if total > 0 else 1 / tasks) for entropy in entropies]
    ranks = [1 + math.floor(quota) for quota in quotas]
    left = rank - common - sum(ranks)
    for index in sorted(range(tasks), key=lambda i: (math.floor(quotas[i]) - quotas[i], i))[:left]:
        ranks[index] += 1
    return [*ranks, common]


def overlap(blocks: list[Tensor]) -> Tensor:
    """``Σ_{s<t} ‖A_s A_tᵀ‖²`` of blocks (r_t, d_in): zero exactly when all their row spaces are orthogonal."""
    stacked_rD = torch.cat(blocks)
    gram_rr = stacked_rD @ stacked_rD.mT
    # All pairs less those inside a block, each pair of blocks counted once.
    owner_r = torch.cat([torch.full((len(block),), index) for index, block in enumerate(blocks)]).to(gram_rr.device)
    between_rr = (owner_r[:, None] < owner_r[None]).to(gram_rr)
    return (gram_rr.square() * between_rr).sum()
