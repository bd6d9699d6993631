"""Who takes part in ``comparison.py``, and under which settings: every class-incremental method that is built in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comparison_table import SUBJECT

from loda.methods import registry
from loda.settings import RunSettings
from loda.workbench import Workbench, canonical_digest
from orchestrate.study import Study


@dataclass(frozen=True)
class Contender:
    """A method in the comparison.

    Attributes:
        lr: centre of its grid of learning rates; None: nothing to choose.
        like: the contender whose chosen values it takes over instead of choosing its own.
        training: its own settings of training, where the study's mean something else to it.
    """

    name: str
    method: dict[str, Any]
    lr: float | None = None
    like: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def contenders(study: Study) -> list[Contender]:
    """LoDA as in the study, itself without GAO, and every other class-incremental method.

    The centres are fractions of the study's rate, which is LoDA's. LoRA's scale is 1 where LoDA's branches have 0.14
    and 0.29 on the bundled study, so plain LoRA and most methods built on it want lower rates.
    """
    own: dict[str, Any] = study.method.model_dump()
    rank = own["rank_general"] + own["rank_isolated"]
    lr = study.training.lr

    def of_rank(name: str, centre: float, **training: Any) -> Contender:
        return Contender(name, {"name": name, "rank": rank}, lr=centre, training=training)

    return [
        Contender(SUBJECT, own, lr=lr),
        Contender("loda without GAO", own | {"gao": False}, like=SUBJECT),
        of_rank("sequential", lr / 4),
        of_rank("inflora", lr / 4),
        of_rank("sdlora", lr / 2),
        of_rank("olora", lr / 2),
        of_rank("keeplora", lr / 4),
        of_rank("slao", lr / 4),
        # Its steps are Adam's in a subspace of the full weights; the head keeps the rate that SGD has elsewhere.
        of_rank("coso", lr * 0.015, optimizer="adam", head_lr=lr),
        of_rank("lora_pm", lr / 2),
        of_rank("gainlora", lr / 4),
        of_rank("expert_pool", lr / 4),
        Contender("bilora", {"name": "bilora"}, lr=lr / 4),
        Contender("ranpac", {"name": "ranpac"}),
        Contender("simplecil", {"name": "simplecil", "classifier": "class_means"}),
        Contender("simplecil lda", {"name": "simplecil", "classifier": "lda"}),
        of_rank("joint", lr / 2),
    ]


def with_likes(chosen: Sequence[str], everyone: Sequence[Contender]) -> list[Contender]:
    """The contenders of these names and those whose values they take over, in the order of ``everyone``.

    Raises:
        SystemExit: an unknown name.
    """
    known = {contender.name: contender for contender in everyone}
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"--methods: no {', '.join(map(repr, unknown))} here; known: {', '.join(map(repr, known))}")
    wanted = set(chosen) | {known[name].like for name in chosen}
    return [contender for contender in everyone if contender.name in wanted]


def learning_rates(centre: float, points: int) -> list[float]:
    """``points`` values a factor of 2 apart; of an even number, one more lies below the centre than above."""
    return [centre * 2.0**power for power in range(-(points // 2), points - points // 2)]


def grid_of(contender: Contender, points: int, margins: Sequence[float]) -> list[dict[str, float]]:
    """Every setting that the contender chooses from, the same number for all; none if there is nothing to choose."""
    if contender.lr is None:
        return []
    return [{"lr": lr, "margin": margin} for margin in margins for lr in learning_rates(contender.lr, points)]


def beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate past the end of those tried, if the best one is there; None if it lies between others."""
    if best == max(rates):
        return best * 2
    return best / 2 if best == min(rates) else None


def settings_of(base: RunSettings, contender: Contender, chosen: dict[str, float]) -> RunSettings:
    """The study under another method, with its own training settings, learning rate and margin."""
    values = base.model_dump() | {"method": contender.method}
    values["training"] |= contender.training
    values["training"] |= {"lr": chosen["lr"]} if "lr" in chosen else {}
    values["head"] |= {"margin": chosen["margin"]} if "margin" in chosen else {}
    return RunSettings(**values)


def row_digest(
    bench: Workbench, base: RunSettings, contender: Contender, grid: Sequence[dict[str, float]], like: str | None
) -> str:
    """What a row of the comparison depends on beside the comparison's orders, effort and metric.

    Args:
        like: the digest of the row whose values are taken over.
    """
    settings = [settings_of(base, contender, chosen).model_dump(mode="json") for chosen in grid or [{}]]
    version = registry()[contender.method["name"]].version
    return canonical_digest({"bench": bench.root_key, "settings": settings, "version": version, "like": like})
