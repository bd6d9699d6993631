"""Backbones by name: the bundled one, or any vision transformer of timm with weights from a file or from timm."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loda.backbone import Backbone, InputSpec
from loda.errors import ConfigError
from loda.reading import ReadingError, check_archive, load_safetensors
from loda.seeds import derive_seed
from loda.vision import resample_abs_pos_embed, timm

BUNDLED = "alphabet_vit"
SAFETENSORS, NUMPY = ".safetensors", ".npz"
# Arguments of timm.create_model that name files, addresses or other code than the model's.
_NOT_OPTIONS = frozenset(
    ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load", "cache_dir")
) | {"pretrained_filter_fn", "pretrained_strict", "model_name", "exportable", "no_jit", "scriptable"}
TORCH = (".pth", ".pt", ".bin", ".tar")  # timm reads them with torch's weights_only, which builds nothing but tensors


def _bundled_config() -> dict[str, Any]:
    return json.loads((resources.files("loda") / "bundled" / f"{BUNDLED}.json").read_text(encoding="utf-8"))


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """How a state differs from what the model holds; none if it fits."""
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if state[name].shape != own[name].shape
    ]
    found = []
    if missing:
        found.append(f"{len(missing)} tensors missing (first: {missing[0]})")
    if unknown:
        found.append(f"{len(unknown)} tensors unknown to the model (first: {unknown[0]})")
    return found + shapes[:3]


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    classifiers = ("head.", "head_dist.", "fc_norm_head.")
    return {name: tensor.float() for name, tensor in state.items() if not name.startswith(classifiers)}


def _checked_load(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    state = _without_head(state)
    if found := _misfits(model, state):
        raise ConfigError(f"backbone.weights: {source} doesn't fit the backbone: {'; '.join(found)}")
    model.load_state_dict(state)


def build_backbone(
    name: str = BUNDLED,
    weights: str | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    normalization: str = "backbone",
    target: Sequence[str] = ("attn.qkv",),
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Backbone:
    """A frozen backbone.

    Args:
        name: ``alphabet_vit`` (bundled) or any timm model name, with or without its tag.
        weights: a file: safetensors, the published ``.npz`` of the original ViTs, or a state saved with torch that
            holds nothing but tensors; names as timm's own, or any layout that timm converts for this model. ``random``
            for a seeded random start; None with ``pretrained=True`` for timm's published weights.
        image_size: side in pixels; None: the backbone's own. timm resizes position embeddings.
        normalization: ``backbone`` (its config's mean and std) or ``none``.
        target: suffixes of adapted layers.
        options: further arguments of ``timm.create_model`` (or of VisionTransformer for ``alphabet_vit``).

    Raises:
        ConfigError: unknown name, no weights given, file missing or not fitting, no network for ``pretrained``, or a
            target layer that the model doesn't call as a layer.
    """
    options = dict(options or {})
    if wrong := sorted(_NOT_OPTIONS & set(options)):
        raise ConfigError(
            f"backbone.options: {', '.join(wrong)}: not for a study, which names files by backbone.weights only; "
            "options are arguments of the model itself, such as patch_size"
        )
    if name == BUNDLED:
        config = _bundled_config()
        architecture = {**config["architecture"], **options}
        file = weights or str(resources.files("loda") / "bundled" / f"{BUNDLED}.safetensors")
        patch = int(architecture["patch_size"])
        size = image_size or int(architecture["img_size"])
        if size % patch:
            raise ConfigError(f"backbone.image_size: expected a multiple of the patch size {patch}, but got {size}")
        architecture["img_size"] = size
        try:
            model: nn.Module = timm.models.VisionTransformer(**architecture)
        except Exception as error:
            raise ConfigError(f"backbone.options: {name} can't be built with {options}: {_short(error)}") from error
        inputs = InputSpec(size, int(architecture["in_chans"]), tuple(config["mean"]), tuple(config["std"]))
        rebuild = {"architecture": "VisionTransformer", "options": architecture}
        if file != "random":
            state = _read_safetensors(_existing(file))
            if "pos_embed" in state:  # the published way to another image size: resample the position embedding
                grid = [size // patch, size // patch]
                state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"].float(), grid, num_prefix_tokens=1)
            _checked_load(model, state, file)
    else:
        model, inputs, rebuild = _timm_model(name, weights, pretrained, image_size, options)
    if normalization == "none":
        inputs = InputSpec(inputs.image_size, inputs.channels, (0.0,) * inputs.channels, (1.0,) * inputs.channels)
    backbone = Backbone(model, target, inputs, rebuild, device)
    _check_called(backbone)
    return backbone


@torch.inference_mode()
def _check_called(backbone: Backbone) -> None:
    """Whether every adapted layer is called as a layer, once an image: a branch on any other would do nothing.

    Raises:
        ConfigError: some models multiply by a layer's weight themselves (BEiT, fused EVA), or share one layer.
    """
    calls = dict.fromkeys(backbone.layers, 0)

    def counter(name: str) -> Any:
        def count(module: nn.Module, inputs: object) -> None:
            calls[name] += 1

        return count

    modules = {name: backbone.model.get_submodule(name) for name in backbone.layers}
    handles = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
    inputs = backbone.inputs
    try:
        features = backbone.features(
            torch.zeros(1, inputs.channels, inputs.image_size, inputs.image_size, device=backbone.device)
        )
    except Exception as error:  # whatever a model raises on images that it can't take
        raise ConfigError(
            f"backbone.image_size: {backbone.config['architecture']} can't take images of {inputs.image_size} x "
            f"{inputs.image_size} pixels: {' '.join(str(error).split())}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if features.shape != (1, backbone.feature_width):
        raise ConfigError(
            f"backbone.name: {backbone.config['architecture']} gives features of shape {tuple(features.shape)}, "
            f"expected (1, {backbone.feature_width}): not a vision transformer with pooled features"
        )
    wrong = [name for name, times in calls.items() if times != 1]
    if wrong:
        raise ConfigError(
            f"backbone.target: {backbone.config['architecture']} doesn't call {wrong[0]} as a layer of its own "
            f"({len(wrong)} of {len(calls)} layers), so a branch there would do nothing; choose other layers"
        )


def _existing(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"backbone.weights: no file {file!r}; give a safetensors file with timm's tensor names")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(path)
    except (ReadingError, OSError) as error:
        raise ConfigError(f"backbone.weights: {str(path)!r} is not a readable safetensors file ({error})") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _timm_model(
    name: str, weights: str | None, pretrained: bool, image_size: int | None, options: dict[str, Any]
) -> tuple[nn.Module, InputSpec, dict[str, Any]]:
    plain = name.split(".")[0]
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=3)
        names = ", ".join(near) or "see timm.list_models()"
        raise ConfigError(f"backbone.name: timm has no model {name!r}; near: {names}")
    if weights is None and not pretrained:
        raise ConfigError(
            f"backbone.weights: {name} needs weights; set backbone.weights to a safetensors file, "
            "backbone.pretrained to true (timm downloads them), or backbone.weights to 'random'"
        )
    if image_size is not None:
        options["img_size"] = image_size
    build: dict[str, Any] = {"num_classes": 0, **options}
    try:
        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(0, "random backbone", name))
                model = timm.create_model(name, **build)
        elif weights is None:
            model = _published(name, build)
        else:
            model = _from_file(name, _existing(weights), build)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"backbone.name: timm could not build {name!r} with {build}: {_short(error)}") from error
    data = timm.data.resolve_model_data_config(model)
    channels, side, _ = data["input_size"]
    inputs = InputSpec(image_size or int(side), int(channels), tuple(data["mean"]), tuple(data["std"]))
    kept = {key: value for key, value in build.items() if key != "num_classes"}
    return model.float(), inputs, {"architecture": name, "options": kept}


def _published(name: str, build: Mapping[str, Any]) -> nn.Module:
    """With the weights that timm knows, from its cache or the network."""
    try:
        timm.create_model(name, **build)  # what is wrong with name or options isn't the network's fault
    except Exception as error:
        raise ConfigError(f"backbone.name: timm could not build {name!r} with {build}: {_short(error)}") from error
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if config is None or not config.has_weights:
        raise ConfigError(f"backbone.pretrained: timm publishes no weights for {name!r}; give backbone.weights: FILE")
    try:
        return timm.create_model(name, pretrained=True, **build)
    except Exception as error:
        raise ConfigError(
            f"backbone.pretrained: the weights of {name} are neither in timm's cache nor could they be fetched "
            f"({_short(error)}); without a network, set backbone.weights to a file that you have brought here"
        ) from error


def _from_file(name: str, path: Path, build: Mapping[str, Any]) -> nn.Module:
    """With weights from a file, converted and resized to the model's image size by timm's own loader."""
    suffix = path.suffix.lower()
    if suffix not in (SAFETENSORS, NUMPY, *TORCH):
        known = ", ".join((SAFETENSORS, NUMPY, *TORCH))
        raise ConfigError(f"backbone.weights: expected a file of one of the kinds {known}, but got {str(path)!r}")
    state = _read_safetensors(path) if suffix == SAFETENSORS else None
    if state is None:
        try:
            check_archive(path)
        except (ReadingError, OSError) as error:
            raise ConfigError(f"backbone.weights: {str(path)!r} is refused: {error}") from error
    # The original ViTs' arrays have a layout of their own, which the model reads itself.
    overlay = {"file": str(path), "custom_load": suffix == NUMPY}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **build)
    except Exception as error:
        found: list[str] = []
        if state is not None:
            # What is missing is clearest against the model at its own image size, before anything is resized.
            own_size = timm.create_model(name, **{**build, "img_size": None} if "img_size" in build else build)
            found = _misfits(own_size, _without_head(state))
        reason = "; ".join(found) or _short(error)
        raise ConfigError(f"backbone.weights: {path} doesn't fit the backbone {name}: {reason}") from error
