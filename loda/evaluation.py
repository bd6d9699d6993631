"""Step four of a stage: score what was learned, and probe how the earlier tasks prepared for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from loda.classifier import ClassifierKind, ClassStatistics, linear_classifier
from loda.graph import StepNode, classifier_choice
from loda.state import Artifact
from loda.workbench import Workbench, merge_factors, method_after

Chain = Sequence[Artifact]


def statistics_of(state: Artifact) -> ClassStatistics:
    """The class statistics of a consolidated stage."""
    tensors = state.tensors
    return ClassStatistics(
        tensors["class_means"], tensors["class_counts"], tensors["class_scatter"], tensors.get("class_covariances")
    )


def evaluate(
    bench: Workbench, node: StepNode, chain: Chain, observed: Artifact, state: Artifact
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Accuracy on every task seen so far, over all seen classes, and two probes for forward transfer.

    Only a method that ``needs_task_id`` is told each image's task; the choice is among all seen classes all the same.
    For it a second figure goes without the id: the largest logit of the tasks' own classes, each from the features
    that its task gives.
    """
    assert node.split is not None
    settings = bench.settings
    method = method_after(bench, (*chain, state))
    kind: Any = classifier_choice(settings)
    seen = state.meta["classes"]
    bench.rest(method, [merge_factors(a) for a in (*chain, state)])
    rows = bench.indices(seen, node.split)
    labels_N, images_NCHW = bench.labels(rows, seen), bench.images(rows)
    tensors: dict[str, Tensor] = {}
    if kind in get_args(ClassifierKind):
        weight_CD, bias_C = linear_classifier(
            kind, state.tensors["head"], statistics_of(state), settings.head.shrinkage
        )
        tensors = {"classifier.weight": weight_CD, "classifier.bias": bias_C}

    def logits(tasks_N: Tensor | None) -> Tensor:
        features_ND, _ = bench.pass_over(images_NCHW, tasks_N=tasks_N)
        return F.linear(features_ND, weight_CD, bias_C) if tensors else method.logits(features_ND)

    right_N = logits(bench.tasks_of(method, node.prefix, rows)).argmax(-1) == labels_N
    position_of = {label: index for index, label in enumerate(seen)}
    own = [torch.tensor([position_of[label] for label in bench.tasks[index].classes]) for index in node.prefix]
    inside = [torch.isin(labels_N, positions) for positions in own]
    correct = [int(right_N[inside_N].sum()) for inside_N in inside]
    count = [int(inside_N.sum()) for inside_N in inside]
    meta: dict[str, Any] = {"split": node.split, "classifier": kind, "correct": correct, "count": count}
    if method.needs_task_id:
        logits_NC = torch.empty(len(rows), len(seen))
        for task, positions in enumerate(own):
            logits_NC[:, positions] = logits(torch.full((len(rows),), task))[:, positions]
        right_N = logits_NC.argmax(-1) == labels_N
        meta["correct_without_task_id"] = [int(right_N[inside_N].sum()) for inside_N in inside]
    if not method.joint:
        meta |= _forward_probes(bench, node, chain, observed)
    return tensors, meta


def _forward_probes(bench: Workbench, node: StepNode, chain: Chain, observed: Artifact) -> dict[str, float]:
    """In-task accuracy (%) of class means on a task before it is trained: with the earlier tasks' backbone, and frozen.

    Their difference is the task's forward transfer. Ours: a head for unseen classes doesn't exist in
    class-incremental learning, so class means of the task's own training images stand in for it.
    """
    assert node.split is not None
    classes = bench.tasks[node.prefix[-1]].classes
    train, scored = bench.indices(classes, "train"), bench.indices(classes, node.split)

    def accuracy(train_features_ND: Tensor) -> float:
        features_ND, _ = bench.pass_over(bench.images(scored))
        means_CD = ClassStatistics.of(train_features_ND, bench.labels(train, classes), len(classes)).means_CD
        predicted_N = F.linear(F.normalize(features_ND, dim=-1), F.normalize(means_CD, dim=-1)).argmax(-1)
        return 100 * float((predicted_N == bench.labels(scored, classes)).double().mean())

    method = method_after(bench, chain)
    bench.rest(method, [merge_factors(a) for a in chain])
    before = accuracy(observed.tensors["features"])
    if not chain or not method.trains:
        return {"probe_before": before, "probe_frozen": before}
    memo = (classes, node.split)
    if memo not in bench.frozen_probes:
        bench.backbone.detach()
        bench.backbone.load_merges([])
        frozen_ND, _ = bench.pass_over(bench.images(train))
        bench.frozen_probes[memo] = accuracy(frozen_ND)
    return {"probe_before": before, "probe_frozen": bench.frozen_probes[memo]}
