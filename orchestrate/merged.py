"""A learned sequence as one plain timm model: branches merged into the weights, the final classifier as its head."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.errors import ConfigError, StageError
from loda.methods import build_method
from loda.settings import RunSettings
from loda.state import Artifact
from loda.vision import timm
from loda.workbench import Workbench, merge_factors

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
# A registered timm name that hands all its arguments on to VisionTransformer and changes nothing else.
_ANY_VIT = "vit_tiny_patch16_224"
_VIT_ARGUMENTS = ("patch_size", "embed_dim", "depth", "num_heads")  # those that this name fixes unless told otherwise


def write_merged(
    bench: Workbench, settings: RunSettings, chain: Sequence[Artifact], evaluation: Artifact, directory: Path
) -> dict[str, Any]:
    """Write a model that ``timm.create_model("local-dir:<directory>", pretrained=True)`` loads, with no code of ours.

    It predicts what ``evaluate`` did: logits are those of the final classifier over the merged backbone's features.
    Equal inputs give equal bytes. The backbone is left without merges.

    Args:
        bench: the workbench of ``settings``.
        settings: of the sequence.
        chain: its ``consolidate`` artifacts, first task first.
        evaluation: its last ``evaluate`` artifact.
        directory: made if it isn't there; existing files of these names are replaced, both or none.

    Returns:
        The contents of ``config.json``; ``label_names`` are the classes in the order of the head's rows.

    Raises:
        ConfigError: the method's result isn't one plain model.
        StageError: the artifacts don't belong together, or timm's model doesn't give the logits that ours gives.
    """
    method = build_method(settings.method)
    if method.export_refusal:
        raise ConfigError(f"{method.name} can't be exported as one plain model: {method.export_refusal}")
    classes = chain[-1].meta["classes"]
    weight_CD, bias_C = evaluation.tensors["classifier.weight"], evaluation.tensors["classifier.bias"]
    if len(weight_CD) != len(classes):
        raise StageError(f"the classifier has {len(weight_CD)} rows, but the sequence learned {len(classes)} classes")
    backbone = bench.backbone
    architecture, model_args = _plain_timm(backbone.config)
    merges = method.weights_at_rest([merge_factors(artifact) for artifact in chain])
    backbone.load_merges(merges)
    try:
        state = {name: tensor.detach().cpu().clone() for name, tensor in backbone.model.state_dict().items()}
        with torch.random.fork_rng(devices=[]):  # timm draws weights, which are replaced at once
            model = timm.create_model(architecture, num_classes=len(classes), **model_args).float().eval()
        heads = _head_names(model)
        for head in heads:
            state |= {f"{head}.weight": weight_CD.clone(), f"{head}.bias": bias_C.clone()}
        _load(model, state)
        _check_same(backbone, model, weight_CD, bias_C)
    finally:
        backbone.load_merges([])
    names = [bench.dataset.class_names[label] for label in classes]
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": backbone.feature_width,
        "model_args": model_args,
        "pretrained_cfg": _input_config(backbone, model) | {"num_classes": len(classes)},
        "label_names": names,
        "continual_learning": {
            "method": settings.method.name,
            "classifier": evaluation.meta["classifier"],
            "tasks": _tasks_in_order(bench, classes),
            "classes": classes,
            "state_digest": chain[-1].digest,
            "dataset": bench.dataset.name,
            "dataset_digest": bench.dataset.digest,
            "backbone_digest": backbone.digest,
        },
    }
    _write_both(
        directory,
        {
            MODEL_FILE: save({name: state[name].contiguous() for name in sorted(state)}, {"format": "pt"}),
            CONFIG_FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        },
    )
    return config


def _tasks_in_order(bench: Workbench, classes: Sequence[int]) -> list[str]:
    """Names of the learned tasks, in the order in which their classes stand in the head."""
    position = {label: index for index, label in enumerate(classes)}
    learned = [task for task in bench.tasks if task.classes[0] in position]
    return [task.name for task in sorted(learned, key=lambda task: position[task.classes[0]])]


def _plain_timm(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A registered architecture and the arguments that build this backbone from it."""
    options = {key: value for key, value in config["options"].items() if key != "num_classes"}
    if config["architecture"] != "VisionTransformer":
        return str(config["architecture"]).split(".")[0], options
    defaults = inspect.signature(timm.models.VisionTransformer).parameters
    return _ANY_VIT, {**{name: defaults[name].default for name in _VIT_ARGUMENTS}, **options}


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear heads. A distilled model averages two; both get the same weights."""
    names = model.pretrained_cfg["classifier"]  # type: ignore[index]
    return (names,) if isinstance(names, str) else tuple(names)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StageError(f"the merged weights don't fit timm's model: {' '.join(str(error).split())}") from error


@torch.inference_mode()
def _check_same(backbone: Backbone, model: nn.Module, weight_CD: Tensor, bias_C: Tensor) -> None:
    """Both models on the same noise: a head or a pooling layer that timm treats differently must not go unnoticed."""
    inputs = backbone.inputs
    shape = (2, inputs.channels, inputs.image_size, inputs.image_size)
    noise_BCHW = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    features_BD = backbone.features(noise_BCHW.to(backbone.device)).cpu()
    expected_BC, found_BC = F.linear(features_BD, weight_CD, bias_C), model(noise_BCHW)
    tolerance = 1e-3 * float(expected_BC.abs().max()) + 1e-5
    if expected_BC.shape != found_BC.shape or not torch.allclose(expected_BC, found_BC, rtol=0, atol=tolerance):
        raise StageError(
            f"timm's {backbone.config['architecture']} with a head doesn't give the logits of backbone and classifier; "
            "this architecture can't be exported"
        )


def _input_config(backbone: Backbone, model: nn.Module) -> dict[str, Any]:
    """What timm's own transforms read, so that ``timm.data.create_transform`` prepares images as the stages did."""
    own: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    inputs = backbone.inputs
    return {
        "input_size": [inputs.channels, inputs.image_size, inputs.image_size],
        "fixed_input_size": bool(own.get("fixed_input_size", False)),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "pool_size": own.get("pool_size"),
        "first_conv": own.get("first_conv"),
        "classifier": own.get("classifier"),
    }


def _write_both(directory: Path, files: Mapping[str, bytes]) -> None:
    """Each file whole or not at all; the small one, which makes the folder a model, last."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as temporary:
        for name, content in files.items():
            with Path(temporary, name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            Path(temporary, name).replace(directory / name)
