"""Operations that could not be sent, kept in order in a JSON Lines file until they can."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Operation = dict[str, Any]


class Spool:
    """A queue on disk: one JSON object a line, oldest first.

    Args:
        path: the file; it exists only while something waits in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return  # the process ended while it wrote its last line

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
