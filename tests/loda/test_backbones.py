"""Backbones of many kinds: by name, from files in the layouts that users have, refused where nothing would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loda.branch import BranchedLinear
from loda.errors import ConfigError
from loda.timm_models import build_backbone
from loda.vision import timm
from tests.conftest import TINY_VIT

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"name": "vit_tiny_patch16_224", "image_size": 32, "target": ("attn.qkv",)},
    "register tokens": {
        "name": "vit_wee_patch16_reg1_gap_256",
        "image_size": 32,
        "target": ("attn.qkv", "mlp.fc2"),
        "options": {"depth": 2},
    },
    "DINOv2": {
        "name": "vit_small_patch14_reg4_dinov2",
        "image_size": 28,
        "options": {"depth": 2},
        "target": ("attn.qkv", "attn.proj"),
    },
    "CLIP": {
        "name": "vit_base_patch32_clip_224.openai",
        "image_size": 64,
        "options": {"depth": 2},
        "target": ("attn.qkv",),
    },
    "separate qkv": {
        "name": "eva02_base_patch14_224",
        "image_size": 28,
        "options": {"depth": 2},
        "target": ("attn.q_proj", "attn.v_proj"),
    },
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "image_size": 32, "options": {"depth": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_on_any_kind_changes_the_features_and_comes_off_again(kind: str) -> None:
    backbone = build_backbone(weights="random", **KINDS[kind])
    inputs = backbone.inputs
    images_BCHW = torch.rand(2, 3, inputs.image_size, inputs.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = backbone.features(images_BCHW)
        assert plain.shape == (2, backbone.feature_width)
        backbone.attach()
        for layer, branched in backbone.attached.items():
            assert isinstance(branched, BranchedLinear)
            d_in, d_out = backbone.widths[layer]
            draws = torch.Generator().manual_seed(len(layer))
            up_Or = torch.randn(d_out, 2, generator=draws)
            branched.add("general", torch.randn(2, d_in, generator=draws), up_Or, scale=1.0, train_down=False)
        assert not torch.equal(backbone.features(images_BCHW), plain)  # layer scales may make it little
        backbone.detach()
        assert torch.equal(backbone.features(images_BCHW), plain)


def test_normalisation_is_the_backbones_own_or_none() -> None:
    clip = build_backbone(weights="random", **KINDS["CLIP"])
    assert clip.inputs.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    none = build_backbone(weights="random", normalization="none", **KINDS["CLIP"])
    assert (none.inputs.mean, none.inputs.std) == ((0, 0, 0), (1, 1, 1))
    images_BCHW = torch.rand(1, 3, 64, 64)
    assert torch.equal(none.normalize(images_BCHW), images_BCHW)
    assert none.digest == clip.digest  # the same weights; what differs is in the stage keys beside them


@pytest.mark.parametrize(
    ("name", "layer"), [("eva02_tiny_patch14_224", "attn.qkv"), ("beit_base_patch16_224", "attn.qkv")]
)
def test_a_layer_that_the_model_does_not_call_is_refused(name: str, layer: str) -> None:
    size = 28 if "14" in name else 32
    with pytest.raises(ConfigError, match=r"doesn't call blocks\.0\.attn\.qkv as a layer of its own"):
        build_backbone(name, weights="random", image_size=size, target=(layer,), options={"depth": 2})


class Files:
    """A tiny model's weights, in the layouts in which people have them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = {**TINY_VIT["options"], "img_size": 32}
        torch.manual_seed(5)
        self.model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **options).eval()
        self.state = self.model.state_dict()
        self.images_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.features = self.model.forward_head(self.model.forward_features(self.images_BCHW), pre_logits=True)

    def safetensors(self) -> Path:
        save_file(self.state, self.folder / "timm.safetensors")
        return self.folder / "timm.safetensors"

    def torch_state(self) -> Path:
        torch.save({"epoch": 3, "state_dict": self.state}, self.folder / "checkpoint.pth.tar")
        return self.folder / "checkpoint.pth.tar"

    def npz(self) -> Path:
        """As the original JAX code saved it."""
        s = {name: tensor.numpy() for name, tensor in self.state.items()}
        depth, heads, width = 2, 2, 32
        arrays = {
            "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "embedding/bias": s["patch_embed.proj.bias"],
            "cls": s["cls_token"],
            "Transformer/posembed_input/pos_embedding": s["pos_embed"],
            "Transformer/encoder_norm/scale": s["norm.weight"],
            "Transformer/encoder_norm/bias": s["norm.bias"],
        }
        for i in range(depth):
            to, block = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
            arrays |= {
                f"{to}LayerNorm_0/scale": s[f"{block}norm1.weight"],
                f"{to}LayerNorm_0/bias": s[f"{block}norm1.bias"],
                f"{to}LayerNorm_2/scale": s[f"{block}norm2.weight"],
                f"{to}LayerNorm_2/bias": s[f"{block}norm2.bias"],
            }
            attention = f"{to}MultiHeadDotProductAttention_1/"
            weights, biases = np.split(s[f"{block}attn.qkv.weight"], 3), np.split(s[f"{block}attn.qkv.bias"], 3)
            for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
                arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, width // heads)
                arrays[f"{attention}{name}/bias"] = bias.reshape(heads, width // heads)
            out = s[f"{block}attn.proj.weight"].T.reshape(heads, width // heads, width)
            arrays |= {f"{attention}out/kernel": out, f"{attention}out/bias": s[f"{block}attn.proj.bias"]}
            for index, layer in enumerate(("fc1", "fc2")):
                arrays[f"{to}MlpBlock_3/Dense_{index}/kernel"] = s[f"{block}mlp.{layer}.weight"].T
                arrays[f"{to}MlpBlock_3/Dense_{index}/bias"] = s[f"{block}mlp.{layer}.bias"]
        np.savez(self.folder / "jax.npz", **arrays)
        return self.folder / "jax.npz"


@pytest.mark.parametrize("layout", ["safetensors", "torch_state", "npz"])
def test_weights_come_from_every_layout(layout: str, tmp_path: Path) -> None:
    files = Files(tmp_path)
    file = getattr(files, layout)()
    backbone = build_backbone(**{**TINY_VIT, "weights": str(file), "image_size": 32})
    with torch.no_grad():
        torch.testing.assert_close(backbone.features(files.images_BCHW), files.features, rtol=1e-5, atol=1e-6)
    larger = build_backbone(**{**TINY_VIT, "weights": str(file), "image_size": 48})  # position embeddings are resized
    assert larger.features(torch.zeros(1, 3, 48, 48)).shape == (1, 32)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched-by-a-checkpoint"),))


def test_a_torch_file_that_holds_more_than_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"evil\.pth"):
        build_backbone(**{**TINY_VIT, "weights": "evil.pth"})
    assert not (tmp_path / "touched-by-a-checkpoint").exists()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"name": "vit_tini_patch16_224"}, ["backbone.name", "vit_tini_patch16_224", "vit_tiny_patch16_224"]),
        ({"weights": None}, ["backbone.weights", "pretrained", "'random'"]),
        ({"weights": "weights.h5"}, ["backbone.weights", "weights.h5", ".safetensors, .npz"]),
        ({"weights": "absent.safetensors"}, ["backbone.weights", "no file 'absent.safetensors'"]),
        ({"weights": None, "pretrained": True, "name": "samvit_base_patch16_224"}, ["publishes no weights"]),
        ({"name": "vit_tiny_patch16_224.nonsense", "weights": None, "pretrained": True}, ["nonsense"]),
        ({"target": ("attn.q_proj",)}, ["backbone.target", "attn.q_proj", "attn.qkv"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named(
    values: dict[str, Any], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.h5").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        build_backbone(**{**TINY_VIT, **values})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_published_weights_without_a_network_are_asked_for_as_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"set backbone\.weights to a file") as caught:
        build_backbone("vit_wee_patch16_reg1_gap_256.sbb_in1k", pretrained=True)
    assert "vit_wee_patch16_reg1_gap_256.sbb_in1k" in str(caught.value)


def test_weights_of_another_size_are_told_by_their_shapes(tmp_path: Path) -> None:
    file = Files(tmp_path).safetensors()
    other = {**TINY_VIT, "weights": str(file), "options": {**TINY_VIT["options"], "embed_dim": 64}}
    with pytest.raises(ConfigError, match=r"doesn't fit .* is \(32,\), expected \(64,\)"):
        build_backbone(**other)
