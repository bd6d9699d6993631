"""What the stage store costs beyond the disk: write and read against the same bytes raw, and the small operations.

The floor writes the same number of bytes to one new file, flushes it to the disk, reads it back and takes one SHA-256.
The store writes three files, flushes them and their directories, and hashes files and contents, on both ways.

    python benchmarks/store.py --megabytes 40 --pairs 5 --json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from loda.state import Artifact
from orchestrate.store import StageStore


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def floor(path: Path, content: bytes) -> None:
    """The least that keeping bytes safe takes: write, flush, read, hash."""
    with path.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    hashlib.sha256(path.read_bytes()).hexdigest()


def fresh_artifact(number: int, tensors: int, size_bytes: int) -> Artifact:
    """Tensors of about ``size_bytes`` in all; fresh each time, since the digest is remembered."""
    values = {f"layer{index}": torch.rand(max(1, size_bytes // 4 // tensors)) for index in range(tensors)}
    return Artifact(values, {"number": number}, {"seconds": 1.0})


def compare(root: Path, size_bytes: int, tensors: int, pairs: int) -> dict[str, float]:
    """Medians over pairs of floor and store, taken in turns so that both see the same machine."""
    store = StageStore(root / "store")
    rows = []
    for number in range(pairs + 1):
        artifact = fresh_artifact(number, tensors, size_bytes)
        content = bytes(artifact.to_files()["tensors.safetensors"])
        artifact.__dict__.pop("digest", None)  # the store has to pay for it
        key = hashlib.sha256(f"{size_bytes} {number}".encode()).hexdigest()
        path = root / f"raw-{key}"
        raw = seconds(lambda path=path, content=content: floor(path, content))
        write = seconds(lambda key=key, artifact=artifact: store.write(key, artifact, step="adapt"))
        read = seconds(lambda key=key: store.read(key))
        rows.append((raw, write, read, (write + read) / raw))
    columns = list(zip(*rows[1:]))  # the first pair warms up
    names = ("floor_seconds", "write_seconds", "read_seconds", "ratio")
    return {name: statistics.median(column) for name, column in zip(names, columns)}


def small_operations(root: Path, repeats: int = 300) -> dict[str, float]:
    """Medians in microseconds of what happens once or more per stage."""
    store = StageStore(root / "store")
    present = next(store.keys())

    def lease() -> None:
        with store.lease("f" * 64, owner="benchmark"):
            pass

    works: dict[str, Callable[[], object]] = {
        "has_present": lambda: store.has(present),
        "has_absent": lambda: store.has("f" * 64),
        "lease_and_release": lease,
    }
    return {name: 1e6 * statistics.median(seconds(work) for _ in range(repeats)) for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40.0, help="size of the large artifact")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where to measure; default: the temporary directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        result = {
            "large": compare(Path(name), int(options.megabytes * 1e6), 24, options.pairs),
            "small": compare(Path(name), 10_000, 8, options.pairs),
            "microseconds": small_operations(Path(name)),
        }
    if options.json:
        print(json.dumps(result))
        return
    for size, title in (("large", f"{options.megabytes:g} MB"), ("small", "10 kB")):
        row = result[size]
        print(
            f"{title:>8}: floor {1e3 * row['floor_seconds']:7.1f} ms   write {1e3 * row['write_seconds']:7.1f} ms   "
            f"read {1e3 * row['read_seconds']:7.1f} ms   ratio {row['ratio']:5.2f}"
        )
    print("   ".join(f"{name} {value:.1f} µs" for name, value in result["microseconds"].items()))


if __name__ == "__main__":
    main()
