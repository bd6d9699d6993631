"""What a stored stage says about itself, and whether its files agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from loda.errors import StageError
from loda.reading import RECORD_BYTES, ReadingError, memory_bytes, parse_json
from loda.state import META_FILE, TENSORS_FILE, Artifact, canonical_json, parse_meta
from orchestrate.entries import MANIFEST_FILE, Entries

MANIFEST_BYTES = 2**20
_FILES = (TENSORS_FILE, META_FILE)
_KEYS = {"key", "step", "digest", "files", "created", "writer", "sha256"}


class DamagedEntryError(Exception):
    """What is wrong with an entry."""


def make_manifest(key: str, step: str, digest: str, files: Mapping[str, bytes], writer: Mapping[str, Any]) -> bytes:
    """The manifest of an entry: sizes in bytes and SHA-256 of its files, and a SHA-256 over the rest of itself."""
    manifest = {
        "key": key,
        "step": step,
        "digest": digest,
        "files": {name: {"bytes": len(body), "sha256": _sha256(body)} for name, body in files.items()},
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "writer": dict(writer),
    }
    return canonical_json({**manifest, "sha256": _sha256(canonical_json(manifest))})


def load_manifest(entries: Entries, key: str) -> dict[str, Any]:
    """The manifest, checked against its own checksum.

    Raises:
        DamagedEntryError: it can't be trusted.
        FileNotFoundError: there is none.
    """
    try:
        # NaN, which Python reads and JSON doesn't have, would not come out of canonical_json below
        manifest = parse_json(entries.read(key, MANIFEST_FILE, MANIFEST_BYTES), constants=False)
        if not isinstance(manifest, dict) or set(manifest) != _KEYS:
            raise ReadingError(f"it must have the keys {', '.join(sorted(_KEYS))}")
        rest = {name: value for name, value in manifest.items() if name != "sha256"}
        found = _sha256(canonical_json(rest))
    except ValueError as error:  # a number like 1e999, too
        raise DamagedEntryError(f"{MANIFEST_FILE} can't be read: {error}") from error
    if found != manifest["sha256"]:
        raise DamagedEntryError(f"{MANIFEST_FILE} differs from its own checksum")
    if manifest["key"] != key:
        raise DamagedEntryError(f"{MANIFEST_FILE} belongs to the key {manifest['key']}")
    # A checksum can be computed by anybody: what follows is for a manifest that was not written here.
    if not _is_description(manifest["files"]) or not all(isinstance(manifest[k], str) for k in ("step", "digest")):
        raise DamagedEntryError(
            f"{MANIFEST_FILE} must describe {' and '.join(_FILES)} by bytes and sha256, and no other"
        )
    return manifest


def _is_description(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and set(files) == set(_FILES)
        and all(isinstance(file, dict) and set(file) == {"bytes", "sha256"} for file in files.values())
        and all(type(file["bytes"]) is int and 0 <= file["bytes"] < 2**60 for file in files.values())
        and all(isinstance(file["sha256"], str) for file in files.values())
    )


def load_meta(entries: Entries, key: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The checked content of ``meta.json``; raises as ``load_manifest``."""
    try:
        document = parse_meta(_load_file(entries, key, META_FILE, manifest))
    except StageError as error:
        raise DamagedEntryError(str(error)) from error
    if document["digest"] != manifest["digest"]:
        raise DamagedEntryError(f"{META_FILE} has digest {document['digest']}, {MANIFEST_FILE} {manifest['digest']}")
    return document


def load_artifact(entries: Entries, key: str, manifest: Mapping[str, Any]) -> Artifact:
    """The artifact, its files and digest checked; raises as ``load_manifest``."""
    try:
        artifact = Artifact.from_files({name: _load_file(entries, key, name, manifest) for name in manifest["files"]})
    except StageError as error:
        raise DamagedEntryError(str(error)) from error
    if artifact.digest != manifest["digest"]:
        raise DamagedEntryError(f"digest is {artifact.digest}, expected {manifest['digest']}")
    return artifact


def _load_file(entries: Entries, key: str, name: str, manifest: Mapping[str, Any]) -> bytes:
    expected = manifest["files"][name]
    try:
        # Not a byte more than declared: a file may be larger than memory, or never end.
        body = entries.read(key, name, min(expected["bytes"], RECORD_BYTES if name == META_FILE else memory_bytes()))
    except ReadingError as error:
        raise DamagedEntryError(f"{name}: {error}") from error
    if len(body) != expected["bytes"]:
        raise DamagedEntryError(f"{name} has {len(body)} bytes, expected {expected['bytes']}")
    if (found := _sha256(body)) != expected["sha256"]:
        raise DamagedEntryError(f"{name} has SHA-256 {found}, expected {expected['sha256']}")
    return body


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
