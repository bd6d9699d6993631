"""The stage store: every finished step of a stage under its key, on any pyarrow filesystem, checked on every read."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from pyarrow import fs

from loda.errors import StageError
from loda.reading import ReadingError
from loda.state import Artifact
from orchestrate.entries import MANIFEST_FILE, Entries
from orchestrate.lease_files import LeaseFiles, LocalLeaseFiles, ObjectLeaseFiles
from orchestrate.leases import Lease, LeaseBoard, Watch
from orchestrate.manifest import DamagedEntryError, load_artifact, load_manifest, load_meta, make_manifest
from orchestrate.redaction import redact
from orchestrate.storage import NO_SPACE_ERRORS, LocalEntries, open_entries, open_filesystem

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.02, 0.2


class StageStore:
    """Artifacts by key. A key is the SHA-256 of all that the artifact depends on: 64 lowercase hexadecimal digits.

    Making a store touches no disk. Every method raises ValueError for a malformed key and StageError, with the path and
    the reason, when the filesystem fails.

    The loop of somebody who wants a stage, computing it when nobody else does::

        while (artifact := store.read(key)) is None:
            with store.lease(key, owner="trial 7") as lease:
                if lease is not None:  # None: it was stored while this process waited
                    store.write(key, compute(), step="adapt")

    Args:
        uri: a local path or a URI that pyarrow knows: ``file://``, ``s3://``, ``gs://``, ``hdfs://``.
        filesystem: an open filesystem on which ``uri`` is a plain path, instead of one found by URI.
        writer: facts about the writer, such as package versions, kept in each manifest.
        lease_timeout_seconds: how long a lease lives without a heartbeat.

    Raises:
        ConfigError: no filesystem for the URI.
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        filesystem: fs.FileSystem | None = None,
        writer: Mapping[str, Any] | None = None,
        lease_timeout_seconds: float = 20.0,
    ) -> None:
        self.uri = str(uri)
        opened, root = open_filesystem(uri) if filesystem is None else (filesystem, self.uri)
        self._entries = open_entries(opened, root)
        self._writer = dict(writer or {})
        self._distrusted: set[str] = set()  # damaged, and lying where nothing can be moved
        files: LeaseFiles
        if isinstance(self._entries, LocalEntries):
            files = LocalLeaseFiles(self._entries.root / "leases")
        else:
            files = ObjectLeaseFiles(opened, f"{root}/leases" if root else "leases")
        self._leases = LeaseBoard(files, lease_timeout_seconds)

    def has(self, key: str) -> bool:
        """Whether the key is stored. Contents are checked by ``read``."""
        return key not in self._distrusted and self._entries.exists(_checked(key))

    def read(self, key: str) -> Artifact | None:
        """The artifact, None when it isn't stored or is damaged.

        Every file's size and SHA-256 and the artifact's digest are checked. A damaged entry is moved to
        ``<root>/damaged/`` (deleted on object stores), with a warning, so that it is computed again.
        """
        return self._checked_read(key, load_artifact)

    def meta(self, key: str) -> dict[str, Any] | None:
        """The artifact's ``meta`` without reading tensors; checked and None as in ``read``."""
        document = self._checked_read(key, load_meta)
        return None if document is None else document["meta"]

    def timings(self, key: str) -> dict[str, float] | None:
        """The artifact's ``timings`` in seconds without reading tensors; checked and None as in ``read``."""
        document = self._checked_read(key, load_meta)
        return None if document is None else document["timings"]

    def write(self, key: str, artifact: Artifact, step: str) -> str:
        """Store an artifact; it appears whole or not at all, and is on the disk when this returns.

        Whoever is first wins: an intact entry that is there already stays. A different digest in it is logged, because
        the stage is then not the pure function that its key promises.

        Args:
            step: which of a stage's steps this is, for planning.

        Returns:
            The digest of what is stored now.

        Raises:
            StageError: no space left or another failure of the filesystem; what was stored before is untouched.
        """
        _checked(key)
        files = artifact.to_files()
        files[MANIFEST_FILE] = make_manifest(key, step, artifact.digest, files, self._writer)
        for _attempt in range(3):
            try:
                if not self._entries.exists(key):
                    self._entries.publish(key, files)
                    self._distrusted.discard(key)
                    return artifact.digest
            except FileExistsError:
                pass  # another writer was faster, or the remains of a damaged entry lie there
            except OSError as error:
                raise self._write_error(key, step, sum(map(len, files.values())), error) from error
            stored = self.read(key)  # moves it aside if it can't be trusted
            if stored is None:
                continue
            if stored.digest != artifact.digest:
                logger.warning(
                    "step %s is not deterministic: %s holds digest %s, but this time it came to %s; keeping the former",
                    *(step, self._entries.place(key), stored.digest, artifact.digest),
                )
            return stored.digest
        raise StageError(f"{self._entries.place(key)} is damaged and can't be replaced: delete it by hand")

    def check_writable(self, bytes_needed: int = 0) -> None:
        """Make sure, before a study starts, that it can be stored; clears what killed writers left.

        Raises:
            ConfigError: the store can't be written, or has less than ``bytes_needed`` free.
        """
        self._entries.check_writable(bytes_needed)

    def keys(self) -> Iterator[str]:
        """Keys of all entries, sorted."""
        return (entry.key for entry in self._entries.listing())

    def size_bytes(self) -> int:
        """Bytes in all entries; damaged ones set aside don't count."""
        return sum(entry.size_bytes for entry in self._entries.listing())

    def mean_seconds_by_step(self, newest: int = 200) -> dict[str, float]:
        """Mean of ``timings["seconds"]`` by step over the newest entries that have it, for planning."""
        return {step: seconds for step, (seconds, _) in self.mean_costs_by_step(newest=newest).items()}

    def mean_costs_by_step(
        self, keys: Iterable[str] | None = None, newest: int = 200
    ) -> dict[str, tuple[float, float]]:
        """Mean seconds and mean bytes by step, over the entries of these keys (None: the newest) that have seconds."""
        if keys is None:
            listing = sorted(self._entries.listing(), key=lambda entry: -entry.written_seconds)
            keys = [entry.key for entry in listing[:newest]]
        costs: dict[str, list[tuple[float, int]]] = {}
        for key in keys:
            try:
                manifest = load_manifest(self._entries, key)
                timings = load_meta(self._entries, key, manifest)["timings"]
            except (DamagedEntryError, FileNotFoundError):
                continue  # a plan moves nothing; whoever needs the entry will find out
            if "seconds" in timings:
                size = sum(file["bytes"] for file in manifest["files"].values())
                costs.setdefault(manifest["step"], []).append((timings["seconds"], size))
        return {step: (mean(c[0] for c in found), mean(c[1] for c in found)) for step, found in sorted(costs.items())}

    def acquire_or_wait(
        self,
        key: str,
        owner: str,
        timeout: float | None = None,
        on_wait: Callable[[Mapping[str, Any], float], None] | None = None,
    ) -> Lease | None:
        """The lease on a key, or None as soon as the key is stored.

        Not re-entrant: who holds a lease and asks for it again waits for itself.

        Args:
            owner: who asks, for messages to others.
            timeout: give up after so many seconds; None waits as long as the holder lives.
            on_wait: called at each poll (20 to 200 ms) with what the lease file says (``owner``, ``pid``, ``host``) and
                the seconds waited; may raise to stop waiting.

        Raises:
            StageError: the timeout passed, or leases can't be written.
        """
        started, watch, pause = time.monotonic(), Watch(), _FIRST_POLL_SECONDS
        while not self.has(key):
            try:
                lease = self._leases.try_acquire(key, owner)
                holder = None if lease else self._leases.evict_if_dead(key, watch)
            except OSError as error:
                raise StageError(
                    f"store {redact(self.uri)}: the lease on stage {key} can't be written: {error}"
                ) from error
            if lease is not None:
                if not self.has(key):  # its last holder may have stored it between the two questions
                    return lease
                lease.release()
                return None
            if holder is None:
                continue  # gone or cleared away: try again at once
            waited = time.monotonic() - started
            if timeout is not None and waited >= timeout:
                raise StageError(
                    f"stage {key}: waited {waited:.1f} s for {holder.get('owner', 'unknown')} (process "
                    f"{holder.get('pid')} on {str(holder.get('host')).partition('/')[0]}), which still computes it"
                )
            if on_wait is not None:
                on_wait(holder, waited)
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_POLL_SECONDS)
        return None

    @contextmanager
    def lease(self, key: str, owner: str, timeout: float | None = None) -> Iterator[Lease | None]:
        """``acquire_or_wait`` as a context: the lease is given back at the end."""
        lease = self.acquire_or_wait(key, owner, timeout)
        try:
            yield lease
        finally:
            if lease is not None:
                lease.release()

    def _checked_read(self, key: str, load: Callable[[Entries, str, dict[str, Any]], Any]) -> Any | None:
        place = self._entries.place(_checked(key))
        if key in self._distrusted:
            return None
        for _attempt in range(3):
            manifest: dict[str, Any] | None = None
            try:
                manifest = load_manifest(self._entries, key)
                return load(self._entries, key, manifest)
            except FileNotFoundError:
                if manifest is None and not self._entries.has_remains(key):
                    return None
                reason = f"{'manifest' if manifest is None else 'data file'} missing"
            except DamagedEntryError as damage:
                reason = str(damage)
            except OSError as error:  # no permission, too many files, network down: says nothing about the contents
                raise StageError(f"{place} can't be read: {error}") from error
            if self._unchanged(key, manifest):
                self._set_aside(key, reason)
                return None
        return None

    def _unchanged(self, key: str, manifest: dict[str, Any] | None) -> bool:
        """Whether the entry is the one just read, and not a new one that took a damaged one's place meanwhile."""
        try:
            return load_manifest(self._entries, key) == manifest
        except FileNotFoundError:
            return manifest is None and self._entries.has_remains(key)
        except DamagedEntryError:
            return True

    def _set_aside(self, key: str, reason: str) -> None:
        place = self._entries.place(key)
        try:
            moved = self._entries.set_aside(key)
        except FileNotFoundError:
            return  # another reader was faster
        except (OSError, ReadingError) as error:
            self._distrusted.add(key)
            moved = f"nowhere ({error}), ignored from now on"
        logger.warning("%s is damaged: %s; moved to %s; it will be computed again", place, reason, moved)

    def _write_error(self, key: str, step: str, needed: int, error: OSError) -> StageError:
        place = self._entries.place(key)
        if error.errno not in NO_SPACE_ERRORS:
            return StageError(f"step {step} can't be stored in {place}: {error}")
        free = self._entries.free_bytes()
        return StageError(
            f"step {step} can't be stored in {place}: {error.strerror}; needs {needed:,} bytes"
            f"{'' if free is None else f', {free:,} free'}. Nothing stored before is lost: free space and resume"
        )


def _checked(key: str) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"stage key {key!r}: expected 64 lowercase hexadecimal digits")
    return key
