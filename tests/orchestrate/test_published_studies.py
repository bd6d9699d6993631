"""Studies of the published protocols: class orders, task cuts, and the training set-up of the tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loda.datasets import ImageDataset
from loda.head import CosineHead
from loda.methods import build_method, preset
from loda.methods.base import Observation
from loda.moments import LayerMoments
from loda.stream import cut_published, partition_classes, published_class_order
from loda.timm_models import build_backbone
from loda.training import build_optimizer, trainable_parameters
from orchestrate.orders import design_class_orders
from orchestrate.study import Study, load_study

# He et al. 2026: classes, tasks, classes of the last task, lr, weight decay, margin, rho_max, logit_norm.
PUBLISHED = {
    "cifar100-10": (100, 10, 10, 0.005, 5e-4, 0.0, 0.3, 0.3),
    "cub-10": (200, 10, 20, 0.005, 5e-4, 0.10, 0.3, 0.2),
    "imagenet-a-10": (200, 10, 20, 0.01, 5e-4, 0.15, 0.3, 0.2),
    "imagenet-a-20": (200, 20, 10, 0.01, 5e-4, 0.15, 0.3, 0.2),
    "imagenet-r-10": (200, 10, 20, 0.02, 0.0, 0.10, 0.7, 0.2),
    "imagenet-r-20": (200, 20, 10, 0.02, 0.0, 0.10, 0.7, 0.2),
    "domainnet-10": (200, 10, 20, 0.01, 5e-4, 0.0, 0.3, 0.1),
    "cars-10": (196, 10, 16, 0.01, 5e-4, 0.10, 0.5, 0.2),
}
FIRST = {200: [168, 136, 51, 9, 183], 100: [68, 56, 78, 8, 23]}  # seed 1993, as published


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    return {name: load_study(name) for name in PUBLISHED}


def bare(classes: int) -> ImageDataset:
    labels = np.repeat(np.arange(classes), 2)
    images = [b"-"] * len(labels)
    return ImageDataset("bare", images, labels, [str(c) for c in range(classes)], np.array(["train", "test"] * classes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_those_of_the_table(name: str, studies: dict[str, Study]) -> None:
    study = studies[name]
    _, tasks, _, lr, weight_decay, margin, rho_max, logit_norm = PUBLISHED[name]
    assert study.name == name
    assert study.stream.tasks == tasks
    training, head, method = study.training, study.head, study.method.model_dump()
    assert (training.lr, training.weight_decay) == (lr, weight_decay)
    assert (head.margin, head.logit_norm, method["rho_max"]) == (margin, logit_norm, rho_max)
    assert (training.epochs, training.batch_size, training.optimizer, training.momentum) == (20, 48, "sgd", 0.9)
    assert (training.augmentation.crop_scale, training.augmentation.flip) == (0.05, True)
    assert (head.start, head.scale, head.classifier, head.drift) == ("random", 20.0, "trained", "none")
    assert (method["rank_general"], method["rank_isolated"], method["old_count"], method["gao"]) == (32, 32, 2.0, True)
    assert study.backbone.normalization == "none" and study.backbone.target == ("attn.qkv",)
    assert study.stream.resize == 256 and study.stream.validation == 0
    if name == "cifar100-10":  # the preset is that experiment's, written down a second time
        for path, value in preset("loda").items():
            section, *rest = path.split(".")
            found = study.resolved()[section]
            for key in rest:
                found = found[key]
            assert found == value, path


@pytest.mark.parametrize("name", PUBLISHED)
def test_class_orders_and_cuts_are_the_published_ones(name: str, studies: dict[str, Study]) -> None:
    study = studies[name]
    classes, tasks, last, *_ = PUBLISHED[name]
    plan = design_class_orders(study.orders.class_seeds, classes, tasks, study.orders.tune, study.orders.seed)
    assert len(plan.evaluate) == 3
    for seed, order in zip((1993, 1996, 1997), plan.evaluate, strict=True):
        assert tuple(order) == published_class_order(seed, classes)
    if classes in FIRST:
        assert list(plan.evaluate[0][:5]) == FIRST[classes]
    cut = partition_classes(bare(classes), tasks, study.stream.partition_seed, study.stream.partition)
    sizes = [len(task.classes) for task in cut]
    assert len(sizes) == tasks and sizes[-1] == last and len(set(sizes[:-1])) == 1
    assert cut[0].classes == tuple(sorted(plan.evaluate[0][: sizes[0]]))


def test_a_cut_never_leaves_a_task_without_classes() -> None:
    for classes in range(1, 40):
        for tasks in range(1, classes + 1):
            cut = cut_published(range(classes), tasks)
            assert len(cut) == tasks and all(task.classes for task in cut)
            assert sorted(label for task in cut for label in task.classes) == list(range(classes))


def test_the_training_set_up_on_vit_b(studies: dict[str, Study]) -> None:
    """Adapted layers, trained parameters, loss, optimiser and schedule, on ViT-B/16 with random weights."""
    study = studies["cifar100-10"]
    values = study.backbone.model_dump() | {"pretrained": False, "weights": "random"}
    backbone = build_backbone(**values)
    assert set(backbone.widths.values()) == {(768, 2304)} and len(backbone.layers) == 12
    assert (backbone.inputs.image_size, backbone.inputs.channels) == (224, 3)
    images_BCHW = torch.rand(1, 3, 224, 224)
    assert torch.equal(backbone.normalize(images_BCHW), images_BCHW)
    method = build_method(study.method)
    eye = torch.eye(768, dtype=torch.float64).expand(12, 768, 768)
    scales = torch.linspace(1, 2, 768, dtype=torch.float64).diag()
    method.old = LayerMoments(backbone.layers_by_width, {768: eye})  # type: ignore[attr-defined]
    method.begin_task(backbone, Observation(LayerMoments(backbone.layers_by_width, {768: eye @ scales}), 1))
    trained = trainable_parameters(backbone)
    assert sum(parameter.numel() for parameter in trained) == 2 * 2304 * 32 * 12 == 1_769_472  # 1.77 M
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters() if parameter.ndim == 1)
    head = CosineHead(torch.randn(10, 768))
    optimizer = build_optimizer(trained, list(head.parameters()), study.training)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}
    assert {(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.9, 5e-4)}


def test_an_order_of_another_size_is_cut_as_the_study_says(studies: dict[str, Study]) -> None:
    longer = studies["imagenet-r-20"].with_values({"stream.tasks": 50})
    cut = partition_classes(bare(200), longer.stream.tasks, 1993, "published")
    assert [len(task.classes) for task in cut] == [4] * 50
