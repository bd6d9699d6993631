"""The stage store under full disks and killed writers, in real processes."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from loda.errors import StageError
from loda.state import Artifact
from orchestrate.store import StageStore

SMALL, LARGE = "ab" * 32, "ab" + "cd" * 31  # on one shelf, so that a lost neighbour would show
SPAWN = multiprocessing.get_context("spawn")

pytestmark = pytest.mark.chaos


def make(count: int) -> Artifact:
    return Artifact({"weight": torch.arange(count, dtype=torch.float32)})


def write_beyond_the_limit(root: Path, answer: Connection) -> None:
    """Files of this process may have 100,000 bytes: the nearest to a full disk that needs no privileges."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = StageStore(root)
    store.write(SMALL, make(10), step="adapt")
    try:
        store.write(LARGE, make(1_000_000), step="adapt")
        answer.send("no error")
    except StageError as error:
        answer.send(str(error))


def write_without_end(root: Path, ready: Connection) -> None:
    store, number = StageStore(root), 0
    while True:
        store.write(f"ab{number:062x}", make(300_000), step="adapt")
        number += 1
        ready.send(number)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=write_beyond_the_limit, args=(tmp_path, there))
    process.start()
    message = here.recv()
    process.join()
    assert "needs 4,0" in message
    assert f"{tmp_path}/{LARGE[:2]}/{LARGE}" in message
    assert os.strerror(errno.EFBIG) in message
    store = StageStore(tmp_path)
    assert store.read(SMALL) is not None
    assert not store.has(LARGE)
    assert [path.name for path in (tmp_path / SMALL[:2]).iterdir()] == [SMALL]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
def test_every_kind_of_full_names_bytes_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calls, fsync = itertools.count(), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == 2:  # after the root's and the first file's: in the midst of the entry
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match=r"needs [\d,]+ bytes, [\d,]+ free.*free space and resume"):
        StageStore(tmp_path).write(SMALL, make(10), step="adapt")
    assert list((tmp_path / SMALL[:2]).iterdir()) == []


@pytest.mark.timeout(120)
def test_a_writer_killed_at_any_moment_leaves_whole_entries_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for round_number in range(3):
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=write_without_end, args=(tmp_path / str(round_number), there))
        process.start()
        while here.recv() < 3:
            pass
        time.sleep(0.004 * round_number)
        process.kill()
        process.join()
        store = StageStore(tmp_path / str(round_number))
        keys = list(store.keys())
        assert len(keys) >= 3
        assert all(store.read(key) is not None for key in keys)
        store.check_writable()
        assert len(list((tmp_path / str(round_number) / "ab").iterdir())) == len(keys)  # no temporary directory is left
    assert caplog.text == ""
