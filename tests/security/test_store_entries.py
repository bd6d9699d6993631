"""A stage store that somebody else wrote to: entries are damage, and nothing outside the store is read or moved."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from loda.errors import ConfigError
from loda.state import META_FILE, TENSORS_FILE, Artifact, canonical_json
from orchestrate.entries import MANIFEST_FILE
from orchestrate.manifest import MANIFEST_BYTES
from orchestrate.store import StageStore
from tests.security.hostile import armed_pickle, safetensors_bytes, tensor

KEY = "ab" * 32
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(params=["path", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StageStore:
    """A store with one entry, in a directory or behind the door of object stores."""
    if request.param == "path":
        opened = StageStore(tmp_path / "store")
    else:
        opened = StageStore("store", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    opened.write(KEY, Artifact({"weight": torch.ones(3)}, {"value": 1}, {"seconds": 1.0}), step="adapt")
    return opened


@pytest.fixture
def entry(tmp_path: Path, store: StageStore) -> Path:
    return tmp_path / "store" / KEY[:2] / KEY


def reseal(entry: Path, change: Change | None = None) -> None:
    """Give the manifest the sizes and checksums of the files as they are now, as an attacker would."""
    manifest = json.loads((entry / MANIFEST_FILE).read_bytes())
    for name in (TENSORS_FILE, META_FILE):
        body = (entry / name).read_bytes()
        manifest["files"][name] = {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    if change is not None:
        change(manifest)
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (entry / MANIFEST_FILE).write_text(json.dumps(manifest))


def assert_damage(store: StageStore, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """It is set aside with a reason, and computed again."""
    assert store.read(KEY) is None
    assert "is damaged" in caplog.text
    assert reason in caplog.text
    fresh = Artifact({"weight": torch.zeros(3)})
    assert store.write(KEY, fresh, step="adapt") == fresh.digest
    assert store.read(KEY) is not None


def test_a_sound_entry_sealed_anew_is_read(store: StageStore, entry: Path) -> None:
    reseal(entry)
    assert store.read(KEY) is not None


def test_a_pickle_in_place_of_tensors(
    store: StageStore, entry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (entry / TENSORS_FILE).write_bytes(armed_pickle(tmp_path / "mark"))
    reseal(entry)
    assert_damage(store, caplog, "a pickle")
    assert not (tmp_path / "mark").exists()


def test_a_header_of_a_billion_values(store: StageStore, entry: Path, caplog: pytest.LogCaptureFixture) -> None:
    (entry / TENSORS_FILE).write_bytes(
        safetensors_bytes({"a": tensor(shape=(10**9,), offsets=(0, 4 * 10**9))}, b"1234")
    )
    reseal(entry)
    assert_damage(store, caplog, "declares 4,000,000,000 bytes of tensors")


def _named(name: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(META_FILE)

    return change


def _extra(name: str) -> Change:
    return lambda manifest: manifest["files"].update(
        {name: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}
    )


def _size(size: Any) -> Change:
    return lambda manifest: manifest["files"][TENSORS_FILE].update({"bytes": size})


MANIFESTS: dict[str, Change] = {
    "a name with ..": _named("../../secret"),
    "an absolute name": _named("/etc/passwd"),
    "another file beside": _extra("../../../secret"),
    "a folder's name": _named("folder/meta.json"),
    "a size that is text": _size("7"),
    "a size that is negative": _size(-1),
    "a size beyond all": _size(2**62),
    "a size that is true": _size(True),
    "files that are a list": lambda manifest: manifest.update(files=[TENSORS_FILE, META_FILE]),
    "files of another kind": lambda manifest: manifest.update(files={TENSORS_FILE: 1, META_FILE: 2}),
    "a checksum of another kind": lambda manifest: manifest["files"][META_FILE].update(sha256=None),
    "no files": lambda manifest: manifest.update(files={}),
    "a step of another kind": lambda manifest: manifest.update(step=["adapt"]),
    "a digest of another kind": lambda manifest: manifest.update(digest=None),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_says_anything_else_than_ours(
    store: StageStore, entry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    reseal(entry, MANIFESTS[what])
    assert store.mean_costs_by_step() == {}  # a plan leaves it alone
    assert_damage(store, caplog, "must describe tensors.safetensors and meta.json by bytes and sha256, and no other")


def test_a_size_larger_than_the_file_allocates_nothing(
    store: StageStore, entry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reseal(entry, _size(2**50))
    assert_damage(store, caplog, f"expected {2**50}")


def test_a_file_larger_than_memory_is_not_read(
    store: StageStore, entry: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrate.manifest.memory_bytes", lambda: 10**8)  # a small machine
    reseal(entry, _size(2**34))
    os.truncate(entry / TENSORS_FILE, 2**34)  # takes no space
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_damage(store, caplog, "bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "not valid JSON"),
        (b"[" * 200 + b"]" * 200, "nested deeper than 64 levels"),
        (b"9" * 400_000, "a whole number of 400000 digits"),
        (b'{"created": 1e999}', "must have the keys"),
        (b'{"created": NaN}', "NaN isn't JSON"),
        (b"\xff\xfe\x00", "can't be read"),
        (b" " * (MANIFEST_BYTES + 1), "bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_that_is_no_manifest(
    store: StageStore, entry: Path, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
) -> None:
    (entry / MANIFEST_FILE).write_bytes(content)
    assert_damage(store, caplog, reason)


def test_a_number_that_json_does_not_have_under_a_right_checksum(
    store: StageStore, entry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = (entry / MANIFEST_FILE).read_text()
    (entry / MANIFEST_FILE).write_text(manifest.replace('"writer":{}', '"writer":{"a":1e999}'))
    assert_damage(store, caplog, "can't be read")


@pytest.fixture
def local(tmp_path: Path) -> tuple[StageStore, Path]:
    store = StageStore(tmp_path / "store")
    store.write(KEY, Artifact({"weight": torch.ones(3)}), step="adapt")
    return store, tmp_path / "store" / KEY[:2] / KEY


@pytest.mark.parametrize("name", [TENSORS_FILE, META_FILE, MANIFEST_FILE])
def test_a_file_that_is_a_link_out_of_the_store(
    local: tuple[StageStore, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    store, entry = local
    (entry / name).rename(tmp_path / "elsewhere")
    (entry / name).symlink_to(tmp_path / "elsewhere")  # the right content, but not the store's
    assert_damage(store, caplog, "leads out of")
    assert (tmp_path / "elsewhere").is_file()


def test_an_entry_that_is_a_link_out_of_the_store(
    local: tuple[StageStore, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, entry = local
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    assert_damage(store, caplog, "leads out of")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3  # the link was moved, not what it leads to


def test_a_shelf_that_is_a_link_out_of_the_store_is_left_alone(
    local: tuple[StageStore, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, entry = local
    entry.parent.rename(tmp_path / "elsewhere")
    entry.parent.symlink_to(tmp_path / "elsewhere")
    assert store.read(KEY) is None
    assert "leads out of" in caplog.text
    assert not store.has(KEY)
    assert (tmp_path / "elsewhere" / KEY / MANIFEST_FILE).is_file()


def test_links_inside_the_store_and_a_store_that_is_a_link_are_taken(
    local: tuple[StageStore, Path], tmp_path: Path
) -> None:
    store, entry = local
    entry.rename(tmp_path / "store" / "moved")
    entry.symlink_to(tmp_path / "store" / "moved")
    assert store.read(KEY) is not None
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert StageStore(tmp_path / "link").read(KEY) is not None


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [TENSORS_FILE, META_FILE, MANIFEST_FILE])
def test_a_pipe_in_place_of_a_file_does_not_block(
    local: tuple[StageStore, Path], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    store, entry = local
    (entry / name).unlink()
    os.mkfifo(entry / name)
    assert_damage(store, caplog, "a pipe, a socket or a device")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("lease", ["pipe", "large", "deep", "numbers"])
def test_a_lease_that_is_none_is_taken_over(tmp_path: Path, lease: str) -> None:
    file = tmp_path / "store" / "leases" / f"{KEY}.json"
    file.parent.mkdir(parents=True)
    if lease == "pipe":
        os.mkfifo(file)
    else:
        texts = {"large": " " * 10**6, "deep": "[" * 10**5, "numbers": '{"pid": 1e999, "host": [], "token": {}}'}
        file.write_text(texts[lease])
    started = time.monotonic()
    with StageStore(tmp_path / "store", lease_timeout_seconds=0.3).lease(KEY, "me", timeout=20) as held:
        assert held is not None
    assert time.monotonic() - started < 10


def test_a_store_address_with_a_strange_scheme_is_refused() -> None:
    for uri in ("http://127.0.0.1/stages", "ftp://host/x", "javascript://x"):
        with pytest.raises(ConfigError, match="expected a path or a"):
            StageStore(uri)
