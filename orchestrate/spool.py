"""Operations that could not be sent, kept in order in a JSON Lines file until they can."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loda.errors import ConfigError
from loda.reading import ReadingError, parse_json, read_bytes
from orchestrate.operations import checked_operation

logger = logging.getLogger(__name__)

Operation = dict[str, Any]
SPOOL_BYTES = 2**30


class Spool:
    """A queue on disk: one JSON object a line, oldest first.

    Args:
        path: the file; it exists only while something waits in it. Lines of another form than ours are kept beside it
            in ``<name>-refused.jsonl``.

    Raises:
        ConfigError: the file is no plain file, or larger than a gigabyte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused = path.with_name(path.stem + "-refused.jsonl")
        self._waiting = list(self._read())
        if self._waiting or path.is_file():
            self._rewrite()  # without a torn last line, which the next one would be glued to

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Operation]:
        return iter(list(self._waiting))

    def _read(self) -> Iterator[Operation]:
        if not self.path.is_file():
            return
        try:
            lines = read_bytes(self.path, SPOOL_BYTES).split(b"\n")
        except ReadingError as error:
            raise ConfigError(
                f"{self.path} can't be read: {error}; move it away, and its numbers stay unsent"
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                yield checked_operation(parse_json(line), self.path.parent)
            except ReadingError as error:
                if number == len(lines):
                    return  # the process ended while it wrote its last line
                logger.warning("%s: line %d is not sent: %s; kept in %s", self.path, number, error, self.refused)
                append_line(self.refused, {"reason": str(error), "line": line.decode(errors="replace")})

    def append(self, operation: Operation) -> None:
        """Keep an operation; it is on disk when this returns."""
        self._waiting.append(operation)
        append_line(self.path, operation)

    def drop_first(self, count: int) -> None:
        """Forget the oldest operations, which have been sent. A crash before this leaves them to be sent again."""
        if count == 0:
            return
        self._waiting = self._waiting[count:]
        self._rewrite()

    def _rewrite(self) -> None:
        if not self._waiting:
            self.path.unlink(missing_ok=True)
            return
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text("".join(json.dumps(operation) + "\n" for operation in self._waiting), encoding="utf-8")
        temporary.replace(self.path)


def append_line(path: Path, value: Operation) -> None:
    """Add one JSON line to a file and wait until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
