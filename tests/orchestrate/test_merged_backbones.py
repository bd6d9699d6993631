"""Every kind of backbone ends as a model that plain timm loads and that gives the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loda.graph import sequence_nodes
from loda.run import run_nodes
from loda.state import Artifact
from loda.vision import timm
from loda.workbench import open_workbench
from orchestrate.merged import write_merged
from tests.conftest import SettingsFactory
from tests.loda.test_backbones import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_plain_timm(kind: str, tiny_settings: SettingsFactory, tmp_path: Path) -> None:
    values = {**KINDS[kind], "weights": "random"}
    values.setdefault("target", ("attn.qkv",))
    settings = tiny_settings(
        stream={"tasks": 2},
        backbone=values | {"options": values.get("options", {})},
        training={"epochs": 1},
        head={"start": "class_means", "classifier": "lda"},
    )
    bench = open_workbench(settings)
    nodes = sequence_nodes(bench, settings, (1, 0), "test")
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts)
    chain = [artifacts[node.key] for node in nodes if node.step == "consolidate"]
    evaluation = artifacts[nodes[-1].key]
    write_merged(bench, settings, chain, evaluation, tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    rows = bench.indices(range(bench.dataset.classes), "test")
    bench.backbone.load_merges(
        [{k.removeprefix("merge/"): t for k, t in a.tensors.items() if k.startswith("merge/")} for a in chain]
    )
    with torch.no_grad():
        images_NCHW = bench.backbone.normalize(bench.images(rows).float() / 255)
        features_ND = bench.backbone.features(images_NCHW)
        expected_NC = F.linear(
            features_ND, evaluation.tensors["classifier.weight"], evaluation.tensors["classifier.bias"]
        )
        found_NC = model(images_NCHW)
    torch.testing.assert_close(found_NC, expected_NC, rtol=1e-4, atol=1e-4 * float(expected_NC.abs().max()))
    assert torch.equal(found_NC.argmax(-1), expected_NC.argmax(-1))
