"""Backbones, images and labels at the sizes that the timing scripts use: random weights, nothing to download."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loda.backbone import Backbone, Precision
from loda.methods.loda import DOWN_SCALE, GAMMA_GENERAL, GAMMA_ISOLATED
from loda.timm_models import build_backbone

SCALE, CLASSES = 20.0, 10
ALL_LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Shape:
    """A backbone with random weights, the layers that are adapted, rank per branch, batch size; timm's own size if
    ``image_size`` is None."""

    backbone: str
    image_size: int | None
    target: tuple[str, ...]
    rank: int
    batch_size: int
    batches: int  # a round


SHAPES = {
    # The bundled study's, and DeiT-tiny's with the published choice of layers.
    "alphabet_vit": Shape("alphabet_vit", 16, ALL_LINEAR, 16, 48, 12),
    "vit_tiny": Shape("vit_tiny_patch16_224", None, ("attn.qkv",), 16, 16, 1),
    "vit_base": Shape("vit_base_patch16_224", None, ("attn.qkv",), 32, 48, 1),
}


def build(shape: Shape, device: str, precision: Precision) -> Backbone:
    """The backbone, plain."""
    backbone = build_backbone(
        shape.backbone, weights="random", image_size=shape.image_size, target=shape.target, device=device
    )
    backbone.precision = precision
    return backbone


def batches_of(backbone: Backbone, shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """Normalised images (B, C, S, S) on the device, and labels (B,) on the CPU, as training has them."""
    draws = torch.Generator().manual_seed(0)
    side, channels = backbone.inputs.image_size, backbone.inputs.channels
    found = []
    for _ in range(shape.batches):
        images = torch.rand(shape.batch_size, channels, side, side, generator=draws).to(backbone.device)
        found.append((backbone.normalize(images), torch.randperm(shape.batch_size, generator=draws) % CLASSES))
    return found


def head_start(backbone: Backbone) -> Tensor:
    """(classes, D)."""
    draws = torch.Generator().manual_seed(1)
    return torch.randn(CLASSES, backbone.feature_width, generator=draws).to(backbone.device)


def attach_branches(backbone: Backbone, rank: int) -> None:
    """A general and an isolated branch on every target layer, with random orthonormal rows, as a later task has it."""
    draws = torch.Generator().manual_seed(0)
    backbone.attach()
    for branched in backbone.attached.values():
        for kind, scale in (("general", GAMMA_GENERAL), ("isolated", GAMMA_ISOLATED)):
            basis_Dr = torch.linalg.qr(torch.randn(branched.base.in_features, rank, generator=draws)).Q
            branched.add(kind, basis_Dr.mT * DOWN_SCALE, scale=scale, train_down=False)


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


def plain_lora(backbone: Backbone, rank: int) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the backbone with plain LoRA of this rank on its target layers, and the trained B of each."""
    draws = torch.Generator().manual_seed(0)
    model = copy.deepcopy(backbone.model)
    ups: list[Tensor] = []
    for name in backbone.layers:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        lora = PlainLora(base, rank, draws)
        model.set_submodule(name, lora)
        ups.append(lora.up_Or)
    return model, ups


def device_name(device: str) -> str:
    """What ran it, as a table should say."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def table(document: dict[str, Any]) -> str:
    """A column for each shape."""
    rows: dict[str, dict[str, float]] = document["rows"]
    told = ("device", "precision", "torch", "threads", "pairs")
    lines = [", ".join(f"{key} {document[key]}" for key in told), f"{'':32}" + "".join(f"{name:>14}" for name in rows)]
    for key in next(iter(rows.values())):
        lines.append(f"{key:32}" + "".join(f"{row[key]:14.3f}" for row in rows.values()))
    return "\n".join(lines)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall seconds of one round, the accelerator's work included."""
    started = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def interleaved(rounds: dict[str, Callable[[], None]], pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round, ``pairs`` times in turn, after one for warmth.

    Turns go both ways, so that a machine that slows down or speeds up favours nobody.
    """
    for work in rounds.values():
        seconds(work, device)
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    for pair in range(pairs):
        for name in list(rounds)[:: 1 if pair % 2 == 0 else -1]:
            taken[name].append(seconds(rounds[name], device))
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over pairs."""
    return median(a / b for a, b in zip(above, below, strict=True))
