"""What a gradient-aligned training step costs beyond the passes that it can't do without.

    python benchmarks/gao_step.py                   # the bundled study's backbone, images and batch size
    python benchmarks/gao_step.py --pairs 9 --json

The floor is the same four half-batch passes forward and backward (source and target, both ways) through the same
backbone with one hand-written LoRA branch of as many directions: no look-ahead, no putting back, no optimiser. The
package's side is the method's own ``training_step``, with its class halves, moves, two optimiser steps and two
branches a layer. Floor and package take turns on the same batches; augmentation is outside both.

``ratio`` is the median over pairs of package / floor. ``ratio_with_steps`` gives the floor its two optimiser steps.
``gao_over_plain`` is the step with GAO over the same method's step without it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loda.gao import class_halves
from loda.head import CosineHead
from loda.methods import build_method
from loda.methods.base import Batch, Learner, Method
from loda.methods.loda import DOWN_SCALE, GAMMA_GENERAL, GAMMA_ISOLATED
from loda.settings import RunSettings
from loda.training import _batch, trainable_parameters
from loda.workbench import Workbench, open_workbench
from orchestrate.study import load_study


class PlainLora(nn.Module):
    """``W x + scale · B A x`` as anyone would write it, A frozen."""

    down_rD: Tensor

    def __init__(self, base: nn.Linear, rank: int, draws: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down_rD", torch.randn(rank, base.in_features, generator=draws).to(base.weight))
        self.up_Or = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * F.linear(F.linear(x, self.down_rD), self.up_Or)


@dataclass
class Problem:
    """Normalised images (B, C, S, S), 0-based labels (B,), and the class halves of each batch."""

    inputs: list[Tensor]
    labels: list[Tensor]
    halves: list[tuple[Tensor, Tensor]]


def problem_of(bench: Workbench, batches: int) -> Problem:
    """Full batches of one task, shuffled, from its training images."""
    classes = bench.tasks[0].classes
    rows = bench.indices(classes, "train")
    draws = torch.Generator().manual_seed(0)
    size = bench.settings.training.batch_size
    if len(rows) < size:
        raise SystemExit(f"the task has {len(rows)} training images, fewer than one batch of {size}")
    device = bench.backbone.device
    images_NCHW = bench.backbone.normalize(bench.images(rows).to(device).float() / 255)
    labels_N = bench.labels(rows, classes).to(device)
    picked = [torch.randperm(len(rows), generator=draws)[:size] for _ in range(batches)]
    labels = [labels_N[index_B] for index_B in picked]
    return Problem([images_NCHW[index_B] for index_B in picked], labels, [class_halves(own, draws) for own in labels])


def floor_round(bench: Workbench, problem: Problem, with_steps: bool) -> Callable[[], None]:
    """Four half-batch passes a batch through plain LoRA; with two SGD steps if asked."""
    settings = bench.settings
    rank = settings.method.rank_general + settings.method.rank_isolated  # type: ignore[attr-defined]
    draws = torch.Generator().manual_seed(0)
    model = copy.deepcopy(bench.backbone.model)
    ups: list[Tensor] = []
    for name in bench.backbone.layers:
        lora = PlainLora(model.get_submodule(name), rank, draws)  # type: ignore[arg-type]
        model.set_submodule(name, lora)
        ups.append(lora.up_Or)
    head_CD = nn.Parameter(_head_start(bench))
    optimizer = torch.optim.SGD([*ups, head_CD], lr=1e-4, momentum=settings.training.momentum, foreach=True)

    def loss_of(inputs_BCHW: Tensor, labels_B: Tensor, half: Tensor) -> Tensor:
        cosines_BC = F.linear(F.normalize(model(inputs_BCHW[half]), dim=-1), F.normalize(head_CD, dim=-1))
        target_B = labels_B[half]
        margin_BC = settings.head.margin * F.one_hot(target_B, cosines_BC.shape[-1])
        return F.cross_entropy(settings.head.scale * (cosines_BC - margin_BC), target_B)

    def work() -> None:
        for inputs_BCHW, labels_B, (first, second) in zip(problem.inputs, problem.labels, problem.halves, strict=True):
            for source, target in ((first, second), (second, first)):
                torch.autograd.grad(loss_of(inputs_BCHW, labels_B, source), ups)
                gradients = torch.autograd.grad(loss_of(inputs_BCHW, labels_B, target), [*ups, head_CD])
                if with_steps:
                    for parameter, gradient in zip([*ups, head_CD], gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()

    return work


def _head_start(bench: Workbench) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(len(bench.tasks[0].classes), bench.backbone.feature_width, generator=draws)


def package_round(bench: Workbench, problem: Problem, gao: bool) -> Callable[[], None]:
    """The method's own training step on each batch, as a later task has it: two branches, down-projections frozen.

    Attaches the branches; ``bench.backbone`` keeps them.
    """
    settings = bench.settings
    values = settings.method.model_dump() | {"gao": gao}
    method: Method = build_method(type(settings.method)(**values))
    backbone = bench.backbone
    head = CosineHead(_head_start(bench)).to(backbone.device)
    parameters = trainable_parameters(backbone)
    optimizer = torch.optim.SGD(
        [*parameters, *head.parameters()], lr=1e-4, momentum=settings.training.momentum, foreach=True
    )
    draws = torch.Generator().manual_seed(0)
    learner = Learner(
        parameters, list(head.parameters()), optimizer.step, bench.group.sum_, draws, bench.backbone, lambda: 1e-4
    )

    def work() -> None:
        for inputs_BCHW, labels_B in zip(problem.inputs, problem.labels, strict=True):
            batch: Batch = _batch(backbone, method, head, inputs_BCHW, labels_B, settings.head, bench.group)
            method.training_step(learner, batch)

    return work


def attach_branches(bench: Workbench) -> None:
    """A general and an isolated branch on every target layer, with random orthonormal rows."""
    draws = torch.Generator().manual_seed(0)
    settings: dict[str, int] = bench.settings.method.model_dump()
    bench.backbone.attach()
    for branched in bench.backbone.attached.values():
        width = branched.base.in_features
        for kind, scale in (("general", GAMMA_GENERAL), ("isolated", GAMMA_ISOLATED)):
            basis_Dr = torch.linalg.qr(torch.randn(width, settings[f"rank_{kind}"], generator=draws)).Q
            branched.add(kind, basis_Dr.mT * DOWN_SCALE, scale=scale, train_down=False)


def seconds(work: Callable[[], None]) -> float:
    """Wall seconds of one round, the accelerator's work included."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(settings: RunSettings, pairs: int, batches: int) -> dict[str, float | int | str]:
    """Medians over alternating rounds."""
    bench = open_workbench(settings)
    problem = problem_of(bench, batches)
    floors = {name: floor_round(bench, problem, steps) for name, steps in (("floor", False), ("floor_steps", True))}
    attach_branches(bench)
    rounds = floors | {"gao": package_round(bench, problem, True), "plain": package_round(bench, problem, False)}
    for work in rounds.values():
        work()  # warm-up
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    for pair in range(pairs):
        # turns go both ways, so that a machine that slows down or speeds up favours nobody
        for name in list(rounds)[:: 1 if pair % 2 == 0 else -1]:
            taken[name].append(seconds(rounds[name]) / batches)

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[above], taken[below], strict=True))

    medians = {f"{name}_milliseconds": 1000 * statistics.median(values) for name, values in taken.items()}
    return {
        "ratio": ratio("gao", "floor"),
        "ratio_with_steps": ratio("gao", "floor_steps"),
        "gao_over_plain": ratio("gao", "plain"),
        **medians,
        "pairs": pairs,
        "batches": batches,
        "batch_size": settings.training.batch_size,
        "layers": len(bench.backbone.layers),
        "device": str(bench.backbone.device),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study file or a bundled study's name; default: the bundled one")
    parser.add_argument(
        "--pairs", type=int, default=9, help="rounds that are compared, at least 5 for a figure to keep"
    )
    parser.add_argument("--batches", type=int, default=20, help="batches a round")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    args = parser.parse_args()
    settings = load_study(args.study).run_settings()
    if settings.method.name != "loda":
        raise SystemExit(f"the study's method is {settings.method.name!r}; this measures LoDA's step")
    measured = measure(settings, args.pairs, args.batches)
    if args.json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        print(f"{name:26} {value:.3f}" if isinstance(value, float) else f"{name:26} {value}")


if __name__ == "__main__":
    main()
