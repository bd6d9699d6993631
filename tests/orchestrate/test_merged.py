"""The merged model: plain timm loads it, in a process that knows nothing of ours, and it predicts the same."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loda.datasets import ImageDataset
from loda.errors import StageError
from loda.graph import sequence_nodes
from loda.run import run_nodes
from loda.settings import RunSettings
from loda.state import Artifact
from loda.vision import timm
from loda.workbench import Workbench, open_workbench
from orchestrate.merged import write_merged

SettingsFactory = Callable[..., RunSettings]

# Reads images and labels from the Parquet file itself. The first lines are for a CUDA build of torchvision beside a CPU
# build of torch, whose import fails otherwise (pytorch/vision#9085).
PLAIN_TIMM = """
import io, json, sys
import torch
if torch.version.cuda is None and torch.version.hip is None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import pyarrow.parquet as pq
import timm
from PIL import Image

torch.set_num_threads(1)
folder, parquet = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
names = model.pretrained_cfg["label_names"]
rows = [row for row in pq.read_table(parquet).to_pylist() if row["split"] == "test" and row["label_name"] in names]
mode = "RGB" if model.pretrained_cfg["input_size"][0] == 3 else "L"
images = torch.stack([transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert(mode)) for row in rows])
with torch.inference_mode():
    predicted = model(images).argmax(-1).tolist()
right = {name: 0 for name in names}
for row, index in zip(rows, predicted):
    right[row["label_name"]] += names[index] == row["label_name"]
foreign = sorted(name for name in sys.modules if name.split(".")[0] in ("loda", "orchestrate"))
print(json.dumps({"right": right, "images": len(rows), "foreign": foreign}))
"""

CHANCE = 4  # of 24 test images of 6 classes

_Sequence = tuple[Workbench, RunSettings, list[Artifact], Artifact]


def learn(settings: RunSettings, order: tuple[int, ...]) -> _Sequence:
    bench = open_workbench(settings)
    nodes = sequence_nodes(bench, settings, order, "test")
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts)
    chain = [artifacts[node.key] for node in nodes if node.step == "consolidate"]
    return bench, settings, chain, artifacts[[node.key for node in nodes if node.step == "evaluate"][-1]]


def plain_timm(folder: Path, parquet: Path) -> dict[str, Any]:
    command = [sys.executable, "-I", "-c", PLAIN_TIMM, str(folder), str(parquet)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def correct_by_task(bench: Workbench, order: tuple[int, ...], right: dict[str, int]) -> list[int]:
    return [sum(right[bench.dataset.class_names[label]] for label in bench.tasks[index].classes) for index in order]


@pytest.fixture
def learned(tiny_settings: SettingsFactory) -> _Sequence:
    # Over random weights, class means with little training keep accuracies far from chance.
    return learn(tiny_settings(head={"classifier": "lda"}, training={"lr": 0.002}), (2, 0, 1))


def test_plain_timm_in_a_fresh_process_repeats_every_count(
    learned: _Sequence, shapes_parquet: Path, tmp_path: Path
) -> None:
    bench, _, _, evaluation = learned
    config = write_merged(*learned, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    found = plain_timm(tmp_path / "model", shapes_parquet)
    assert found["foreign"] == []
    assert found["images"] == sum(evaluation.meta["count"]) == 24
    assert correct_by_task(bench, (2, 0, 1), found["right"]) == evaluation.meta["correct"]
    assert sum(evaluation.meta["correct"]) > CHANCE
    order = [label for index in (2, 0, 1) for label in bench.tasks[index].classes]
    assert config["label_names"] == [bench.dataset.class_names[label] for label in order]


def test_the_bundled_backbone_exports_as_a_registered_timm_name(
    tiny_settings: SettingsFactory, shapes_parquet: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(
        backbone={"name": "alphabet_vit", "weights": None, "image_size": None, "options": {}},
        head={"classifier": "class_means"},
        training={"lr": 0.002},
    )
    sequence = learn(settings, (0, 1, 2))
    write_merged(*sequence, tmp_path)
    found = plain_timm(tmp_path, shapes_parquet)
    expected = sequence[3].meta["correct"]
    assert correct_by_task(sequence[0], (0, 1, 2), found["right"]) == expected
    assert sum(expected) > CHANCE


def test_timm_prepares_images_as_the_stages_do(tiny_settings: SettingsFactory, tmp_path: Path) -> None:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    sequence = learn(tiny_settings(backbone={"image_size": 24, "options": options}), (0, 1, 2))
    bench = sequence[0]
    write_merged(*sequence, tmp_path)
    config = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config), is_training=False)
    wide = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 58, 3), dtype=np.uint8)).save(wide, format="PNG")
    labels, split = np.zeros(2, np.int64), np.array(["train", "test"])
    for image in (bench.dataset.images[0].as_py(), wide.getvalue()):
        decoded = ImageDataset("one", [image, image], labels, ["x"], split).decode([0], 24).float() / 255
        prepared = transform(Image.open(io.BytesIO(image)).convert("RGB"))
        torch.testing.assert_close(prepared, bench.backbone.normalize(decoded)[0], rtol=0, atol=1e-6)


def test_weights_are_the_start_plus_every_merge(learned: _Sequence, tmp_path: Path) -> None:
    bench, _, chain, evaluation = learned
    write_merged(*learned, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    layer = bench.backbone.layers[0]
    change = sum(a.tensors[f"merge/{layer}.up"] @ a.tensors[f"merge/{layer}.down"] for a in chain)
    torch.testing.assert_close(written[f"{layer}.weight"], bench.backbone.original[layer] + change)
    assert float(torch.as_tensor(change).abs().max()) > 0
    assert torch.equal(written["head.weight"], evaluation.tensors["classifier.weight"])
    assert torch.equal(bench.backbone.model.get_parameter(f"{layer}.weight"), bench.backbone.original[layer])


def test_equal_sequences_give_equal_bytes(learned: _Sequence, tmp_path: Path) -> None:
    write_merged(*learned, tmp_path / "a")
    write_merged(*learned, tmp_path / "b")
    write_merged(*learned, tmp_path / "b")  # over an existing model
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_a_joint_model_exports(tiny_settings: SettingsFactory, shapes_parquet: Path, tmp_path: Path) -> None:
    settings = tiny_settings(method={"name": "joint"}, head={"classifier": "class_means"}, training={"lr": 0.002})
    sequence = learn(settings, (0, 1, 2))
    write_merged(*sequence, tmp_path)
    found = plain_timm(tmp_path, shapes_parquet)
    expected = sequence[3].meta["correct"]
    assert correct_by_task(sequence[0], (0, 1, 2), found["right"]) == expected
    assert sum(expected) > CHANCE


def test_a_distilled_model_with_two_heads_exports(
    tiny_settings: SettingsFactory, shapes_parquet: Path, tmp_path: Path
) -> None:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = {"name": "deit_tiny_distilled_patch16_224", "options": options}
    sequence = learn(
        tiny_settings(backbone=backbone, head={"classifier": "class_means"}, training={"lr": 0.002}), (0, 1, 2)
    )
    write_merged(*sequence, tmp_path)
    found = plain_timm(tmp_path, shapes_parquet)
    expected = sequence[3].meta["correct"]
    assert correct_by_task(sequence[0], (0, 1, 2), found["right"]) == expected
    assert sum(expected) > CHANCE


def test_a_classifier_of_another_sequence_is_refused(learned: _Sequence, tmp_path: Path) -> None:
    bench, settings, chain, evaluation = learned
    with pytest.raises(StageError, match="6 rows, but the sequence learned 4 classes"):
        write_merged(bench, settings, chain[:2], evaluation, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_that_predicts_otherwise_is_not_written(
    learned: _Sequence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, settings, chain, evaluation = learned
    pooled = dict(bench.backbone.config["options"], global_pool="avg", fc_norm=False)
    monkeypatch.setattr(bench.backbone, "config", dict(bench.backbone.config, options=pooled))
    with pytest.raises(StageError, match="can't be exported"):
        write_merged(bench, settings, chain, evaluation, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_configuration_names_what_it_came_from(learned: _Sequence, tmp_path: Path) -> None:
    bench, _, chain, _ = learned
    write_merged(*learned, tmp_path)
    origin = json.loads((tmp_path / "config.json").read_text())["continual_learning"]
    assert origin["state_digest"] == chain[-1].digest
    assert origin["tasks"] == [bench.tasks[index].name for index in (2, 0, 1)]
    assert origin["dataset_digest"] == bench.dataset.digest
    assert origin["classifier"] == "lda"
