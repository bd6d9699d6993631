"""Leases between real processes: each stage is computed once, and killed holders are succeeded at once."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from loda.state import Artifact
from orchestrate.store import StageStore

KEY = "ab" * 32
KEYS = [f"{number:064x}" for number in range(20)]
SPAWN = multiprocessing.get_context("spawn")


def make() -> Artifact:
    return Artifact({"weight": torch.ones(3)})


def want_all_keys(root: Path, log: Path, seed: int, together: Barrier) -> None:
    """Get every stage and write down each that one computed: half of them in everybody's order, half in one's own."""
    store, half = StageStore(root), len(KEYS) // 2
    together.wait()  # importing takes seconds, all the stages take less: without this, nobody would meet
    for key in KEYS[:half] + random.Random(seed).sample(KEYS[half:], len(KEYS) - half):
        while store.read(key) is None:
            with store.lease(key, owner=f"worker {seed}") as lease:
                if lease is None:
                    continue
                with log.open("a") as file:
                    file.write(f"{key}\n")
                time.sleep(0.01)
                store.write(key, make(), step="adapt")


def hold_all_keys(root: Path, ready: Connection) -> None:
    store = StageStore(root)
    leases = [store.acquire_or_wait(key, owner="doomed") for key in KEYS]
    ready.send(len(leases))
    time.sleep(600)


def hold_one_and_exit(root: Path) -> None:
    assert StageStore(root).acquire_or_wait(KEY, owner="leaver") is not None
    raise SystemExit  # without release


def run_workers(root: Path, log: Path, count: int) -> Counter[str]:
    together = SPAWN.Barrier(count)
    workers = [SPAWN.Process(target=want_all_keys, args=(root, log, seed, together)) for seed in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * count
    return Counter(log.read_text().split())


@pytest.mark.timeout(120)
def test_many_processes_compute_every_key_exactly_once(tmp_path: Path) -> None:
    assert run_workers(tmp_path / "store", tmp_path / "log", 4) == Counter(KEYS)
    assert list((tmp_path / "store" / "leases").glob("*.json")) == []


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_leases_of_a_killed_process_are_taken_over_at_once_and_by_one_taker_each(tmp_path: Path) -> None:
    here, there = SPAWN.Pipe()
    holder = SPAWN.Process(target=hold_all_keys, args=(tmp_path / "store", there))
    holder.start()
    assert here.recv() == len(KEYS)
    holder.kill()  # and not joined yet: a corpse that nobody buried is dead all the same
    started = time.monotonic()
    assert run_workers(tmp_path / "store", tmp_path / "log", 3) == Counter(KEYS)
    assert time.monotonic() - started < 60  # waiting 20 s for each lease to die would take three workers 140 s
    holder.join()


@pytest.mark.timeout(60)
def test_leases_are_given_back_at_exit(tmp_path: Path) -> None:
    process = SPAWN.Process(target=hold_one_and_exit, args=(tmp_path / "store",))
    process.start()
    process.join()
    assert process.exitcode == 0
    lease = StageStore(tmp_path / "store").acquire_or_wait(KEY, owner="next", timeout=1)
    assert lease is not None
    lease.release()
