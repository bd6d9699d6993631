"""A tiny backbone with LoDA's branches attached, ready to be trained or merged."""

from __future__ import annotations

import torch
from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Observation
from loda.methods.loda import Loda, LodaSettings
from loda.moments import LayerMoments, MomentRecorder
from tests.conftest import ALL_TARGETS

TARGETS = [("attn.qkv",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",), ALL_TARGETS]


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def moments(backbone: Backbone, images_BCHW: Tensor) -> LayerMoments:
    modules = {name: backbone.model.get_submodule(name) for name in backbone.layers}
    recorder = MomentRecorder(modules, backbone.layers_by_width, backbone.device)
    with torch.inference_mode():
        backbone.features(images_BCHW)
    recorder.close()
    return recorder.value()


def fill_up_projections(backbone: Backbone, seed: int = 0, size: float = 0.3) -> None:
    """Stand-in for training: B anywhere but at zero."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for branched in backbone.attached.values():
            for branch in branched.branches.values():
                branch.up.copy_(size * torch.randn(branch.up.shape, generator=draws))


def second_task(backbone: Backbone, **settings: object) -> tuple[Loda, Observation]:
    """LoDA at the start of its second task, with branches attached."""
    method = Loda(LodaSettings(rank_general=4, rank_isolated=3, **settings))  # type: ignore[arg-type]
    method.old = moments(backbone, images(seed=1))
    observation = Observation(moments(backbone, images(seed=2) ** 3), position=1)
    method.begin_task(backbone, observation)
    return method, observation


def features(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        return backbone.features(images_BCHW).clone()
