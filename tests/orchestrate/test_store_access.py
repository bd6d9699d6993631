"""The stage store where it may not write, may not read, or has no room."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from loda.errors import ConfigError, StageError
from loda.state import TENSORS_FILE, Artifact
from orchestrate.store import StageStore

KEY, OTHER = "ab" * 32, "cd" * 32


def make() -> Artifact:
    return Artifact({"weight": torch.ones(3)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def entry(root: Path) -> Path:
    return root / KEY[:2] / KEY


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that nobody can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_too_little_space_is_found_before_the_start(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        StageStore(root).check_writable(bytes_needed=10**18)
    assert "1,000,000,000,000,000,000" in str(caught.value)
    assert str(root) in str(caught.value)
    assert "--store" in str(caught.value)


def test_a_file_in_the_place_of_the_store_is_found_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="can't be written"):
            StageStore(place).check_writable()


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="s3://"):
        StageStore("gopher://bucket/store")


def test_a_read_only_store_serves_readers_and_refuses_writers(open_directory: Path) -> None:
    root = open_directory / "store"
    StageStore(root).write(KEY, make(), step="adapt")
    for directory in (root, root / KEY[:2]):
        directory.chmod(0o555)
    with unprivileged():
        store = StageStore(root)
        with pytest.raises(ConfigError, match=r"Permission denied.*--store"):
            store.check_writable()
        assert store.read(KEY) is not None
        with pytest.raises(StageError, match="Permission denied"):
            store.write(OTHER, make(), step="adapt")
        with pytest.raises(StageError, match="lease"):
            store.acquire_or_wait(OTHER, "me")


def test_damage_in_a_read_only_store_is_never_trusted_again(
    open_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = open_directory / "store"
    StageStore(root).write(KEY, make(), step="adapt")
    (entry(root) / TENSORS_FILE).write_bytes(b"junk")
    for directory in (root, root / KEY[:2]):
        directory.chmod(0o555)
    with unprivileged(), caplog.at_level(logging.WARNING):
        store = StageStore(root)
        assert (store.read(KEY), store.has(KEY), store.read(KEY)) == (None, False, None)
        with pytest.raises(StageError):  # and no endless wait for a key that is there but worthless
            store.acquire_or_wait(KEY, "me")
    assert caplog.text.count("is damaged") == 1


def test_unreadable_is_not_damaged(open_directory: Path) -> None:
    root = open_directory / "store"
    StageStore(root).write(KEY, make(), step="adapt")
    (entry(root) / TENSORS_FILE).chmod(0)
    with unprivileged(), pytest.raises(StageError, match="Permission denied"):
        StageStore(root).read(KEY)
    (entry(root) / TENSORS_FILE).chmod(0o644)
    assert StageStore(root).read(KEY) is not None
