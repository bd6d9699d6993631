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
from typing import NamedTuple, Protocol

import psutil
from pyarrow import fs

from loda.errors import ConfigError
from loda.reading import inside, read_bytes, read_stream
from orchestrate.processes import host_identity
from orchestrate.redaction import expand, redact

MANIFEST_FILE = "manifest.json"
NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_KEY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}-([0-9a-f]{8})-(\d+)-[0-9a-f]{32}\.tmp")


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


def open_filesystem(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem and path behind a URI; a plain path is a local one.

    Raises:
        ConfigError: no filesystem for the URI.
    """
    if "://" not in str(uri):
        return fs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(expand(str(uri), "resources.store"))
    except ConfigError:
        raise
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
                if not _KEY.fullmatch(entry.name):
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


class ObjectEntries:
    """Entries on a filesystem without atomic renames: the manifest goes last, and readers check everything against it.

    Two writers of one key that get past its lease can leave one's files under the other's manifest; the checksums then
    don't fit, and the entry is deleted and computed again.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self._prefix = f"{root}/" if root else ""

    def exists(self, key: str) -> bool:
        return self.filesystem.get_file_info(f"{self.place(key)}/{MANIFEST_FILE}").type == fs.FileType.File

    def read(self, key: str, name: str, limit: int) -> bytes:
        with self.filesystem.open_input_stream(f"{self.place(key)}/{name}", compression=None) as stream:
            return read_stream(stream, limit)

    def has_remains(self, key: str) -> bool:
        return False  # files without a manifest belong to a writer at work, or to one that died: both are overwritten

    def publish(self, key: str, files: Mapping[str, bytes]) -> None:
        if self.exists(key):
            raise FileExistsError(errno.EEXIST, "another entry lies there", self.place(key))
        for name in sorted(files, key=lambda name: name == MANIFEST_FILE):
            write_object(self.filesystem, f"{self.place(key)}/{name}", files[name])

    def set_aside(self, key: str) -> str:
        self.filesystem.delete_file(f"{self.place(key)}/{MANIFEST_FILE}")  # first: readers must stop seeing the entry
        self.filesystem.delete_dir(self.place(key))
        return "nowhere (deleted)"

    def listing(self) -> Iterator[Listed]:
        selector = fs.FileSelector(self.root, recursive=True, allow_not_found=True)
        sizes: dict[str, int] = {}
        written: dict[str, float] = {}
        for info in self.filesystem.get_file_info(selector):
            parts = info.path.removeprefix(self.root).strip("/").split("/")
            if info.type != fs.FileType.File or len(parts) != 3 or not _KEY.fullmatch(parts[1]):
                continue
            sizes[parts[1]] = sizes.get(parts[1], 0) + info.size
            if parts[2] == MANIFEST_FILE:
                written[parts[1]] = (info.mtime_ns or 0) / 1e9
        for key in sorted(written):
            yield Listed(key, written[key], sizes[key])

    def place(self, key: str) -> str:
        return f"{self._prefix}{key[:2]}/{key}"

    def check_writable(self, bytes_needed: int) -> None:
        probe = f"{self._prefix}.probe-{uuid.uuid4().hex}"
        try:
            write_object(self.filesystem, probe, b"probe")
            self.filesystem.delete_file(probe)
        except OSError as error:
            raise ConfigError(
                f"store {self.root} ({self.filesystem.type_name}) can't be written: {error}; check bucket, "
                "credentials and permissions, or choose another --store"
            ) from error

    def free_bytes(self) -> int | None:
        return None


def write_object(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a whole file, with parent directories where the filesystem has such."""
    try:
        stream = filesystem.open_output_stream(path, compression=None)
    except FileNotFoundError:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        stream = filesystem.open_output_stream(path, compression=None)
    with stream:
        stream.write(content)


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
