"""What recording the second moments of the adapted layers' inputs costs beyond the forward pass that shows them.

    python benchmarks/observe.py                    # the bundled backbone's shape and DeiT-tiny's
    python benchmarks/observe.py --shapes vit_base --device cuda --precision bfloat16 --json

Weights and images are random: nothing is read or fetched. Both sides are loops over the same batches without gradient;
moments are products in float64, summed where the pass is computed. ``ratio`` is the largest, over the shapes, of the
median over pairs of observation / forward alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from step_shapes import SHAPES, Shape, batches_of, build, device_name, interleaved, ratio, table
from torch import Tensor

from loda.backbone import Backbone, Precision
from loda.moments import MomentRecorder


def forward_round(backbone: Backbone, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """The pass alone."""

    @torch.inference_mode()
    def work() -> None:
        for inputs_BCHW, _ in batches:
            backbone.features(inputs_BCHW)

    return work


def observing_round(backbone: Backbone, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """The pass with the moments of all adapted layers."""
    modules = {name: backbone.model.get_submodule(name) for name in backbone.layers}
    forward = forward_round(backbone, batches)

    @torch.inference_mode()
    def work() -> None:
        recorder = MomentRecorder(modules, backbone.layers_by_width, backbone.device)
        forward()
        recorder.close()
        recorder.value()

    return work


def measure(shape: Shape, pairs: int, device: str, precision: Precision) -> dict[str, float]:
    """Medians of one shape: milliseconds a batch, and the ratio within pairs."""
    backbone = build(shape, device, precision)
    batches = batches_of(backbone, shape)
    rounds = {"observation": observing_round(backbone, batches), "forward": forward_round(backbone, batches)}
    taken = interleaved(rounds, pairs, backbone.device)
    return {
        "ratio": ratio(taken["observation"], taken["forward"]),
        **{f"{name}_milliseconds": 1000 * median(values) / len(batches) for name, values in taken.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["alphabet_vit", "vit_tiny"])
    parser.add_argument(
        "--pairs", type=int, default=9, help="rounds that are compared, at least 5 for a figure to keep"
    )
    parser.add_argument("--batches", type=int, default=4, help="batches a round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = {name: replace(SHAPES[name], batches=args.batches) for name in args.shapes}
    rows = {name: measure(shape, args.pairs, args.device, args.precision) for name, shape in shapes.items()}
    document = {
        "ratio": max(row["ratio"] for row in rows.values()),
        "rows": rows,
        **{"pairs": args.pairs, "device": device_name(args.device), "threads": args.threads},
        **{"precision": args.precision, "torch": torch.__version__},
    }
    print(json.dumps(document) if args.json else table(document))


if __name__ == "__main__":
    main()
