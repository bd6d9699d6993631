"""SD-LoRA: directions of earlier tasks stay, their magnitudes go on being trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.branch import BranchedLinear
from loda.methods.base import Observation
from loda.methods.pairs import PairMethod, PairSettings, random_down
from loda.moments import LayerMoments

CODE_MAGNITUDE = 0.8  # the authors' code starts every magnitude of every task here


class SdLoraSettings(PairSettings):
    """Published: rank 10; RR has ranks 10, 8 and 6, KD a threshold of 9e-4."""

    name: Literal["sdlora"] = "sdlora"  # type: ignore[assignment]
    reduced_ranks: dict[PositiveInt, PositiveInt] = Field(
        default_factory=dict, description="RR: smaller ranks from later tasks on, {4: 8, 8: 6}; tasks count from 0"
    )
    absorb: bool = Field(False, description="KD: a direction that the old ones span is added to their magnitudes")
    absorb_threshold: PositiveFloat = Field(9e-4, description="KD: largest squared residual of the unit direction")
    authors_code: bool = Field(False, description="as the authors' code: ‖A‖‖B‖ as norm, magnitudes reset to 0.8")


@dataclass
class Directions:
    """The earlier tasks' pairs of one layer, as trained, with the magnitude of each."""

    pairs: list[tuple[Tensor, Tensor]]  # up (d_out, r), down (r, d_in)
    magnitudes: list[float]


def inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """``⟨B₁A₁, B₂A₂⟩`` in float64, without either product."""
    (up_1, down_1), (up_2, down_2) = ((up.double(), down.double()) for up, down in (one, other))
    return float(((up_1.mT @ up_2) * (down_1 @ down_2.mT)).sum())


class SdLora(PairMethod):
    """``h = (W₀ + Σ_k α_k dir_k) x`` with ``dir_k = B_kA_k / ‖B_kA_k‖_F``: past directions frozen, all α trained.

    One α a direction and layer, so t of them in task t. The newest direction is trained as ``α_t B_t A_t`` from B = 0,
    whose norm can't be divided by; after the task it is normalised and α_t takes its norm up, which leaves the outputs
    as they were. RR: smaller ranks for later tasks. KD: after a task its unit direction is fitted on the old ones
    (least squares), and where the squared residual is within the threshold only their magnitudes change; that the
    residual is squared and relative is our reading. ``authors_code`` [code]: directions are divided by ‖A‖‖B‖, and all
    magnitudes start at 0.8 in every task, so what a task begins with isn't what the one before ended with.
    """

    name = "sdlora"
    summary = "sum of frozen unit directions, one a task, whose magnitudes are all trained on"
    source = "Wu et al. 2025, ICLR, SD-LoRA (arXiv 2501.13198)"
    Settings = SdLoraSettings
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"
    published: ClassVar[Mapping[str, Any]] = {"method.rank": 10, "training.optimizer": "adam", "training.lr": 8e-3}

    settings: SdLoraSettings

    def __init__(self, settings: SdLoraSettings) -> None:
        super().__init__(settings)
        self.past: dict[str, Directions] = {}

    def adapt_reads(self, position: int) -> dict[str, Any]:
        read = self.settings
        return {
            "rank": self.rank_at(position),
            "scale": read.scale,
            "start_seed": read.start_seed,
            "authors_code": read.authors_code,
        }

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        if not self.settings.absorb or position == 0:
            return {}
        return {"absorb": self.settings.absorb_threshold}

    def rank_at(self, position: int) -> int:
        """The rank of the direction that the task at this position gets."""
        started = [first for first in self.settings.reduced_ranks if first <= position]
        return self.settings.reduced_ranks[max(started)] if started else self.settings.rank

    def unit(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The same direction with norm 1, the up-projection scaled."""
        up_Or, down_rD = pair
        if self.settings.authors_code:
            norm = float(up_Or.double().norm() * down_rD.double().norm())
        else:
            norm = max(0.0, inner(pair, pair)) ** 0.5
        return up_Or / max(norm, torch.finfo(torch.float32).tiny), down_rD

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()
        rank, code = self.rank_at(observation.position), self.settings.authors_code
        for name, branched in model.attached.items():
            past = self.past.get(name, Directions([], []))
            for index, (pair, magnitude) in enumerate(zip(past.pairs, past.magnitudes, strict=True)):
                up_Or, down_rD = self.unit(pair)
                alpha = CODE_MAGNITUDE if code else magnitude
                branched.add(
                    f"past{index}", down_rD, up_Or, scale=alpha, train_down=False, train_up=False, train_scale=True
                )
            seed = self.settings.start_seed
            down_rD = random_down(rank, branched.base.in_features, seed, name, observation.position)
            start = CODE_MAGNITUDE if code else self.settings.scale
            branched.add("new", down_rD, scale=start, train_down=True, train_scale=True)

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for name, branched in model.attached.items():
            past = self.past.setdefault(name, Directions([], []))
            past.magnitudes = [branched.branches[f"past{index}"].number for index in range(len(past.pairs))]
            ups = [alpha * self.unit(pair)[0] for alpha, pair in zip(past.magnitudes, past.pairs, strict=True)]
            new = branched.branches["new"]
            if not self._absorbed(name, past, branched):
                past.pairs.append((new.up.detach().clone(), new.down.detach().clone()))
                size = new.number
                past.magnitudes.append(
                    size if self.settings.authors_code else size * inner(*past.pairs[-1:] * 2) ** 0.5
                )
                ups.append(new.scaled_up())
            else:
                ups = [alpha * self.unit(pair)[0] for alpha, pair in zip(past.magnitudes, past.pairs, strict=True)]
            factors[f"{name}.up"] = torch.cat(ups, dim=1)
            factors[f"{name}.down"] = torch.cat([down_rD for _, down_rD in past.pairs])
            self.facts.setdefault("magnitudes", {})[name] = past.magnitudes
        return factors

    def _absorbed(self, name: str, past: Directions, branched: BranchedLinear) -> bool:
        """Fit the new direction on the old ones; if that is close enough, add it to their magnitudes."""
        if not self.settings.absorb or not past.pairs:
            return False
        new = branched.branches["new"]
        pair = (new.scaled_up(), new.down.detach())
        size = max(0.0, inner(pair, pair)) ** 0.5
        if size == 0:
            return True
        units = [self.unit(old) for old in past.pairs]
        gram_kk = torch.tensor([[inner(a, b) for b in units] for a in units], dtype=torch.float64)
        along_k = torch.tensor([inner(a, pair) / size for a in units], dtype=torch.float64)
        fit_k = torch.linalg.lstsq(gram_kk, along_k[:, None], driver="gelsd").solution[:, 0]
        residual = float(1 - 2 * along_k @ fit_k + fit_k @ gram_kk @ fit_k)
        self.facts.setdefault("residual", {})[name] = residual
        if residual > self.settings.absorb_threshold:
            return False
        past.magnitudes = [alpha + size * float(more) for alpha, more in zip(past.magnitudes, fit_k, strict=True)]
        return True

    def weights_at_rest(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        return factors[-1:]

    def weights_in_training(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        return ()

    def state_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, past in self.past.items():
            tensors[f"{name}.magnitudes"] = torch.tensor(past.magnitudes, dtype=torch.float64)
            for index, (up_Or, down_rD) in enumerate(past.pairs):
                tensors |= {f"{name}.{index}.up": up_Or, f"{name}.{index}.down": down_rD}
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        for name in model.layers:
            magnitudes = tensors[f"{name}.magnitudes"].tolist()
            self.past[name] = Directions(
                [
                    (
                        tensors[f"{name}.{index}.up"].to(model.device),
                        tensors[f"{name}.{index}.down"].to(model.device),
                    )
                    for index in range(len(magnitudes))
                ],
                magnitudes,
            )
