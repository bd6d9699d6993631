"""What a gradient-aligned training step costs beyond the passes that it can't do without, and what LoRA costs at all.

    python benchmarks/step.py                       # the bundled backbone's shape and DeiT-tiny's
    python benchmarks/step.py --shapes vit_base --device cuda --precision bfloat16 --json

Weights and images are random: nothing is read or fetched. Three floors, in the same run, turn and turn about:

- ``passes``: the same four half-batch passes forward and backward (source and target, both ways) through the same
  backbone with one hand-written LoRA branch of as many directions; no look-ahead, no putting back, no optimiser.
- ``passes and steps``: that and two optimiser steps.
- ``frozen``: one whole batch forward through the backbone without any branch, and the gradient of the activations
  back to the first adapted layer, none for a weight.

The package's side is the method's own ``training_step`` with GAO (class halves, moves, two optimiser steps, two
branches a layer) against the first two, and one forward and backward pass of its branched backbone against the third.
``ratio`` is the largest, over the shapes, of GAO step / ``passes``; ``lora_ratio`` of branched / ``frozen``.
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
import torch.nn.functional as F
from step_shapes import (
    SCALE,
    SHAPES,
    Shape,
    attach_branches,
    batches_of,
    build,
    device_name,
    head_start,
    interleaved,
    plain_lora,
    ratio,
    table,
)
from torch import Tensor, nn

from loda.backbone import Backbone, Precision
from loda.distributed import WorkerGroup
from loda.gao import class_halves
from loda.head import CosineHead
from loda.methods import build_method, method_settings
from loda.methods.base import Learner
from loda.settings import HeadSettings
from loda.training import _batch, trainable_parameters

Batches = list[tuple[Tensor, Tensor]]
LR, MOMENTUM = 1e-4, 0.9


def loss_of(features_BD: Tensor, head_CD: Tensor, labels_B: Tensor) -> Tensor:
    """Scaled cosines and cross-entropy, plainly."""
    cosines_BC = F.linear(F.normalize(features_BD, dim=-1), F.normalize(head_CD, dim=-1))
    return F.cross_entropy(SCALE * cosines_BC, labels_B)


def autocast(backbone: Backbone) -> torch.autocast:
    return torch.autocast(backbone.device.type, dtype=torch.bfloat16, enabled=backbone.precision == "bfloat16")


def passes_round(backbone: Backbone, batches: Batches, rank: int, with_steps: bool) -> Callable[[], None]:
    """Four half-batch passes a batch through plain LoRA; with two SGD steps if asked."""
    model, ups = plain_lora(backbone, rank)
    head_CD = nn.Parameter(head_start(backbone))
    optimizer = torch.optim.SGD([*ups, head_CD], lr=LR, momentum=MOMENTUM, foreach=True)
    draws = torch.Generator().manual_seed(0)
    halves = [[half.to(backbone.device) for half in class_halves(labels_B, draws)] for _, labels_B in batches]
    labels = [labels_B.to(backbone.device) for _, labels_B in batches]

    def loss(inputs_BCHW: Tensor, labels_B: Tensor, half: Tensor) -> Tensor:
        with autocast(backbone):
            features_BD = model(inputs_BCHW[half])
        return loss_of(features_BD.float(), head_CD, labels_B[half])

    def work() -> None:
        for (inputs_BCHW, _), labels_B, (first, second) in zip(batches, labels, halves, strict=True):
            for source, target in ((first, second), (second, first)):
                torch.autograd.grad(loss(inputs_BCHW, labels_B, source), ups)
                gradients = torch.autograd.grad(loss(inputs_BCHW, labels_B, target), [*ups, head_CD])
                if with_steps:
                    for parameter, gradient in zip([*ups, head_CD], gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()

    return work


def frozen_round(backbone: Backbone, batches: Batches) -> Callable[[], None]:
    """One pass a batch through the plain backbone, and the activations' gradient back to the first adapted layer."""
    head_CD = head_start(backbone)
    first = backbone.model.get_submodule(backbone.layers[0])
    labels = [labels_B.to(backbone.device) for _, labels_B in batches]
    start: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        start[:] = [output.requires_grad_(True)]

    def work() -> None:
        handle = first.register_forward_hook(watch)
        for (inputs_BCHW, _), labels_B in zip(batches, labels, strict=True):
            with autocast(backbone):
                features_BD = backbone.model(inputs_BCHW)
            torch.autograd.grad(loss_of(features_BD.float(), head_CD, labels_B), start)
        handle.remove()

    return work


def step_round(backbone: Backbone, batches: Batches, gao: bool) -> Callable[[], None]:
    """The method's own training step on each batch; branches are attached to ``backbone``."""
    method = build_method(method_settings({"name": "loda", "gao": gao}))
    head, group = CosineHead(head_start(backbone)), WorkerGroup()
    parameters, heads = trainable_parameters(backbone), list(head.parameters())
    optimizer = torch.optim.SGD([*parameters, *heads], lr=LR, momentum=MOMENTUM, foreach=True)
    draws = torch.Generator().manual_seed(0)
    learner = Learner(parameters, list(heads), optimizer.step, group.sum_, draws, backbone, lambda: LR)
    settings = HeadSettings(scale=SCALE)

    def work() -> None:
        for inputs_BCHW, labels_B in batches:
            batch = _batch(backbone, method, head, inputs_BCHW, labels_B, settings, group)
            method.training_step(learner, batch)

    return work


def branched_round(backbone: Backbone, batches: Batches) -> Callable[[], None]:
    """One pass a batch through the branched backbone and back to what is trained."""
    head = CosineHead(head_start(backbone))
    parameters = [*trainable_parameters(backbone), *head.parameters()]
    labels = [labels_B.to(backbone.device) for _, labels_B in batches]

    def work() -> None:
        for (inputs_BCHW, _), labels_B in zip(batches, labels, strict=True):
            torch.autograd.grad(loss_of(backbone.features(inputs_BCHW), head.weight, labels_B), parameters)

    return work


def measure(shape: Shape, pairs: int, device: str, precision: Precision) -> dict[str, float]:
    """Medians of one shape: milliseconds a batch, and ratios within pairs."""
    plain, backbone = build(shape, device, precision), build(shape, device, precision)
    attach_branches(backbone, shape.rank)
    batches = batches_of(backbone, shape)
    rounds = {
        "passes": passes_round(plain, batches, 2 * shape.rank, with_steps=False),
        "passes and steps": passes_round(plain, batches, 2 * shape.rank, with_steps=True),
        "gao": step_round(backbone, batches, gao=True),
        "without gao": step_round(backbone, batches, gao=False),
        "branched": branched_round(backbone, batches),
        "frozen": frozen_round(plain, batches),
    }
    taken = interleaved(rounds, pairs, backbone.device)
    milliseconds = {name: 1000 * median(values) / len(batches) for name, values in taken.items()}
    return {
        "ratio": ratio(taken["gao"], taken["passes"]),
        "ratio_with_steps": ratio(taken["gao"], taken["passes and steps"]),
        "gao_over_plain": ratio(taken["gao"], taken["without gao"]),
        "lora_ratio": ratio(taken["branched"], taken["frozen"]),
        **{f"{name.replace(' ', '_')}_milliseconds": value for name, value in milliseconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["alphabet_vit", "vit_tiny"])
    parser.add_argument(
        "--pairs", type=int, default=9, help="rounds that are compared, at least 5 for a figure to keep"
    )
    parser.add_argument("--batches", type=int, help="batches a round; default: by shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {}
    for name in args.shapes:
        shape = SHAPES[name] if args.batches is None else replace(SHAPES[name], batches=args.batches)
        rows[name] = measure(shape, args.pairs, args.device, args.precision)
    document = {
        "ratio": max(row["ratio"] for row in rows.values()),
        "lora_ratio": max(row["lora_ratio"] for row in rows.values()),
        "rows": rows,
        **{"pairs": args.pairs, "device": device_name(args.device), "threads": args.threads},
        **{"precision": args.precision, "torch": torch.__version__},
    }
    print(json.dumps(document) if args.json else table(document))


if __name__ == "__main__":
    main()
