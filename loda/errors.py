"""Errors that a user can do something about."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """Bad input, found before any work starts: every problem at once.

    Args:
        problems: one sentence each, naming the file, key or value, what was expected and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def short(value: object, most: int = 200) -> str:
    """A value as a message shows it: long ones are cut."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


class StageError(RuntimeError):
    """A stage could not be computed or a stored one does not check out; names the stage and the reason."""
