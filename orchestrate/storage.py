"""Where stage entries lie: a local directory with atomic renames, or any other pyarrow filesystem.

Both kinds keep ``<root>/<key[:2]>/<key>/<file>``. An entry exists when its manifest does.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from pyarrow import fs

from loda.errors import ConfigError
from loda.reading import inside, read_bytes
from orchestrate.entries import KEY, MANIFEST_FILE, Entries, Listed
from orchestrate.object_entries import ObjectEntries
from orchestrate.processes import host_identity
from orchestrate.redaction import expand, redact

NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}-([0-9a-f]{8})-(\d+)-[0-9a-f]{32}\.tmp")


def open_filesystem(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem and path behind a URI; a plain path is a local one.

    Raises:
        ConfigError: no filesystem for the URI.
    """
    if "://" not in str(uri):
        return fs.LocalFileSystem(), str(Path(uri).absolute())
    address = expand(str(uri), "resources.store")
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        reason = redact(str(error))
        raise ConfigError(
            f"store {redact(str(uri))}: expected a path or a file://, s3://, gs:// or hdfs:// URI ({reason})"
        ) from None
    return filesystem, path.rstrip("/")


def open_entries(filesystem: fs.FileSystem, root: str) -> Entries:
    """Entries under ``root``: with renames where the filesystem has them."""
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalEntries(Path(root))
    return ObjectEntries(filesystem, root)


class LocalEntries:
    """Entries in a directory: an entry is written beside its place, flushed to the disk and renamed onto it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = f"{root}/"  # joined as text: asking for a key must cost microseconds

    def exists(self, key: str) -> bool:
        return os.access(f"{self._prefix}{key[:2]}/{key}/{MANIFEST_FILE}", os.F_OK)

    def read(self, key: str, name: str, limit: int) -> bytes:
        path = f"{self.place(key)}/{name}"
        # A link that leads elsewhere would make another file part of the entry. Asking three times costs microseconds.
        if any(map(os.path.islink, (path, self.place(key), f"{self._prefix}{key[:2]}"))):
            inside(self.root, path)
        return read_bytes(path, limit)

    def has_remains(self, key: str) -> bool:
        return not self.exists(key) and (self.root / key[:2] / key).exists()

    def publish(self, key: str, files: Mapping[str, bytes]) -> None:
        shelf = self.root / key[:2]
        if not shelf.is_dir():
            shelf.mkdir(parents=True, exist_ok=True)
            _flush_directory(self.root)
        temporary = shelf / f".{key}-{_host_mark()}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
        try:
            temporary.mkdir()
            for name, content in files.items():
                with (temporary / name).open("wb", buffering=0) as file:
                    view = memoryview(content)
                    while len(view):  # one write moves at most 2 GiB
                        view = view[file.write(view) :]
                    os.fsync(file.fileno())
            _flush_directory(temporary)
            try:
                temporary.rename(shelf / key)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(error.errno, "another entry lies there", self.place(key)) from error
                raise
            _flush_directory(shelf)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def set_aside(self, key: str) -> str:
        inside(self.root, self.root / key[:2])  # or somebody else's files would be moved
        damaged = self.root / "damaged"
        damaged.mkdir(exist_ok=True)
        for number in range(1_000_000):
            place = damaged / f"{key}-{number}"
            try:
                place.mkdir()  # claims the number; a rename may replace an empty directory
            except FileExistsError:
                continue
            entry = self.root / key[:2] / key
            try:
                entry.rename(place / "link" if entry.is_symlink() else place)  # only a directory can replace one
            except BaseException:
                place.rmdir()
                raise
            return str(place)
        raise FileExistsError(f"{damaged} is full; look into it and empty it")

    def listing(self) -> Iterator[Listed]:
        for shelf in sorted(_children(self.root)):
            if len(shelf.name) != 2:
                continue
            for entry in sorted(_children(shelf)):
                if not KEY.fullmatch(entry.name):
                    continue
                try:
                    written = (entry / MANIFEST_FILE).stat().st_mtime
                    size = sum(file.stat().st_size for file in entry.iterdir())
                except (FileNotFoundError, NotADirectoryError):  # damaged, or set aside this moment
                    continue
                yield Listed(entry.name, written, size)

    def place(self, key: str) -> str:
        return f"{self._prefix}{key[:2]}/{key}"

    def check_writable(self, bytes_needed: int) -> None:
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"probe")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            remedy = "free space" if error.errno in NO_SPACE_ERRORS else "change its permissions"
            reason = error.strerror or str(error)
            raise ConfigError(
                f"store {self.root} can't be written ({reason}): {remedy} or choose another --store"
            ) from error
        self._remove_leftovers()
        free = self.free_bytes()
        if free is not None and free < bytes_needed:
            raise ConfigError(
                f"store {self.root} has {free:,} bytes free but the study needs about {bytes_needed:,}: "
                "free space or choose another --store"
            )

    def free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self.root).free
        except OSError:
            return None

    def _remove_leftovers(self) -> None:
        """Delete what writers of this host left behind when they were killed."""
        for shelf in _children(self.root):
            for temporary in _children(shelf) if len(shelf.name) == 2 else []:
                match = _TEMPORARY.fullmatch(temporary.name)
                if match and match[1] == _host_mark() and not psutil.pid_exists(int(match[2])):
                    shutil.rmtree(temporary, ignore_errors=True)


def _children(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host_mark() -> str:
    return hashlib.sha256(host_identity().encode()).hexdigest()[:8]
