"""What can be wrong with the entries of a search space file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from loda.errors import short
from orchestrate.parameter import Parameter, as_list, is_switch, shown

# Checks compare all with all; a search can't use more anyway.
MOST_PARAMETERS, MOST_CHOICES, MOST_POINTS, LONGEST_NAME, MOST_POSITIONS = 200, 1000, 1000, 200, 4096


def size_problems(raw: Mapping[Any, Any], points: Sequence[Any]) -> list[str]:
    """What is larger than any search can use: checks would take minutes."""
    found = []
    if len(raw) > MOST_PARAMETERS:
        found.append(f"parameters: {len(raw)}, expected at most {MOST_PARAMETERS}")
    if len(points) > MOST_POINTS:
        found.append(f"points: {len(points)}, expected at most {MOST_POINTS}")
    positions = 1
    for name, entry in raw.items():
        entry = entry if isinstance(entry, Mapping) else {}
        when, choices = entry.get("when"), entry.get("choices")
        texts = [name, *(when if isinstance(when, Mapping) else [])]
        if any(len(str(text)) > LONGEST_NAME for text in texts):
            found.append(f"parameters.{short(str(name), 40)}: a name of more than {LONGEST_NAME} characters")
        if isinstance(choices, list | tuple):
            positions *= max(1, len(choices)) if is_switch(str(name)) else 1
            if len(choices) > MOST_CHOICES:
                found.append(f"parameters.{name}.choices: {len(choices)}, expected at most {MOST_CHOICES}")
    if positions > MOST_POSITIONS:
        found.append(f"parameters: switches with {positions} positions in all, expected at most {MOST_POSITIONS}")
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def sentences(error: ValidationError) -> list[str]:
    """What pydantic found in one parameter, a line for each key."""
    found: dict[str, str] = {}
    for problem in error.errors():
        path = tuple(problem["loc"])
        key = str(path[0])
        if problem["type"] == "extra_forbidden":
            sentence = f"unknown key{nearest(key, list(Parameter.model_fields))}"
        elif key in ("choices", "when", "otherwise") and len(path) > 1:
            # One line for a value, not one for each type that it could have had.
            sentence = (
                f"expected plain values (numbers, text, true, false, null), but got {short(repr(problem['input']))}"
            )
        else:
            got = "" if problem["type"] == "missing" else f", but got {short(repr(problem['input']))}"
            sentence = f"{problem['msg'][0].lower()}{problem['msg'][1:]}{got}"
        found.setdefault(key, f"{key}: {sentence}")
    return list(found.values())


def name_problems(name: str, parameter: Parameter) -> list[str]:
    """What is wrong with a parameter's name."""
    if "/" in name or not name.strip():
        return ["not a name: expected a setting's key path such as training.lr, or a switch's name without a dot"]
    if not is_switch(name):
        return []
    found = [] if parameter.type == "categorical" else ["a name without a dot is a switch; a switch is categorical"]
    return found + ["otherwise: not for a switch, which is never applied"] * parameter.replaces


def when_problems(parameter: Parameter, earlier: Mapping[str, Parameter], names: Sequence[str]) -> list[str]:
    """What is wrong with the conditions: they may only name earlier parameters, so there are no cycles."""
    found = []
    for parent, allowed in parameter.when.items():
        if parent not in earlier:
            reason = "named before it is defined; move it up" if parent in names else "no such parameter or switch"
            found.append(f"when: {parent}: {reason}{'' if parent in names else nearest(parent, list(names))}")
        elif earlier[parent].type == "float":
            found.append(f"when: {parent}: a float never has exactly that value; use a switch")
        elif not earlier[parent].problems():
            wrong = [shown(value) for value in as_list(allowed) if not earlier[parent].match(value)[0]]
            if wrong:
                found.append(f"when: {parent}: expected {earlier[parent].expected()}, but got {', '.join(wrong)}")
    return found + ["otherwise: only together with when"] * (parameter.replaces and not parameter.when)


def point_problems(point: Mapping[Any, Any], parameters: Mapping[str, Parameter]) -> list[str]:
    """What is wrong with a point to try first; it may leave parameters to the sampler."""
    found = []
    for name, value in point.items():
        if name not in parameters:
            found.append(f"{name}: no such parameter or switch{nearest(str(name), list(parameters))}")
        elif not parameters[name].match(value)[0]:
            found.append(f"{name}: expected {parameters[name].expected()}, but got {shown(value)}")
    return found
