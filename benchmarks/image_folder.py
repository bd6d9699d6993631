"""What opening a folder of images costs: listing, header checks and the digest, against reading all its bytes once.

    python benchmarks/image_folder.py PATH            # a folder source: PATH/train/CLASS/..., PATH/test/CLASS/...
    python benchmarks/image_folder.py                 # the bundled images, written out as such a folder first

Floor: each file read once, one after the other, nothing done with its bytes. Both are measured by turns in one
process, after one unmeasured turn: files are then in the page cache, so this is the cost of the processor, the worst
case for the ratio; from a disk or a network both read the same bytes. ``--json`` prints one document whose ``ratio`` is
the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from loda.datasets import load_dataset
from loda.datasets.folders import list_folder


def write_bundled(folder: Path) -> None:
    """The bundled alphabets as ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""
    dataset = load_dataset("alphabets", verify=False)
    for row, (label, split) in enumerate(zip(dataset.labels.tolist(), dataset.split.tolist())):
        file = folder / split / f"{label:04d}" / f"{row:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dataset.encoded(row))


def measure(folder: Path, pairs: int) -> dict[str, float | int | str]:
    """Medians of seconds, and of the ratio, over pairs of an opening and a plain reading."""
    files = [folder / name for name in list_folder(str(folder)).files]
    opening, reading, listing = [], [], []
    size, digest = 0, ""
    for _ in range(pairs + 1):
        start = time.perf_counter()
        size = sum(len(file.read_bytes()) for file in files)
        reading.append(time.perf_counter() - start)
        start = time.perf_counter()
        list_folder(str(folder))
        listing.append(time.perf_counter() - start)
        start = time.perf_counter()
        digest = load_dataset(f"folder:{folder}").digest
        opening.append(time.perf_counter() - start)
    return {
        "digest": digest,
        "images": len(files),
        "bytes": size,
        "pairs": pairs,
        "listing_seconds": statistics.median(listing[1:]),
        "opening_seconds": statistics.median(opening[1:]),
        "reading_seconds": statistics.median(reading[1:]),
        "ratio": float(np.median(np.divide(opening[1:], reading[1:]))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="default: the bundled images, in a temporary folder")
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs; default 5")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs: expected 1 or more, but got {args.pairs}")
    with tempfile.TemporaryDirectory() as temporary:
        if args.folder is None:
            write_bundled(Path(temporary))
        measured = measure(args.folder or Path(temporary), args.pairs)
    if args.json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:18}" + (f"{value:,.3f}" if isinstance(value, float) else str(value)))


if __name__ == "__main__":
    main()
