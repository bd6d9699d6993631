"""Stage entries on a filesystem without atomic renames, such as an object store."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator, Mapping

from pyarrow import fs

from loda.errors import ConfigError
from loda.reading import read_stream
from orchestrate.entries import KEY, MANIFEST_FILE, Listed


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
            if info.type != fs.FileType.File or len(parts) != 3 or not KEY.fullmatch(parts[1]):
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
