"""The section of a study file that says which orders a study looks at."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from loda.settings import Section, Seed

# Later than the first studies: at their defaults they don't enter a study's digest, which so stays what it was.
LATER_KEYS = ("kind", "roots", "continuations", "depth", "similarity", "class_seeds")


class OrderSettings(Section):
    """Which task orders a search tunes on, and which disjoint ones the chosen setting is evaluated on."""

    kind: Literal["task", "class"] = Field(
        "task", description="task: a fixed partition's tasks are permuted; class: classes are permuted, then cut"
    )
    design: Literal["random", "all", "balanced", "tree", "extremes", "file"] = "random"
    tune: PositiveInt = 3
    evaluate: PositiveInt = 4
    seed: int = Seed
    file: str | None = Field(None, description="design: file; YAML or JSON with the lists 'tune' and 'evaluate'")
    roots: PositiveInt | None = Field(None, description="design: tree; how many beginnings")
    continuations: PositiveInt | None = Field(None, description="design: tree; orders of each beginning")
    depth: PositiveInt | None = Field(None, description="design: tree; how many tasks a beginning has")
    similarity: Literal["class_means", "second_moments"] = Field(
        "class_means", description="design: extremes; what tasks are compared by"
    )
    class_seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (1993, 1996, 1997), min_length=1, description="kind: class; an evaluation order for each"
    )

    @model_validator(mode="after")
    def _keys_with_their_design(self) -> OrderSettings:
        tree = [key for key in ("roots", "continuations", "depth") if getattr(self, key) is not None]
        problems = []
        if (self.design == "file") != (self.file is not None):
            problems.append("file: give a file with design: file, and only then")
        if self.design == "tree" and len(tree) < 3:
            problems.append("design: tree needs roots, continuations and depth")
        if self.design != "tree" and tree:
            problems.append(f"{', '.join(tree)}: only with design: tree")
        if self.kind == "class" and self.design != "random":
            problems.append(
                f"design: {self.design} permutes the tasks of a fixed partition; leave it out with kind: class"
            )
        if self.kind == "task" and self.class_seeds != (1993, 1996, 1997):
            problems.append("class_seeds: only with kind: class")
        if len(set(self.class_seeds)) < len(self.class_seeds):
            problems.append(f"class_seeds: name each once, but got {list(self.class_seeds)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self
