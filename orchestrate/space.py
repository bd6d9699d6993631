"""Search spaces: which settings a search may change, read from YAML and checked before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loda.errors import ConfigError, short
from loda.methods import registry
from loda.reading import ReadingError, parse_yaml, read_yaml
from orchestrate.parameter import Parameter, is_switch, same, shown
from orchestrate.space_checks import name_problems, nearest, point_problems, sentences, size_problems, when_problems

if TYPE_CHECKING:
    import optuna

    from orchestrate.study import Study

Point = dict[str, Any]

# Anything else would change the problem that is scored (stream, orders, seeds) or not change the score at all.
SEARCHABLE = ("backbone", "method", "training", "head")
FIXED = ("method.name", "training.seed")


class SearchSpace(BaseModel):
    """An ordered set of parameters for one method, and points to try first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    method: str
    parameters: dict[str, Parameter]
    points: tuple[Point, ...] = ()

    @property
    def conditional(self) -> bool:
        """Whether some parameter isn't always active."""
        return any(parameter.when for parameter in self.parameters.values())

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Sample a point, define-by-run, and return the settings to apply: key path -> value, without switches."""
        point: Point = {}
        for name, parameter in self.parameters.items():
            if parameter.active(point):
                point[name] = parameter.sample(trial, name)
        return self.settings_of(point)

    def settings_of(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to apply for a point, such as the ``params`` of an Optuna trial."""
        settings: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if is_switch(name):
                continue
            if name in point:
                settings[name] = point[name]
            elif parameter.replaces and not parameter.active(point):
                settings[name] = parameter.otherwise
        return settings

    def from_settings(self, study: Study) -> Point | None:
        """The study's own setting as a point of this space; None if it lies outside (:meth:`outside` says why)."""
        point, reasons = self._locate(study)
        return None if reasons else point

    def outside(self, study: Study) -> list[str]:
        """Why the study's own setting is no point of this space; empty if it is one."""
        return self._locate(study)[1]

    def _locate(self, study: Study) -> tuple[Point, list[str]]:
        """The point that fits best over all positions of the switches, and what doesn't fit."""
        resolved = study.resolved()
        switches = {name: parameter.ends() for name, parameter in self.parameters.items() if is_switch(name)}
        found = []
        for positions in itertools.product(*switches.values()):
            found.append(self._locate_with(resolved, dict(zip(switches, positions, strict=True))))
            if not found[-1][1]:
                break
        return min(found, key=lambda candidate: len(candidate[1]))

    def _locate_with(self, resolved: Mapping[str, Any], switches: Mapping[str, Any]) -> tuple[Point, list[str]]:
        point: Point = {}
        reasons = []
        for name, parameter in self.parameters.items():
            active = parameter.active(point)
            if is_switch(name):
                if active:
                    point[name] = switches[name]
                continue
            known, value = _value_at(resolved, name)
            if not known:
                reasons.append(f"{name}: the study has no such setting")
            elif active:
                fits, point[name] = parameter.match(value)
                if not fits:
                    reasons.append(f"{name}: expected {parameter.expected()}, but the study has {shown(value)}")
            elif parameter.replaces and not same(parameter.otherwise, value):
                reasons.append(f"{name}: {shown(parameter.otherwise)} here, but the study has {shown(value)}")
        return point, reasons

    def extremes(self, study: Study) -> list[tuple[str, Study]]:
        """The study at both ends of each range and at each choice, one at a time, with what was set: for checks
        that need more than the settings, such as ranks against a backbone's widths."""
        return [
            (f"{name}: {shown(value)}", study.with_values({name: value}))
            for name, parameter in self.parameters.items()
            if not is_switch(name)
            for value in parameter.ends()
        ]

    def problems(self, study: Study) -> list[str]:
        """Why this space can't search for that study: method, settings that it hasn't, values that they refuse."""
        found = []
        resolved = study.resolved()
        other_method = self.method != study.method.name
        if other_method:
            found.append(
                f"search space {self.name!r} is for method {self.method!r}, but the study's method is "
                f"{study.method.name!r}; set search.space or method.name"
            )
        for name, parameter in self.parameters.items():
            section = name.split(".")[0]
            if is_switch(name) or (other_method and section == "method"):
                continue
            where = f"search space {self.name!r}: {name}"
            if section not in SEARCHABLE or name in FIXED:
                found.append(f"{where}: can't be searched; only settings in {', '.join(SEARCHABLE)} (no seeds) can")
                continue
            if not _is_setting(resolved, name):
                found.append(f"{where}: no such setting{nearest(name, _paths(resolved))}")
                continue
            values = [*parameter.ends(), *([parameter.otherwise] if parameter.replaces else [])]
            refused = []
            for value in values:
                try:
                    study.with_values({name: value})
                except ConfigError as error:
                    # The message repeats the path and the source, which are already said.
                    refused.append(f"{shown(value)} ({error.problems[0].rpartition(f'{name}: ')[2]})")
            if refused:
                found.append(f"{where}: the setting refuses {'; '.join(refused)}")
        return found


def _paths(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for key, value in values.items():
        paths += _paths(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return [path for path in paths if path.split(".")[0] in SEARCHABLE]


def _value_at(values: Any, path: str) -> tuple[bool, Any]:
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return False, None
        values = values[key]
    return True, values


def _is_setting(values: Mapping[str, Any], path: str) -> bool:
    known, value = _value_at(values, path)
    # Further arguments of the backbone's constructor have no list of names.
    return (known and not isinstance(value, Mapping)) or path.startswith("backbone.options.")


def bundled_spaces() -> list[str]:
    """Names of the spaces that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("search_spaces").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_space(source: str | Path) -> SearchSpace:
    """A search space from a YAML file, or a bundled one by name.

    Raises:
        ConfigError: no such file or name, not YAML, or bad values (all at once).
    """
    name, path = str(source), Path(source)
    if path.is_file():
        text = None
    elif name in bundled_spaces():
        text = (resources.files("search_spaces") / f"{name}.yaml").read_bytes()
    else:
        known = bundled_spaces()
        raise ConfigError(
            f"search.space: no search space or file {name!r}{nearest(name, known)} (bundled: {', '.join(known)})"
        )
    try:
        values = read_yaml(path) if text is None else parse_yaml(text)
    except (ReadingError, OSError) as error:
        raise ConfigError(f"{name}: {error}") from error
    return parse_space(values, name)


def parse_space(values: Any, source: str) -> SearchSpace:
    """A search space from plain values.

    Raises:
        ConfigError: every problem at once, each with its key path; unknown keys with the nearest valid name.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected a mapping with method and parameters, but got {type(values).__name__}")
    found: list[str] = []
    keys = ("description", "method", "parameters", "points")
    found += [f"{short(str(key))}: unknown key{nearest(str(key), keys)}" for key in values if key not in keys]
    if not isinstance(values.get("description", ""), str):
        found.append(f"description: expected text, but got {short(repr(values['description']))}")
    method = values.get("method")
    if not isinstance(method, str) or method not in registry():
        found.append(f"method: unknown method {short(repr(method))}{nearest(str(method), list(registry()))}")
    raw = values.get("parameters")
    if not isinstance(raw, Mapping) or not raw:
        found.append(f"parameters: expected a mapping of at least one parameter, but got {short(repr(raw))}")
        raw = {}
    points = values.get("points") or []
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        found.append(f"points: expected a list of mappings from parameter to value, but got {short(repr(points))}")
        points = []
    if too_large := size_problems(raw, points):
        raise ConfigError([f"{source}: {problem}" for problem in [*found, *too_large]])
    parameters: dict[str, Parameter] = {}
    for name, entry in raw.items():
        where = f"parameters.{name}"
        if not isinstance(entry, Mapping):
            found.append(f"{where}: expected a mapping with the key type, but got {short(repr(entry))}")
            continue
        try:
            parameter = Parameter(**{str(key): value for key, value in entry.items()})
        except ValidationError as error:
            found += [f"{where}.{sentence}" for sentence in sentences(error)]
            continue
        problems = [*name_problems(str(name), parameter), *parameter.problems()]
        problems += when_problems(parameter, parameters, [str(other) for other in raw])
        found += [f"{where}: {problem}" for problem in problems]
        parameters[str(name)] = parameter
    if not found:  # a point can only be judged by valid parameters
        for index, point in enumerate(points):
            found += [f"points[{index}].{problem}" for problem in point_problems(point, parameters)]
    if found:
        raise ConfigError([f"{source}: {problem}" for problem in found])
    return SearchSpace(
        name=Path(source).stem if "/" in source or source.endswith((".yaml", ".yml")) else source,
        description=values.get("description", ""),
        method=str(method),
        parameters=parameters,
        points=tuple({name: parameters[name].match(value)[1] for name, value in point.items()} for point in points),
    )
