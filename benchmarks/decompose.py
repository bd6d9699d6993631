"""What LoDA's decompositions cost beyond the LAPACK calls that they can't do without.

    python benchmarks/decompose.py                  # 12 layers of width 768, rank 32: ViT-B/16's attn.qkv
    python benchmarks/decompose.py --layers 12 --width 192 --rank 16 --json

Both subspaces of a later task, all layers in one batch, float64: the general one is the top of an eigendecomposition
of ``S_old + S_new``; the isolated one whitens ``S_new`` by a Cholesky factor of ``S_old`` and takes the top of an
eigendecomposition of that.

``ratio`` is both subspaces over one batched ``eigh`` and one Cholesky of the same size. The method itself asks for two
eigendecompositions of different matrices, so it can't come near 1; ``ratio_calls`` is both over the calls that they
make, two ``eigh`` and one Cholesky.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from loda.subspace import general_subspace, isolated_subspace


def moments(layers: int, width: int, seed: int, device: torch.device) -> Tensor:
    """(L, D, D) float64 second moments of inputs whose spectrum falls by three decades, as a transformer's do."""
    draws = torch.Generator().manual_seed(seed)
    turn_LDD = torch.linalg.qr(torch.randn(layers, width, width, generator=draws, dtype=torch.float64)).Q
    x_LND = torch.randn(layers, 2 * width, width, generator=draws, dtype=torch.float64)
    x_LND = x_LND * torch.logspace(0, -1.5, width, dtype=torch.float64) @ turn_LDD
    return (x_LND.mT @ x_LND / x_LND.shape[1]).to(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds, the accelerator's work included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(layers: int, width: int, rank: int, pairs: int, device: torch.device) -> dict[str, float | int | str]:
    """Medians over alternating rounds."""
    old, new = moments(layers, width, 0, device), moments(layers, width, 1, device)
    eye = torch.eye(width, dtype=torch.float64, device=device)
    rounds: dict[str, Callable[[], object]] = {
        "eigh": lambda: torch.linalg.eigh(new),
        "cholesky": lambda: torch.linalg.cholesky_ex(old + 1e-6 * eye),
        "general": lambda: general_subspace(old + new, rank),
        "isolated": lambda: isolated_subspace(new, old, rank),
    }
    for work in rounds.values():
        work()  # warm-up
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    for pair in range(pairs):
        for name in list(rounds)[:: 1 if pair % 2 == 0 else -1]:
            taken[name].append(seconds(rounds[name], device))

    def ratio(above: list[str], below: list[str]) -> float:
        return statistics.median(
            sum(taken[name][pair] for name in above) / sum(taken[name][pair] for name in below) for pair in range(pairs)
        )

    return {
        "ratio": ratio(["general", "isolated"], ["eigh", "cholesky"]),
        "ratio_calls": ratio(["general", "isolated"], ["eigh", "eigh", "cholesky"]),
        "ratio_general": ratio(["general"], ["eigh"]),
        "ratio_isolated": ratio(["isolated"], ["eigh", "cholesky"]),
        **{f"{name}_seconds": statistics.median(values) for name, values in taken.items()},
        "both_seconds": statistics.median(a + b for a, b in zip(taken["general"], taken["isolated"], strict=True)),
        "layers": layers,
        "width": width,
        "rank": rank,
        "pairs": pairs,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5, help="rounds, at least 5 for a figure to keep")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    measured = measure(args.layers, args.width, args.rank, args.pairs, torch.device(args.device))
    if args.json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
