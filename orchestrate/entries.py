"""What a stage store needs from the place where its entries lie, and how entries are named there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

MANIFEST_FILE = "manifest.json"
KEY = re.compile(r"[0-9a-f]{64}")


class Listed(NamedTuple):
    """One stored entry: its key, when its manifest was written (Unix seconds) and its size in bytes."""

    key: str
    written_seconds: float
    size_bytes: int


class Entries(Protocol):
    """The few operations that a stage store needs from a filesystem."""

    def exists(self, key: str) -> bool:
        """Whether the manifest is there."""

    def read(self, key: str, name: str, limit: int) -> bytes:
        """One file's content; FileNotFoundError when absent, ReadingError when it is more than ``limit`` bytes."""

    def has_remains(self, key: str) -> bool:
        """Whether something without a manifest lies where only a damaged entry can leave it."""

    def publish(self, key: str, files: Mapping[str, bytes]) -> None:
        """Make the entry appear, all of it or nothing; FileExistsError when something lies there already."""

    def set_aside(self, key: str) -> str:
        """Take a damaged entry out of the way; says where it went."""

    def listing(self) -> Iterator[Listed]:
        """All entries in key order."""

    def place(self, key: str) -> str:
        """The entry's path, for messages."""

    def check_writable(self, bytes_needed: int) -> None:
        """Raise ConfigError when entries can't be written here."""

    def free_bytes(self) -> int | None:
        """Free space, None when the filesystem doesn't say."""
