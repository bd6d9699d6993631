"""The variants of a robustness study, checked before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loda.errors import ConfigError
from loda.methods import build_method
from loda.workbench import canonical_digest
from orchestrate.robustness.analysis import Questions
from orchestrate.robustness.tidy import Design
from orchestrate.session import Session
from orchestrate.study import Study
from orchestrate.work import OrderWork


@dataclass(frozen=True)
class Cell:
    """A variant under one training seed: what runs over all orders.

    Attributes:
        variant: its name.
        seed: training seed.
        settings: key path -> value, on top of the study file, the seed among them.
        study: the study with these settings.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    study: Study

    @property
    def name(self) -> str:
        """Of its MLflow run; other settings under an old name are another run."""
        digest = canonical_digest(self.study.run_settings().model_dump(mode="json"))
        return f"{self.variant}-seed-{self.seed}-{digest[:6]}"


def variant_settings(study: Study) -> dict[str, dict[str, Any]]:
    """The variants by name; the study's own setting, named after its method, where none are listed."""
    return study.robustness.variants or {study.method.name: {}}


def training_seeds(study: Study) -> tuple[int, ...]:
    """Seeds under which every variant runs; the study's own where none are listed."""
    return study.robustness.seeds or (study.training.seed,)


def make_cells(session: Session) -> list[Cell]:
    """Every variant under every training seed.

    Raises:
        ConfigError: all problems of all variants, each with the variant's name.
    """
    problems: list[str] = []
    cells: list[Cell] = []
    for name, settings in variant_settings(session.study).items():
        for seed in training_seeds(session.study):
            full = {**settings, "training.seed": seed}
            try:
                study = session.study.with_values(full)
            except ConfigError as error:
                found = [problem.removeprefix("these settings: ") for problem in error.problems]
            else:
                found = build_method(study.method).problems(session.bench.backbone.widths)
                cells.append(Cell(name, seed, full, study))
            problems += [f"robustness.variants.{name}: {problem}" for problem in found]
    by_settings: dict[str, str] = {}
    for cell in cells:
        key = canonical_digest(cell.study.run_settings().model_dump(mode="json"))
        other = by_settings.setdefault(key, cell.variant)
        if other != cell.variant:
            problems.append(f"robustness.variants.{cell.variant}: the same settings as {other}; leave one of them out")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return cells


def root_of(work: OrderWork) -> str:
    """The label that orders of one tree root share; an order's own name outside trees."""
    return work.root or work.name


def make_design(session: Session, works: Sequence[OrderWork]) -> Design:
    """What a complete study holds."""
    return Design(
        settings=tuple(variant_settings(session.study)),
        roots={work.name: root_of(work) for work in works},
        seeds=training_seeds(session.study),
        tasks=len(session.bench.tasks),
        own_tasks=any(work.classes is not None for work in works),
    )


def make_questions(study: Study) -> Questions:
    """What the study asks of its results."""
    values = study.robustness
    return Questions(
        baseline=values.baseline or next(iter(variant_settings(study))),
        alpha=values.alpha,
        confidence=values.confidence,
        half_width=values.half_width,
        resamples=values.resamples,
        seed=values.bootstrap_seed,
    )


def describe(cells: Sequence[Cell]) -> dict[str, Any]:
    """Each variant's method and settings, for the document."""
    return {
        cell.variant: {
            "method": cell.study.method.name,
            "joint": build_method(cell.study.method).joint,
            "settings": {key: value for key, value in cell.settings.items() if key != "training.seed"},
        }
        for cell in cells
    }
