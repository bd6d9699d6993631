"""The section ``robustness`` of a study file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, model_validator

from loda.settings import Section

VARIANT_SECTIONS = ("method", "training", "head")


class RobustnessSettings(Section):
    """Which variants run over all evaluation orders, and what is asked of their results."""

    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,59}$")], dict[str, Any]] = Field(
        {}, description="name -> settings by key path, on top of the study file; empty: the study's own setting alone"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="training seeds; each variant runs every order under each; null: training.seed"
    )
    baseline: str | None = Field(
        None, description="differences are this variant minus each other one; null: the first variant"
    )
    alpha: float = Field(0.25, gt=0, le=1, description="share of the worst orders that CVaR averages")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of intervals; tests are at 1 less this")
    half_width: PositiveFloat = Field(0.5, description="points to either side that 'orders needed' asks for")
    resamples: int = Field(9999, ge=999, le=1_000_000, description="draws of the bootstrap")
    bootstrap_seed: int = Field(0, ge=0, description="of those draws")

    @model_validator(mode="after")
    def _variants_fit(self) -> RobustnessSettings:
        problems = []
        for name, settings in self.variants.items():
            for path in settings:
                if path.split(".")[0] not in VARIANT_SECTIONS:
                    problems.append(
                        f"variants.{name}: {path}: variants may change {', '.join(VARIANT_SECTIONS)}; all else must be "
                        "alike for orders to be paired"
                    )
                elif path == "training.seed" or (path == "training" and "seed" in (settings[path] or {})):
                    problems.append(f"variants.{name}: {path}: training seeds are listed under robustness.seeds")
        if self.baseline is not None and self.baseline not in self.variants:
            known = ", ".join(self.variants) or "none"
            problems.append(f"baseline: no variant {self.baseline!r} (variants: {known})")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: name each once, but got {list(self.seeds)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self
