"""The stage store: what is written comes back, and nothing damaged is ever trusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from loda.state import META_FILE, TENSORS_FILE, Artifact
from orchestrate import storage
from orchestrate.entries import MANIFEST_FILE
from orchestrate.store import StageStore

KEY, OTHER = "ab" * 32, "cd" * 32
FILES = [TENSORS_FILE, META_FILE, MANIFEST_FILE]


def make(value: float = 1.0, seconds: float = 2.0) -> Artifact:
    tensors = {"weight": torch.full((4, 3), value), "moment": torch.ones(2, dtype=torch.bfloat16)}
    return Artifact(tensors, {"value": value}, {"seconds": seconds})


@pytest.fixture(params=["path", "file-uri", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StageStore:
    """Three doors to one directory; the last one has no renames, like an object store."""
    root = tmp_path / "store"
    if request.param == "path":
        return StageStore(root)
    if request.param == "file-uri":
        return StageStore(root.as_uri())
    return StageStore("store", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def entry(root: Path, key: str = KEY) -> Path:
    return root / key[:2] / key


def test_what_is_written_comes_back(store: StageStore) -> None:
    artifact = make()
    assert (store.has(KEY), store.read(KEY), store.meta(KEY)) == (False, None, None)
    assert store.write(KEY, artifact, step="adapt") == artifact.digest
    assert store.has(KEY)
    back = store.read(KEY)
    assert back is not None
    assert back.digest == artifact.digest
    assert torch.equal(back.tensors["weight"], artifact.tensors["weight"])
    assert store.meta(KEY) == {"value": 1.0}
    assert store.timings(KEY) == {"seconds": 2.0}


def test_layout_and_manifest(store: StageStore, root: Path) -> None:
    artifact = make()
    store.write(KEY, artifact, step="adapt")
    assert sorted(path.name for path in entry(root).iterdir()) == sorted(FILES)
    manifest = json.loads((entry(root) / MANIFEST_FILE).read_text())
    assert (manifest["key"], manifest["step"], manifest["digest"]) == (KEY, "adapt", artifact.digest)
    assert manifest["created"].endswith("+00:00")
    for name in (TENSORS_FILE, META_FILE):
        assert manifest["files"][name]["bytes"] == (entry(root) / name).stat().st_size


def test_writer_facts_are_in_the_manifest(root: Path) -> None:
    StageStore(root, writer={"torch": "2.9"}).write(KEY, make(), step="adapt")
    assert json.loads((entry(root) / MANIFEST_FILE).read_text())["writer"] == {"torch": "2.9"}


@pytest.mark.parametrize(
    "key", ["", "ab", "AB" * 32, "../" + "a" * 61, "a" * 65, "a" * 63 + "\n", "g" * 64, "a" * 64 + "\n"]
)
def test_malformed_keys_are_refused_everywhere(store: StageStore, root: Path, key: str) -> None:
    for ask in (store.has, store.read, store.meta, lambda key: store.acquire_or_wait(key, "me")):
        with pytest.raises(ValueError, match="64 lowercase"):
            ask(key)
    with pytest.raises(ValueError, match="64 lowercase"):
        store.write(key, make(), step="adapt")
    assert not root.exists()


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_gets_through(
    store: StageStore, root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = make()
    store.write(KEY, artifact, step="adapt")
    content = (entry(root) / name).read_bytes()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        (entry(root) / name).write_bytes(flipped)
        caplog.clear()
        assert store.read(KEY) is None, f"byte {position}"
        assert f"{KEY[:2]}/{KEY} is damaged" in caplog.text
        assert name in caplog.text
        assert not store.has(KEY)
        assert store.write(KEY, artifact, step="adapt") == artifact.digest
    assert store.read(KEY) is not None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated_files_are_damage(store: StageStore, root: Path, name: str, keep: int) -> None:
    store.write(KEY, make(), step="adapt")
    (entry(root) / name).write_bytes((entry(root) / name).read_bytes()[:keep])
    assert store.read(KEY) is None
    assert not store.has(KEY)


@pytest.mark.parametrize("name", [TENSORS_FILE, META_FILE])
def test_missing_data_files_are_damage(store: StageStore, root: Path, name: str) -> None:
    store.write(KEY, make(), step="adapt")
    (entry(root) / name).unlink()
    assert store.has(KEY)
    assert store.read(KEY) is None
    assert not store.has(KEY)


def test_an_entry_without_manifest_does_not_exist_and_is_replaced(store: StageStore, root: Path) -> None:
    for ask in (store.read, lambda key: None):
        store.write(KEY, make(), step="adapt")
        (entry(root) / MANIFEST_FILE).unlink()
        assert not store.has(KEY)
        assert ask(KEY) is None
        store.write(KEY, make(2.0), step="adapt")
        assert store.meta(KEY) == {"value": 2.0}
        (entry(root) / TENSORS_FILE).unlink()
        assert store.read(KEY) is None  # clears the ground for the second round


def test_meta_checks_its_file_too(store: StageStore, root: Path) -> None:
    store.write(KEY, make(), step="adapt")
    content = (entry(root) / META_FILE).read_bytes()
    (entry(root) / META_FILE).write_bytes(content.replace(b"1.0", b"7.0"))
    assert store.meta(KEY) is None
    assert not store.has(KEY)


def test_an_entry_moved_under_another_key_is_damage(store: StageStore, root: Path) -> None:
    store.write(KEY, make(), step="adapt")
    entry(root, OTHER).parent.mkdir()
    entry(root).rename(entry(root, OTHER))
    assert store.read(OTHER) is None
    assert list(store.keys()) == []


def test_damaged_entries_are_kept_for_inspection(root: Path) -> None:
    store = StageStore(root)
    for number in range(3):
        store.write(KEY, make(), step="adapt")
        (entry(root) / TENSORS_FILE).write_bytes(b"junk")
        assert store.read(KEY) is None
        assert (root / "damaged" / f"{KEY}-{number}" / TENSORS_FILE).read_bytes() == b"junk"
    assert (store.size_bytes(), list(store.keys())) == (0, [])


def test_the_first_writer_wins_quietly_when_the_digests_agree(
    store: StageStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.write(KEY, make(seconds=1.0), step="adapt")
    assert store.write(KEY, make(seconds=2.0), step="adapt") == make().digest
    assert store.timings(KEY) == {"seconds": 1.0}
    assert caplog.text == ""


def test_the_first_writer_wins_with_a_warning_when_the_digests_differ(
    store: StageStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(1.0), make(2.0)
    store.write(KEY, first, step="adapt")
    assert store.write(KEY, second, step="adapt") == first.digest
    assert store.meta(KEY) == {"value": 1.0}
    assert first.digest in caplog.text
    assert second.digest in caplog.text
    assert "not deterministic" in caplog.text


def test_a_writer_overtaken_before_its_rename_keeps_the_other_entry(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow, fast, rename = StageStore(root), StageStore(root), Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        fast.write(KEY, make(1.0), step="adapt")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert slow.write(KEY, make(2.0), step="adapt") == make(1.0).digest
    assert "not deterministic" in caplog.text
    assert [path.name for path in (root / KEY[:2]).iterdir()] == [KEY]  # the slow one's temporary directory is gone


def test_a_damaged_entry_is_replaced_by_a_writer_that_never_read_it(store: StageStore, root: Path) -> None:
    store.write(KEY, make(), step="adapt")
    (entry(root) / TENSORS_FILE).write_bytes(b"junk")
    store.write(KEY, make(), step="adapt")
    assert store.read(KEY) is not None


def test_keys_and_sizes_leave_out_everything_that_is_no_entry(store: StageStore, root: Path) -> None:
    for key in (OTHER, KEY):
        store.write(key, make(), step="adapt")
    (root / KEY[:2] / f".{KEY}-00000000-1-{'0' * 32}.tmp").mkdir()
    (root / "leases").mkdir()
    (root / "leases" / f"{KEY}.json").write_text("{}")
    (root / "notes.txt").write_text("mine")
    assert list(store.keys()) == [KEY, OTHER]
    assert store.size_bytes() == sum(path.stat().st_size for key in (KEY, OTHER) for path in entry(root, key).iterdir())


def test_an_empty_store_says_so_without_making_anything(store: StageStore, root: Path) -> None:
    assert (list(store.keys()), store.size_bytes(), store.mean_seconds_by_step()) == ([], 0, {})
    assert not root.exists()


def test_mean_seconds_by_step_takes_the_newest_intact_entries(store: StageStore, root: Path) -> None:
    seconds = [100.0, 1.0, 3.0, 5.0, 7.0]
    for number, (step, value) in enumerate(zip(["adapt", "adapt", "adapt", "observe", "observe"], seconds)):
        key = f"{number:064x}"
        store.write(key, make(number, value), step=step)
        os.utime(entry(root, key) / MANIFEST_FILE, (1000 + number, 1000 + number))
    assert store.mean_seconds_by_step(newest=4) == {"adapt": 2.0, "observe": 6.0}
    (entry(root, f"{4:064x}") / META_FILE).write_bytes(b"junk")
    assert store.mean_seconds_by_step(newest=4) == {"adapt": 2.0, "observe": 5.0}


def test_leftovers_of_dead_writers_are_cleared_and_those_of_live_ones_stay(root: Path) -> None:
    store = StageStore(root)
    store.write(KEY, make(), step="adapt")
    dead = root / KEY[:2] / f".{KEY}-{storage._host_mark()}-{2**22 + 1}-{'0' * 32}.tmp"  # beyond any process id
    alive = root / KEY[:2] / f".{KEY}-{storage._host_mark()}-{os.getpid()}-{'0' * 32}.tmp"
    elsewhere = root / KEY[:2] / f".{KEY}-00000000-{2**22 + 1}-{'0' * 32}.tmp"
    for directory in (dead, alive, elsewhere):
        directory.mkdir()
    store.check_writable()
    assert [directory.exists() for directory in (dead, alive, elsewhere)] == [False, True, True]
    assert store.read(KEY) is not None


def test_check_writable_leaves_no_trace(store: StageStore, root: Path) -> None:
    store.check_writable(bytes_needed=1000)
    assert list(root.iterdir()) == []
