"""``NAME:PATH?key=value&key=value``: how a study names images that lie in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from loda.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """A path with options, as a source of images gets it.

    Attributes:
        name: of the source (``folder``), for messages.
        path: with ``~`` expanded.
        options: key to value.
    """

    name: str
    path: Path
    options: Mapping[str, str]

    def text(self, key: str, default: str) -> str:
        """An option's value as it stands."""
        return self.options.get(key, default)

    def share(self, key: str, default: float) -> float:
        """An option that is a share between 0 and 1, both left out.

        Raises:
            ConfigError: it is something else.
        """
        text = self.text(key, str(default))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < 1:
            raise ConfigError(f"stream.dataset: {self.name}: {key}={text}: expected a share between 0 and 1, like 0.2")
        return value

    def seed(self, key: str, default: int) -> int:
        """An option that is a whole number, not negative.

        Raises:
            ConfigError: it is something else.
        """
        text = self.text(key, str(default))
        if not (text.isascii() and text.isdigit()):
            raise ConfigError(f"stream.dataset: {self.name}: {key}={text}: expected a whole number from 0, like 0")
        return int(text)

    def file(self, key: str) -> Path | None:
        """An option that names a file, relative to the source's path; None if it isn't given.

        Raises:
            ConfigError: there is no such file.
        """
        if key not in self.options:
            return None
        file = self.path / Path(self.options[key]).expanduser()
        if not file.is_file():
            raise ConfigError(
                f"stream.dataset: {self.name}: {key}={self.options[key]}: no file {str(file)!r}; "
                f"give its path from {str(self.path)!r}, or an absolute one"
            )
        return file


def parse_source(name: str, argument: str, options: Mapping[str, str]) -> Source:
    """Take ``PATH?key=value`` apart.

    Args:
        name: of the source.
        argument: what follows ``NAME:``. In values, ``%26`` is an ``&`` and ``%2B`` a ``+``, as in web addresses.
        options: the keys that the source knows, each with an example of a value.

    Raises:
        ConfigError: no path, nothing there, or options that the source doesn't know: all at once.
    """
    text, _, query = argument.partition("?")
    known = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
    problems = []
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        pairs = []
        problems.append(f"stream.dataset: {name}: ?{query}: expected key=value&key=value; known options: {known}")
    for key in dict.fromkeys(key for key, _ in pairs):
        if key not in options:
            problems.append(f"stream.dataset: {name}: no option {key!r}; known options: {known}")
        elif sum(other == key for other, _ in pairs) > 1:
            problems.append(f"stream.dataset: {name}: option {key!r} is given twice")
        elif not dict(pairs)[key]:
            problems.append(f"stream.dataset: {name}: {key}= has no value; write {key}={options[key]}")
    path = Path(text).expanduser()
    if not text:
        problems.append(f"stream.dataset: {name}: names no path; write {name}:PATH")
    elif not path.exists():
        problems.append(f"stream.dataset: {name}: nothing at {str(path)!r}; give the path of the unpacked data set")
    if problems:
        raise ConfigError(problems)
    return Source(name, path, dict(pairs))
