"""The files behind leases: exclusive and locked in a local directory, best effort on other filesystems."""

from __future__ import annotations

import errno
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from loda.reading import ReadingError, parse_json, read_bytes
from orchestrate.object_entries import write_object

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})  # a filesystem without hard links

LEASE_BYTES = 2**16
FIRST_BEAT = f"{0:012d}"
_BEAT_AT = len('{"beat": "')  # where the counter's digits begin: it must be the first thing in the file


class LeaseFiles(Protocol):
    """The lease files of one filesystem. A slot is whatever ``create`` returns."""

    def create(self, key: str, content: bytes) -> Any | None:
        """Write the file unless it exists; None when it does."""

    def read(self, key: str) -> bytes | None:
        """The file's content, None when absent."""

    def beat(self, key: str, token: str, slot: Any, number: int) -> bool:
        """Change the counter; False when the file is no longer ours."""

    def remove(self, key: str, token: str, slot: Any) -> None:
        """Delete the file if it is still ours."""

    def evict(self, key: str, token: str | None) -> None:
        """Delete another holder's file if it still bears this token."""


class LocalLeaseFiles:
    """Lease files in a directory.

    Creation is exclusive; deletion happens under a lock that dies with its process, after a look at whose file it is,
    so that two processes that take over one lease can't delete each other's. The heartbeat goes through the descriptor
    that created the file: it can't touch a successor's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self, key: str, content: bytes) -> int | None:
        path = self._directory / f"{key}.json"
        if path.exists():  # the usual answer to a waiter
            return None
        try:
            return self._create_linked(path, content)
        except FileExistsError:
            return None

    def _create_linked(self, path: Path, content: bytes) -> int:
        """Make the file appear with its content in one step.

        O_EXCL alone would show it empty for a moment; a waiter that meets two leases in a row at that moment would take
        them for one that stands still.
        """
        draft = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.draft")
        descriptor = self._write_new(draft, content)
        try:
            path.hardlink_to(draft)
            return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LINKS:
                raise
            return self._write_new(path, content)
        finally:
            draft.unlink(missing_ok=True)

    def _write_new(self, path: Path, content: bytes) -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:
            self._directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o644)
        try:
            os.write(descriptor, content)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return descriptor

    def read(self, key: str) -> bytes | None:
        try:
            return read_bytes(self._directory / f"{key}.json", LEASE_BYTES)
        except FileNotFoundError:
            return None
        except ReadingError:  # no lease of ours: nobody holds it, and silence will tell
            return b""

    def beat(self, key: str, token: str, slot: int, number: int) -> bool:
        os.pwrite(slot, f"{number:012d}".encode(), _BEAT_AT)
        return self._is_ours(key, slot)

    def remove(self, key: str, token: str, slot: int) -> None:
        try:
            with self._guard():
                if self._is_ours(key, slot):
                    (self._directory / f"{key}.json").unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the lease on stage %s can't be given back: %s", key, error)
        finally:
            os.close(slot)

    def evict(self, key: str, token: str | None) -> None:
        with self._guard():
            content = self.read(key)
            if content is not None and _token(content) == token:
                (self._directory / f"{key}.json").unlink(missing_ok=True)

    def _is_ours(self, key: str, slot: int) -> bool:
        try:
            return os.path.samestat(os.fstat(slot), (self._directory / f"{key}.json").stat())
        except OSError:
            return False

    @contextmanager
    def _guard(self) -> Iterator[None]:
        descriptor = os.open(self._directory / ".guard", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:  # a network filesystem without locks: the window left is microseconds wide
                logger.debug("no lock on %s: %s", self._directory, error)
            yield
        finally:
            os.close(descriptor)


class ObjectLeaseFiles:
    """Lease files on a filesystem without exclusive creation: whoever is read back after a pause has it."""

    def __init__(self, filesystem: fs.FileSystem, directory: str, settle_seconds: float = 0.1) -> None:
        self._filesystem = filesystem
        self._directory = directory
        self._settle_seconds = settle_seconds

    def create(self, key: str, content: bytes) -> bytes | None:
        if self.read(key) is not None:
            return None
        write_object(self._filesystem, self._path(key), content)
        time.sleep(self._settle_seconds)  # rivals that saw no lease either have written by now; the last one has it
        return content if self.read(key) == content else None

    def read(self, key: str) -> bytes | None:
        try:
            with self._filesystem.open_input_stream(self._path(key), compression=None) as stream:
                return stream.read(LEASE_BYTES)
        except FileNotFoundError:
            return None

    def beat(self, key: str, token: str, slot: bytes, number: int) -> bool:
        if not self._has(key, token):
            return False
        counter = f"{number:012d}".encode()
        write_object(self._filesystem, self._path(key), slot[:_BEAT_AT] + counter + slot[_BEAT_AT + len(counter) :])
        return True

    def remove(self, key: str, token: str, slot: bytes) -> None:
        try:
            self.evict(key, token)
        except OSError as error:
            logger.warning("the lease on stage %s can't be given back: %s", key, error)

    def evict(self, key: str, token: str | None) -> None:
        if self._has(key, token):
            self._filesystem.delete_file(self._path(key))

    def _has(self, key: str, token: str | None) -> bool:
        content = self.read(key)
        return content is not None and _token(content) == token

    def _path(self, key: str) -> str:
        return f"{self._directory}/{key}.json"


def _token(content: bytes) -> str | None:
    try:
        return parse_json(content).get("token")
    except (ValueError, AttributeError):
        return None
