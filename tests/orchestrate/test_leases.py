"""Leases: whoever wants a stage, one computes it, and a dead holder delays nobody for long."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from loda.errors import StageError
from loda.state import Artifact
from orchestrate.leases import Lease, Watch
from orchestrate.store import StageStore

KEY = "ab" * 32


def make() -> Artifact:
    return Artifact({"weight": torch.ones(3)})


@pytest.fixture(params=["path", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StageStore:
    if request.param == "path":
        return StageStore(tmp_path / "store", lease_timeout_seconds=0.8)
    files = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    return StageStore("store", filesystem=files, lease_timeout_seconds=0.8)


@pytest.fixture
def lease_file(tmp_path: Path) -> Path:
    path = tmp_path / "store" / "leases" / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    return path


def held_elsewhere(beat: int = 0) -> str:
    """A lease of another host's process: nothing but its heartbeat can tell whether it lives."""
    document = {"beat": f"{beat:012d}", "key": KEY, "owner": "far away", "token": "t", "host": "other", "pid": 1}
    return json.dumps(document)


class Crowd:
    """How many hold a lease at once, at most, and how many did in all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.ever = 0

    def change(self, by: int) -> None:
        with self.lock:
            self.now += by
            self.most = max(self.most, self.now)
            self.ever += by > 0


def take_once(root: Path, crowd: Crowd) -> None:
    with StageStore(root, lease_timeout_seconds=0.1).lease(KEY, owner="taker") as lease:
        assert lease is not None
        crowd.change(1)
        time.sleep(0.01)
        crowd.change(-1)


@pytest.mark.timeout(60)
def test_racing_takers_of_one_silent_lease_never_both_win(tmp_path: Path, lease_file: Path) -> None:
    """Six stores begin to watch at the same moment, so all find the lease silent at nearly the same moment."""
    for _round in range(5):
        lease_file.write_text(held_elsewhere())
        crowd = Crowd()
        threads = [threading.Thread(target=take_once, args=(tmp_path / "store", crowd)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (crowd.most, crowd.ever, lease_file.exists()) == (1, 6, False)


def test_evicting_looks_again_at_whose_lease_it_is(store: StageStore, lease_file: Path) -> None:
    """A taker that was slow to act must not clear away the lease of the one that was faster."""
    lease_file.write_text(held_elsewhere())
    store._leases._files.evict(KEY, "the token of an earlier holder")
    assert lease_file.read_text() == held_elsewhere()
    store._leases._files.evict(KEY, "t")
    assert not lease_file.exists()


def test_a_waiter_returns_none_as_soon_as_the_key_is_stored(store: StageStore) -> None:
    holder = store.acquire_or_wait(KEY, "holder")
    assert holder is not None

    def finish() -> None:
        time.sleep(0.3)
        store.write(KEY, make(), step="adapt")

    thread = threading.Thread(target=finish)
    thread.start()
    assert store.acquire_or_wait(KEY, "waiter", timeout=10) is None
    assert not holder.lost
    thread.join()
    holder.release()
    assert store.acquire_or_wait(KEY, "late") is None


def test_a_key_stored_between_the_question_and_the_lease_is_not_computed_again(
    store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = store._leases.try_acquire

    def late(key: str, owner: str) -> Lease | None:
        store.write(key, make(), step="adapt")
        return acquire(key, owner)

    monkeypatch.setattr(store._leases, "try_acquire", late)
    assert store.acquire_or_wait(KEY, "late") is None
    assert store._leases.holder(KEY) is None


def test_a_waiter_gets_the_lease_when_the_holder_gives_up(store: StageStore) -> None:
    holder = store.acquire_or_wait(KEY, "holder")
    assert holder is not None
    timer = threading.Timer(0.3, holder.release)
    timer.start()
    with store.lease(KEY, "waiter", timeout=10) as lease:
        assert lease is not None
    timer.join()


def test_a_living_holder_keeps_its_lease_far_beyond_the_timeout(store: StageStore) -> None:
    with store.lease(KEY, "holder") as lease:
        assert lease is not None
        with pytest.raises(StageError, match=r"waited 2\.\d s for holder \(process \d+ on"):
            store.acquire_or_wait(KEY, "waiter", timeout=2.0)
        assert not lease.lost


def test_a_silent_lease_of_another_host_is_taken_over_after_the_timeout(
    store: StageStore, lease_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lease_file.write_text(held_elsewhere())
    os.utime(lease_file, (4e9, 4e9))  # a clock in the future means nothing
    started = time.monotonic()
    with store.lease(KEY, "taker", timeout=10) as lease:
        assert lease is not None
        assert time.monotonic() - started >= 0.8
        assert json.loads(lease_file.read_text())["owner"] == "taker"
    assert "far away" in caplog.text
    assert not lease_file.exists()


def test_a_beating_lease_of_another_host_is_respected(store: StageStore, lease_file: Path) -> None:
    lease_file.write_text(held_elsewhere())
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(0.2):
            number += 1
            lease_file.with_suffix(".next").write_text(held_elsewhere(number))
            lease_file.with_suffix(".next").replace(lease_file)
            os.utime(lease_file, (0, 0))  # the clock over there is wrong, its counter isn't

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(StageError, match="far away"):
        store.acquire_or_wait(KEY, "waiter", timeout=2.0)
    over.set()
    thread.join()


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_lease_whose_writer_died_over_it_is_taken_over(store: StageStore, lease_file: Path, content: str) -> None:
    lease_file.write_text(content)
    with store.lease(KEY, "taker", timeout=10) as lease:
        assert lease is not None


def test_a_holder_that_lost_its_lease_learns_it_and_leaves_the_successors_alone(
    store: StageStore, lease_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lease = store.acquire_or_wait(KEY, "sleeper")
    assert lease is not None
    lease_file.with_suffix(".next").write_text(held_elsewhere())
    lease_file.with_suffix(".next").replace(lease_file)
    deadline = time.monotonic() + 10
    while not lease.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease.lost
    assert "may be computed twice" in caplog.text
    lease.release()
    lease.release()
    assert lease_file.read_text() == held_elsewhere()


def test_leases_work_where_the_filesystem_has_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    store = StageStore(tmp_path / "store")
    lease = store.acquire_or_wait(KEY, "holder")
    assert lease is not None
    with pytest.raises(StageError, match="for holder"):
        store.acquire_or_wait(KEY, "waiter", timeout=0.1)
    lease.release()
    assert [path.name for path in (tmp_path / "store" / "leases").iterdir()] == [".guard"]


def test_waiting_reports_the_holder_and_can_be_stopped(store: StageStore) -> None:
    seen: list[float] = []

    def on_wait(holder: object, waited_seconds: float) -> None:
        assert isinstance(holder, dict)
        assert (holder["owner"], holder["pid"]) == ("holder", os.getpid())
        seen.append(waited_seconds)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with store.lease(KEY, "holder"), pytest.raises(KeyboardInterrupt):
        store.acquire_or_wait(KEY, "waiter", on_wait=on_wait)
    assert seen == sorted(seen)


def test_a_lease_is_given_back_when_the_work_fails(store: StageStore) -> None:
    with pytest.raises(ZeroDivisionError), store.lease(KEY, "unlucky"):
        1 / 0
    with store.lease(KEY, "next", timeout=1) as lease:
        assert lease is not None


def test_a_reused_process_id_is_another_process(tmp_path: Path, lease_file: Path) -> None:
    store = StageStore(tmp_path / "store")
    holder = store.acquire_or_wait(KEY, "holder")
    assert holder is not None
    document = json.loads(lease_file.read_text())
    holder.release()
    lease_file.write_text(json.dumps({**document, "pid_start": "1"}))  # this process's id, in an earlier life
    with store.lease(KEY, "taker", timeout=5) as lease:
        assert lease is not None


def test_a_forked_child_neither_beats_nor_gives_back_its_parents_leases(tmp_path: Path, lease_file: Path) -> None:
    lease = StageStore(tmp_path / "store").acquire_or_wait(KEY, "parent")
    assert lease is not None
    child = os.fork()
    if child == 0:
        lease.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert lease_file.exists()
    lease.release()
    assert not lease_file.exists()


def test_a_suspended_waiter_counts_no_more_than_a_second_of_its_absence() -> None:
    watch = Watch()
    assert watch.look(b"1", 100.0) == 0
    assert watch.look(b"1", 100.5) == 0.5
    assert watch.look(b"1", 9000.0) == 1.5
    assert watch.look(b"2", 9000.1) == 0
    assert watch.look(b"2", 9000.2) == pytest.approx(0.1)


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield
