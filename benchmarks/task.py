"""A whole later task of LoDA: how much of the device it uses, and how it compares with the published code's structure.

    python benchmarks/task.py                       # CPU: a ViT-tiny at 112 px, 12 classes of the bundled drawings
    python benchmarks/task.py --backbone vit_base_patch16_224 --image-size 224 --rank 32 --epochs 20 --tasks 5 --json

Both sides run the same task on the same random-weight backbone, images and batch size, without augmentation, from the
same first task: ours is the four steps of the second stage (observe, adapt, consolidate, evaluate) as workers run
them; the other is ``benchmarks/reference/published_structure.py``. They take turns.

``ratio`` is the median over pairs of reference / ours: above 1, ours is faster. ``share`` is the floating-point
operations of our task's passes (forward 1, backward to activations 1; counted by PyTorch's FlopCounterMode for one
image) a second, over what the device does in a large float32 matrix product in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference.published_structure import later_task, observe
from loda.graph import sequence_nodes
from loda.run import run_nodes
from loda.settings import RunSettings
from loda.stage import run_step
from loda.state import Artifact
from loda.workbench import Workbench, merge_factors, open_workbench


def settings_of(args: argparse.Namespace) -> RunSettings:
    return RunSettings.model_validate(
        {
            "stream": {"dataset": "alphabets", "tasks": args.tasks, "partition": "random", "validation": 0},
            "backbone": {
                "name": args.backbone,
                "weights": "random",
                "image_size": args.image_size,
                "target": ["attn.qkv"],
            },
            "method": {"name": "loda", "rank_general": args.rank, "rank_isolated": args.rank, "rho_max": 0.02},
            "training": {"epochs": args.epochs, "batch_size": args.batch_size, "lr": 0.01},
            "head": {"start": "class_means", "classifier": "lda"},
        }
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Ours:
    """The second stage's steps; the first stage is computed once."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        nodes = sequence_nodes(bench, bench.settings, range(len(bench.tasks)), "test")
        self.first: dict[str, Artifact] = {}
        run_nodes(bench, [node for node in nodes if node.position == 0], self.first)
        self.nodes = [node for node in nodes if node.position == 1]
        self.state = self.first[next(node.key for node in nodes if node.step == "consolidate" and node.position == 0)]
        self.by_step: dict[str, list[float]] = {}

    def run(self) -> float:
        artifacts = dict(self.first)
        for node in self.nodes:
            artifacts[node.key] = run_step(self.bench, node, artifacts)
            self.by_step.setdefault(node.step, []).append(artifacts[node.key].timings["seconds"])
        meta = artifacts[self.nodes[-1].key].meta
        return 100 * sum(meta["correct"]) / sum(meta["count"])


class Reference:
    """The published structure on the same images, from the same merged first task."""

    def __init__(self, ours: Ours) -> None:
        bench, self.settings = ours.bench, ours.bench.settings
        self.layers = bench.backbone.layers
        bench.backbone.detach()
        bench.backbone.load_merges([merge_factors(ours.state)])
        self.model = copy.deepcopy(bench.backbone.model)
        first, second = bench.tasks[0].classes, bench.tasks[1].classes

        def images(classes: tuple[int, ...], split: str) -> tuple[Tensor, Tensor]:
            rows = bench.indices(classes, split)
            pixels_NCHW = bench.images(rows).to(bench.backbone.device).float() / 255
            return bench.backbone.normalize(pixels_NCHW), bench.labels(rows, classes).to(bench.backbone.device)

        self.train, self.test = images(second, "train"), images((*first, *second), "test")
        size = self.settings.training.batch_size
        self.old = observe(self.model, self.layers, images(first, "train")[0], size)
        self.head = ours.state.tensors["head"].to(bench.backbone.device)

    def run(self) -> float:
        training, method = self.settings.training, self.settings.method
        return later_task(
            copy.deepcopy(self.model),
            self.layers,
            dict(self.old),
            [self.head],
            *self.train,
            *self.test,
            rank=method.rank_general,  # type: ignore[attr-defined]
            epochs=training.epochs,
            batch_size=training.batch_size,
            lr=training.lr,
            rho_max=method.rho_max,  # type: ignore[attr-defined]
            scale=self.settings.head.scale,
        )


def forward_flops(bench: Workbench) -> int:
    """Of one image."""
    side = bench.backbone.inputs
    image = torch.zeros(1, side.channels, side.image_size, side.image_size, device=bench.backbone.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bench.backbone.model(image)
    return counter.get_total_flops()


def matrix_rate(device: torch.device, side: int = 2048) -> float:
    """Operations a second in a float32 product of two square matrices; the best of ten."""
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    best = float("inf")
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def passes(bench: Workbench) -> int:
    """Images forward (and back, counted as one more) in the second stage."""
    train = len(bench.indices(bench.tasks[1].classes, "train"))
    own = len(bench.indices(bench.tasks[1].classes, "test"))
    seen = own + len(bench.indices(bench.tasks[0].classes, "test"))
    training = bench.settings.training.epochs * train * 2 * 2  # GAO passes every image twice, forward and back
    return train + training + 2 * train + seen + 2 * own + train


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over alternating rounds."""
    bench = open_workbench(settings_of(args))
    ours = Ours(bench)
    sides = {"ours": ours, "reference": Reference(ours)}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    accuracy = {}
    ours.run()  # warm-up
    ours.by_step.clear()
    for pair in range(args.pairs):
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            synchronize()
            started = time.perf_counter()
            accuracy[name] = sides[name].run()
            synchronize()
            taken[name].append(time.perf_counter() - started)
    rate = matrix_rate(bench.backbone.device)
    operations = forward_flops(bench) * passes(bench)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "ratio": statistics.median(b / a for a, b in zip(taken["ours"], taken["reference"], strict=True)),
        "share": operations / seconds["ours"] / rate,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        **{f"{step}_seconds": statistics.median(values) for step, values in ours.by_step.items()},
        **{f"{name}_accuracy": value for name, value in accuracy.items()},
        "gflop": operations / 1e9,
        "matrix_gflops_a_second": rate / 1e9,
        "images": len(bench.indices(bench.tasks[1].classes, "train")),
        "epochs": args.epochs,
        "pairs": args.pairs,
        "backbone": f"{args.backbone} at {args.image_size} px",
        "device": str(bench.backbone.device),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2, help="published: 20")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--tasks", type=int, default=19, help="how many tasks the 228 classes are cut into")
    parser.add_argument("--pairs", type=int, default=5, help="rounds, at least 5 for a figure to keep")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    measured = measure(args)
    if args.json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
