"""Frozen backbones: adapted at named linear layers, restored bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loda.branch import BranchedLinear, attach, detach
from loda.errors import ConfigError
from loda.merging import MergedWeights

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class InputSpec:
    """What images the backbone takes: square side in pixels, channels, and the normalisation per channel."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Backbone:
    """A frozen vision transformer whose class-token feature is read, and whose target layers are adapted.

    Args:
        model: a timm model with ``num_classes=0``; it is put into eval mode and frozen.
        target: suffixes of the names of the linear layers to adapt.
        inputs: what images it takes.
        config: how to build it again with plain timm: ``architecture`` and ``options``.
        device: where it lives.

    Attributes:
        precision: of the products in a pass; ``bfloat16`` is autocast's, over weights that stay float32.

    Raises:
        ConfigError: no linear layer has one of the suffixes.
    """

    def __init__(
        self, model: nn.Module, target: Sequence[str], inputs: InputSpec, config: dict[str, Any], device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.precision: Precision = "float32"
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.inputs = inputs
        self.config = config
        self.layers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(name == t or name.endswith("." + t) for t in target)
        ]
        linear = sorted({".".join(n.split(".")[-2:]) for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        unmatched = [t for t in target if not any(n == t or n.endswith("." + t) for n in self.layers)]
        if unmatched:
            raise ConfigError(f"backbone.target: no linear layer ends in {unmatched}; this backbone has {linear}")
        self.original = {name: self._linear(name).weight.detach().clone() for name in self.layers}
        self._merged = MergedWeights(self.original)
        self.attached: dict[str, BranchedLinear] = {}
        self.shared = nn.ModuleDict()  # what a method attaches once for all layers, such as gates
        self.tasks_B: Tensor | None = None  # of the images that are passing, where a method knows them
        self.route: Callable[[Tensor], None] | None = None  # called first: decides image by image what is at work
        self._hooks: list[RemovableHandle] = []
        self.layers_by_width: dict[int, tuple[str, ...]] = {}
        for name in self.layers:
            width = self._linear(name).in_features
            self.layers_by_width[width] = (*self.layers_by_width.get(width, ()), name)
        self.feature_width = int(getattr(model, "num_features", 0))
        self.digest = self._digest()
        self._mean = torch.tensor(inputs.mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(inputs.std, device=self.device).view(1, -1, 1, 1)

    def _linear(self, name: str) -> nn.Linear:
        module = self.model.get_submodule(name)
        return module.base if isinstance(module, BranchedLinear) else module  # type: ignore[return-value]

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each adapted layer."""
        return {name: (self._linear(name).in_features, self._linear(name).out_features) for name in self.layers}

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """Float images in [0, 1] as the backbone wants them."""
        return (images_BCHW - self._mean) / self._std

    def features(self, images_BCHW: Tensor, tasks_B: Tensor | None = None) -> Tensor:
        """(B, D) float32 features after the final norm, of normalised images.

        ``tasks_B`` is for methods that need the task's id.
        """
        self.tasks_B = tasks_B
        if self.route is not None:
            self.route(images_BCHW)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features_BD: Tensor = self.model(images_BCHW)
        return features_BD.to(images_BCHW.dtype)

    def load_merges(self, merges: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the adapted weights to those after these tasks (:class:`loda.merging.MergedWeights`)."""
        with torch.no_grad():
            for name, weight_OD in self._merged.after(merges).items():
                self._linear(name).weight.copy_(weight_OD)

    def attach(self) -> None:
        """Put branch holders on all target layers."""
        self.detach()
        self.attached = attach(self.model, self.layers)

    def detach(self) -> None:
        """Take all branches, shared modules and hooks off; the backbone is plain again."""
        detach(self.model, self.attached)
        self.attached = {}
        self.shared = nn.ModuleDict()
        self.route = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_patch_tokens(self, read: Callable[[Tensor], None]) -> None:
        """Until :meth:`detach`, hand the frozen patch embedding (B, N, D) of every pass to ``read``."""
        embedding = self.model.get_submodule("patch_embed")
        self._hooks.append(embedding.register_forward_hook(lambda module, inputs, tokens_BND: read(tokens_BND)))

    def branch_tensors(self) -> dict[str, Tensor]:
        """Every branch tensor, as ``<layer>/<branch>/<down|up>``, and what only some methods have: a trained scale
        and an anchor as ``<layer>/<branch>/<scale|anchor>``, a change of full rank as ``<layer>/change``."""
        tensors: dict[str, Tensor] = {}
        for layer, branched in self.attached.items():
            for name, branch in branched.branches.items():
                tensors |= {f"{layer}/{name}/down": branch.down.detach(), f"{layer}/{name}/up": branch.up.detach()}
                if isinstance(branch.scale, Tensor):
                    tensors[f"{layer}/{name}/scale"] = branch.scale.detach()
                if branch.anchor is not None:
                    tensors[f"{layer}/{name}/anchor"] = branch.anchor
            if branched.change is not None:
                tensors[f"{layer}/change"] = branched.change.detach()
        return tensors

    def attach_tensors(self, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Attach trained branches again, from :meth:`branch_tensors` and the branches' scales in their order."""
        self.attach()
        for layer, branched in self.attached.items():
            for name, scale in scales.items():  # not the tensors' order: files keep them in one of their own
                if f"{layer}/{name}/down" in tensors:
                    down_rD, up_Or = tensors[f"{layer}/{name}/down"], tensors[f"{layer}/{name}/up"]
                    own = float(tensors.get(f"{layer}/{name}/scale", scale))
                    anchor_Or = tensors.get(f"{layer}/{name}/anchor")
                    branched.add(name, down_rD, up_Or, scale=own, train_down=False, anchor_Or=anchor_Or)
            if f"{layer}/change" in tensors:
                branched.add_change(tensors[f"{layer}/change"])

    def branch_scales(self) -> dict[str, float]:
        """γ by branch name (the same in all layers, unless it is trained)."""
        return {name: branch.number for linear in self.attached.values() for name, branch in linear.branches.items()}
