"""The study file: everything that a study is, validated before any work starts."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from loda.errors import ConfigError, short
from loda.reading import ReadingError, parse_yaml, read_yaml
from loda.settings import RunSettings, Section, Seed
from orchestrate.order_settings import LATER_KEYS, OrderSettings
from orchestrate.redaction import literal_secret
from orchestrate.robustness.settings import RobustnessSettings

DEFAULT_STUDY = "alphabets"


def _without_secret(uri: str) -> str:
    if problem := literal_secret(uri):
        raise ValueError(problem)
    return uri


class ObjectiveSettings(Section):
    """What the search maximises: a metric of each order, and how orders are put together."""

    metric: Literal["a_avg", "a_last", "a_last_macro"] = "a_avg"
    across_orders: Literal["mean", "worst", "cvar", "mean_minus_std"] = "cvar"
    alpha: float = Field(0.34, gt=0, le=1, description="cvar: share of the worst orders that is averaged")
    k: NonNegativeFloat = Field(1.0, description="mean_minus_std: how many standard deviations are taken off")
    multi: tuple[Literal["accuracy", "worst", "cost"], ...] | None = Field(
        None, min_length=1, description="several objectives at once: mean accuracy, worst order, seconds of computing"
    )

    @field_validator("multi")
    @classmethod
    def _each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"name each objective once, but got {list(value)}")
        return value


class SearchSettings(Section):
    """Optuna's search over a space of settings, each setting a Tune trial."""

    space: str = Field("loda", description="a name in search_spaces/, or a YAML file")
    trials: PositiveInt = 8
    sampler: Literal["tpe", "random", "gp", "cmaes", "nsga2"] = "tpe"
    seed: int = Seed
    objective: ObjectiveSettings = ObjectiveSettings()
    include_defaults: bool = Field(True, description="the study file's own setting is the first trial")


class RacingSettings(Section):
    """Whether a search stops settings on the way that can hardly win any more."""

    orders: bool = Field(False, description="stop a setting that is beaten on paired orders")
    test: Literal["t", "wilcoxon"] = Field("t", description="paired, one-sided, over the orders that both have")
    confidence: float = Field(0.9, gt=0.5, lt=1, description="of the test")
    min_orders: PositiveInt = Field(2, ge=2, description="orders before a setting may be stopped")
    tasks: bool = Field(False, description="successive halving over the tasks of the first order")
    grace_tasks: PositiveInt = Field(2, description="tasks: tasks before a setting may be stopped")
    reduction_factor: float = Field(3.0, gt=1, description="tasks: the best 1 in so many go on")

    @property
    def on(self) -> bool:
        """Whether any rule is switched on."""
        return self.orders or self.tasks


class ResourceSettings(Section):
    """Where and how the stages run; no result depends on it but through ``workers`` (rounding of sums)."""

    executor: Literal["train", "inline"] = Field(
        "train", description="Ray Train worker groups that walk orders, or inline"
    )
    workers: PositiveInt = Field(1, description="data-parallel workers of a trial")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: NonNegativeFloat = 0
    concurrent_trials: PositiveInt = Field(2, description="trials at a time, and worker groups")
    address: str | None = Field(None, description="a running Ray cluster; null: one is started on this machine")
    object_store_mb: PositiveInt = Field(200, description="Ray's shared memory when started here")
    store: str = Field("stages", description="folder or URI (s3://...) of finished stages, shared by studies")
    runs: str = Field("runs", description="folder for results, one sub-folder a study")
    sharing: bool = Field(True, description="false: every order of every setting computes all of its own steps")
    max_failures: NonNegativeInt = Field(1, description="how often workers that died over an order start again")

    @field_validator("store", "address")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        return uri if uri is None else _without_secret(uri)


class TrackingSettings(Section):
    """MLflow."""

    uri: str | None = Field(None, description="null: sqlite:///mlflow.db here; ${NAME}: from the environment")
    experiment: str | None = Field(None, description="null: the study's name")
    register_model: bool = True

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        return uri if uri is None else _without_secret(uri)


class Study(RunSettings):
    """A study: the settings of a run, the orders it is judged on, and the search over settings."""

    name: str = Field(DEFAULT_STUDY, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    orders: OrderSettings = OrderSettings()
    search: SearchSettings = SearchSettings()
    racing: RacingSettings = RacingSettings()
    robustness: RobustnessSettings = RobustnessSettings()
    resources: ResourceSettings = ResourceSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _class_orders_cut_anew(self) -> Study:
        if self.orders.kind == "class" and self.stream.partition != "published":
            raise ValueError(
                "orders.kind: class cuts the classes into tasks anew for every order, so there is no "
                f"partition: {self.stream.partition}; set stream.partition: published, or kind: task"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON types."""
        return json.loads(self.model_dump_json())

    def to_yaml(self) -> str:
        """The resolved study file."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)

    @property
    def digest(self) -> str:
        """SHA-256 of what the results depend on: all but where and how it runs and is tracked, and which other variants
        it is compared with."""
        values = self.resolved()
        for section in ("resources", "tracking", "robustness"):
            values.pop(section)
        values["workers"] = self.resources.workers
        # What came later leaves the digests of older studies alone.
        for key in LATER_KEYS:
            if getattr(self.orders, key) == getattr(OrderSettings(), key):
                del values["orders"][key]
        if self.racing == RacingSettings():
            values.pop("racing")
        if self.training.optimizer == "sgd":
            del values["training"]["optimizer"]
        if self.stream.resize is None:
            del values["stream"]["resize"]
        if self.compute.precision == "float32":
            del values["compute"]["precision"]
        for key in ("pixel_cache", "pixel_cache_gb"):  # where pixels lie changes no result
            del values["compute"][key]
        values["search"]["space"] = Path(self.search.space).name  # not where the file lies
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def with_values(self, values: Mapping[str, Any]) -> Study:
        """A copy with settings replaced by key path, ``{"method.rank_general": 4}``, validated again.

        Raises:
            ConfigError: a path that doesn't exist, or a value that isn't allowed.
        """
        resolved, problems = self.resolved(), []
        name = values.get("method.name", self.method.name)
        if name != self.method.name:  # another method's settings mean nothing to it
            resolved["method"] = {"name": name}
        for path, value in values.items():
            *parents, leaf = path.split(".")
            node: Any = resolved
            for depth, parent in enumerate(parents):
                if not isinstance(node.get(parent), dict):
                    near = difflib.get_close_matches(parent, [key for key in node if isinstance(node[key], dict)], n=1)
                    hint = f"; did you mean {'.'.join([*parents[:depth], near[0], leaf])!r}?" if near else ""
                    problems.append(f"{path}: no such setting{hint}")
                    break
                node = node[parent]
            else:
                node[leaf] = value
        try:
            study = parse_study(resolved, "these settings")
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from error
        if problems:
            raise ConfigError(problems)
        return study

    def run_settings(self) -> RunSettings:
        """Only what stages depend on."""
        return RunSettings(**{key: getattr(self, key) for key in RunSettings.model_fields})


def _known_keys(path: tuple[Any, ...], values: Any) -> list[str]:
    """Valid keys of the section that ``path`` points into."""
    model: Any = Study
    section = values
    for key in path[:-1]:
        field = model.model_fields.get(key) if isinstance(model, type) and issubclass(model, BaseModel) else None
        section = section.get(key) if isinstance(section, Mapping) else None
        if key == "method":
            from loda.methods import registry

            name = section.get("name", "loda") if isinstance(section, Mapping) else "loda"
            model = registry()[name].Settings
            continue
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _sentences(error: ValidationError, values: Any, source: str) -> list[str]:
    found = []
    for problem in error.errors():
        path = tuple(problem["loc"])
        where = short(".".join(str(part) for part in path))
        if problem["type"] == "extra_forbidden":
            known = _known_keys(path, values)
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            found.append(f"{source}: {where}: unknown key; {hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if problem["type"] in ("value_error", "missing") else f", but got {short(repr(problem['input']))}"
            found.append(f"{source}: {where + ': ' if where else ''}{message[0].lower() + message[1:]}{got}")
    return found


def parse_study(values: Any, source: str) -> Study:
    """A study from plain values.

    Raises:
        ConfigError: every problem at once, each with its key path; unknown keys with the nearest valid name.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{source}: expected a mapping of sections (name, stream, ...), but got {type(values).__name__}"
        )
    try:
        return Study(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise ConfigError(_sentences(error, values, source)) from error


def bundled_studies() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("orchestrate") / "studies"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_study(source: str | Path | None = None) -> Study:
    """A study file, or a bundled study by name; None is the default study.

    Raises:
        ConfigError: no such file or name, not YAML, or bad values (all at once).
    """
    name = str(source) if source is not None else DEFAULT_STUDY
    path = Path(name)
    if path.is_file():
        text = None
    elif name in bundled_studies():
        text = (resources.files("orchestrate") / "studies" / f"{name}.yaml").read_bytes()
    else:
        near = difflib.get_close_matches(name, bundled_studies(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(bundled_studies())
        raise ConfigError(f"no study file {name!r}; {hint}Give a YAML file or one of the bundled studies ({known})")
    try:
        values = read_yaml(path) if text is None else parse_yaml(text)
    except (ReadingError, OSError) as error:
        raise ConfigError(f"{name}: {error}") from error
    return parse_study(values if values is not None else {}, name)
