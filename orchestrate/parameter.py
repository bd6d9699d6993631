"""One dimension of a search space: its range, and when it is active."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

if TYPE_CHECKING:
    import optuna

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr | None


def same(left: Any, right: Any) -> bool:
    """Equality of YAML scalars: 3 and 3.0 are the same number, but true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def is_switch(name: str) -> bool:
    """Whether a name is sampled only to decide which parameters are active, and never applied to the settings."""
    return "." not in name


class Parameter(BaseModel):
    """One dimension of a space.

    ``when`` maps earlier parameters or switches to the value, or list of values, for which this one is active.
    Where it isn't active, the setting becomes ``otherwise`` if that is given, and keeps the study's value if not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = Field(None, gt=0)
    choices: tuple[Scalar, ...] | None = None
    when: dict[str, Scalar | list[Scalar]] = {}
    otherwise: Scalar = None

    @property
    def replaces(self) -> bool:
        """Whether ``otherwise`` was given (it may be null)."""
        return "otherwise" in self.model_fields_set

    def active(self, point: Mapping[str, Any]) -> bool:
        """Whether this parameter is sampled, given the values sampled before it."""
        return all(
            parent in point and any(same(point[parent], value) for value in as_list(allowed))
            for parent, allowed in self.when.items()
        )

    def ends(self) -> tuple[Any, ...]:
        """The values that a setting must accept for the whole range to be allowed."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None and self.high is not None
        return (int(self.low), int(self.high)) if self.type == "int" else (self.low, self.high)

    def match(self, value: Any) -> tuple[bool, Any]:
        """Whether a value lies in the range, and the value as Optuna has to be told it."""
        if self.choices is not None:
            return next(((True, choice) for choice in self.choices if same(choice, value)), (False, value))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False, value
        low, high = self.ends()
        step = self.step or (1 if self.type == "int" else None)
        if step is not None and not self.log:
            if not _is_whole((value - low) / step):
                return False, value
        elif self.type == "int" and value != int(value):
            return False, value
        return low <= value <= high, int(value) if self.type == "int" else float(value)

    def expected(self) -> str:
        """The range in words."""
        if self.choices is not None:
            return "one of " + ", ".join("null" if choice is None else str(choice).lower() for choice in self.choices)
        step = f" in steps of {self.step:g}" if self.step else ""
        return f"{'a whole number' if self.type == 'int' else 'a number'} from {self.low:g} to {self.high:g}{step}"

    def sample(self, trial: optuna.trial.BaseTrial, name: str) -> Any:
        """Ask Optuna for a value."""
        if self.choices is not None:
            return trial.suggest_categorical(name, self.choices)
        low, high = self.ends()
        if self.type == "int":
            return trial.suggest_int(name, low, high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, low, high, step=self.step, log=self.log)

    def problems(self) -> list[str]:
        """What is wrong with the range itself."""
        if self.type == "categorical":
            found = [f"{key}: not for a categorical one" for key in ("low", "high", "step") if getattr(self, key)]
            found += ["log: not for a categorical one"] * self.log
            choices = self.choices or ()
            if not choices:
                found.append("choices: expected at least one value")
            if any(same(a, b) for a, b in itertools.combinations(choices, 2)):
                found.append("choices: a value is named twice")
            return found
        found = [f"choices: only for type: categorical, but this is {self.type}"] if self.choices is not None else []
        missing = [key for key in ("low", "high") if getattr(self, key) is None]
        if missing or self.low is None or self.high is None:
            return [*found, f"{' and '.join(missing)}: missing; type: {self.type} needs low and high"]
        numbers = {"low": self.low, "high": self.high, "step": self.step}
        if self.type == "int":
            fractions = [key for key, value in numbers.items() if value is not None and value != int(value)]
            found += [f"{key}: expected a whole number, but got {numbers[key]}" for key in fractions]
        if self.low > self.high:
            found.append(f"low: {self.low:g} is greater than high: {self.high:g}; swap them")
        if self.log and self.low <= 0:
            found.append(f"low: must be greater than 0 with log: true, but got {self.low:g}")
        if self.log and self.step is not None:
            found.append("step: can't be combined with log: true; leave one out")
        elif self.step is not None and not _is_whole((self.high - self.low) / self.step):
            found.append(f"high: {self.high:g} can't be reached from low: {self.low:g} by step: {self.step:g}")
        return found


def _is_whole(steps: float) -> bool:
    """Whether that many steps are a whole number of them; infinitely many are not."""
    return math.isfinite(steps) and math.isclose(steps, round(steps), abs_tol=1e-9)


def as_list(value: Any) -> list[Any]:
    """A value of ``when`` as the list of values that it allows."""
    return value if isinstance(value, list) else [value]


def shown(value: Any) -> str:
    """A scalar as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
