"""One task, seven steps, in four cached parts: observe; adapt; consolidate; evaluate (He et al. 2026).

Each part is a pure function of the artifacts it reads and of the settings in its key (``loda.graph``).
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loda.alignment import align_classifier
from loda.classifier import ClassStatistics, drift_map
from loda.errors import StageError
from loda.evaluation import Chain, evaluate, statistics_of
from loda.gradients import LossGradients
from loda.graph import StepNode, stage_classes
from loda.head import CosineHead, random_head_weight
from loda.methods import build_method
from loda.methods.base import Observation
from loda.moments import LayerMoments
from loda.seeds import generator
from loda.state import Artifact
from loda.training import EpochCallback, train_task, trainable_parameters
from loda.workbench import MERGED, Workbench, merge_factors, method_after


def run_step(
    bench: Workbench, node: StepNode, artifacts: dict[str, Artifact], on_epoch: EpochCallback | None = None
) -> Artifact:
    """Compute one step from the artifacts that it reads.

    Args:
        bench: the process's backbone and data.
        node: what to compute.
        artifacts: at least those of ``node.reads``, by key.
        on_epoch: called after each epoch of training with (done, total).

    Raises:
        StageError: training diverged, or an image can't be decoded; names the stage.
    """
    chain = [artifacts[key] for key in node.chain]
    own = {step: artifacts[key] for step, key in node.inputs.items()}
    started = time.perf_counter()
    try:
        if node.step == "observe":
            tensors, meta = _observe(bench, node, chain)
        elif node.step == "adapt":
            tensors, meta = _adapt(bench, node, chain, own["observe"], on_epoch)
        elif node.step == "consolidate":
            tensors, meta = _consolidate(bench, node, chain, own["observe"], own["adapt"])
        else:
            tensors, meta = evaluate(bench, node, chain, own["observe"], own["consolidate"])
    except StageError as error:
        names = " > ".join(bench.tasks[index].name for index in node.prefix)
        raise StageError(f"{node.step} of stage {node.position + 1} ({names}): {error}") from error
    finally:
        bench.backbone.detach()
    epoch_seconds = meta.pop("epoch_seconds", None)
    timings = {"seconds": time.perf_counter() - started}
    if epoch_seconds:
        timings |= {f"epoch_{index + 1}": seconds for index, seconds in enumerate(epoch_seconds)}
    return Artifact(tensors, {"step": node.step} | meta, timings)


def _draw_names(bench: Workbench, node: StepNode) -> tuple[object, ...]:
    if build_method(bench.settings.method).joint:  # how classes are cut into tasks doesn't matter to it
        return (stage_classes(bench.settings, bench.tasks, node.prefix),)
    return tuple(bench.tasks[index].classes for index in node.prefix)


def _observe(bench: Workbench, node: StepNode, chain: Chain) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Step 1: the layers' second moments and the class features, with the backbone as it stands.

    It reads no setting of the method but its weights so far: at the first task all trials of a sweep share it.
    """
    classes = stage_classes(bench.settings, bench.tasks, node.prefix)
    rows = bench.indices(classes, "train")
    bench.rest(method_after(bench, chain), [merge_factors(a) for a in chain])
    features_ND, moments = bench.pass_over(bench.images(rows), record_moments=True)
    assert moments is not None
    return {"features": features_ND} | moments.packed(), {"images": len(rows)}


def _observation(bench: Workbench, node: StepNode, observed: Artifact) -> Observation:
    moments = LayerMoments.unpacked(bench.backbone.layers_by_width, observed.tensors)
    tasks = len(node.prefix) if build_method(bench.settings.method).joint else 1
    return Observation(moments.to(bench.backbone.device), node.position, tasks=tasks)


def _adapt(
    bench: Workbench, node: StepNode, chain: Chain, observed: Artifact, on_epoch: EpochCallback | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Steps 2 and 3: decompose, attach the branches, train them with the current task's head."""
    settings, backbone = bench.settings, bench.backbone
    method = method_after(bench, chain)
    if not method.trains:
        return {}, {}
    classes = stage_classes(settings, bench.tasks, node.prefix)
    rows = bench.indices(classes, "train")
    labels_N, tasks_N = bench.labels(rows, classes), bench.tasks_of(method, node.prefix, rows)
    backbone.load_merges(method.weights_in_training([merge_factors(a) for a in chain]))
    names = _draw_names(bench, node)
    if settings.head.start == "class_means":
        statistics = ClassStatistics.of(observed.tensors["features"], labels_N, len(classes))
        start_CD = F.normalize(statistics.means_CD, dim=-1)
    else:
        draws = generator(settings.training.seed, "head", *names)
        start_CD = random_head_weight(len(classes), backbone.feature_width, draws)
    head = CosineHead(start_CD).to(backbone.device)
    observation = _observation(bench, node, observed)
    if method.observes_tasks:
        observation.of_tasks = _moments_of_tasks(bench, node)
    observation.gradients = LossGradients(
        model=backbone,
        head=head,
        images_NCHW=bench.images(rows),
        labels_N=labels_N,
        scale=settings.head.scale,
        margin=settings.head.margin,
        batch_size=settings.compute.batch_size,
        group=bench.group,
    )
    method.begin_task(backbone, observation)
    trainable = sum(parameter.numel() for parameter in trainable_parameters(backbone))
    log = train_task(
        backbone,
        method,
        head,
        bench.images(rows),
        labels_N,
        settings.training,
        settings.head,
        names,
        bench.group,
        on_epoch,
        tasks_N,
    )
    tensors = {f"branch/{name}": tensor for name, tensor in backbone.branch_tensors().items()}
    tensors["head"] = head.weight.detach()
    tensors |= {f"trained/{name}": t for name, t in method.finish_training(backbone, observation).items()}
    meta = {"losses": log.losses, "scales": list(backbone.branch_scales().items()), "trainable_parameters": trainable}
    return tensors, meta | {"facts": method.facts, "epoch_seconds": log.seconds}


def _moments_of_tasks(bench: Workbench, node: StepNode) -> tuple[LayerMoments, ...]:
    """The layers' moments for the images of each task alone, with the backbone as it stands."""
    found = []
    for index in node.prefix:
        _, moments = bench.pass_over(bench.images(bench.indices(bench.tasks[index].classes, "train")), True)
        assert moments is not None
        found.append(moments)
    return tuple(found)


def _consolidate(
    bench: Workbench, node: StepNode, chain: Chain, observed: Artifact, trained: Artifact
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Steps 4 to 7: re-observe, recalibrate, merge, remember; then the class statistics, and alignment if asked."""
    settings, backbone = bench.settings, bench.backbone
    method = method_after(bench, chain)
    classes = stage_classes(settings, bench.tasks, node.prefix)
    rows = bench.indices(classes, "train")
    images_NCHW, labels_N = bench.images(rows), bench.labels(rows, classes)
    tasks_N = bench.tasks_of(method, node.prefix, rows)
    observation = _observation(bench, node, observed)
    earlier = [merge_factors(artifact) for artifact in chain]
    factors: dict[str, Tensor] = {}
    features_ND = observed.tensors["features"]
    if method.trains:
        backbone.load_merges(method.weights_in_training(earlier))
        branches = {n.removeprefix("branch/"): t for n, t in trained.tensors.items() if n.startswith("branch/")}
        backbone.attach_tensors(branches, dict(trained.meta["scales"]))
        method.trained = {
            name.removeprefix("trained/"): tensor.to(backbone.device)
            for name, tensor in trained.tensors.items()
            if name.startswith("trained/")
        }
        method.attach_trained(backbone)
        adapted = None
        if method.reobserves and node.position > 0:
            _, adapted = bench.pass_over(images_NCHW, record_moments=True, tasks_N=tasks_N)
        factors = method.merged(backbone, observation, adapted)
        bench.rest(method, [*earlier, factors])
        modules = method.recorded_modules(backbone)
        features_ND, merged = bench.pass_over(images_NCHW, method.remembers_moments, modules=modules, tasks_N=tasks_N)
        method.end_task(observation, adapted, merged)
    method.learn_classifier(features_ND, labels_N)
    head_CD = trained.tensors.get("head")
    statistics = ClassStatistics.of(features_ND, labels_N, len(classes), per_class=settings.head.alignment)
    if head_CD is None:
        head_CD = F.normalize(statistics.means_CD, dim=-1)
    sizes = [len(classes)]
    if chain:
        before = chain[-1]
        old = statistics_of(before)
        if settings.head.drift == "linear" and method.trains:
            old = old.transported(drift_map(observed.tensors["features"], features_ND, settings.head.drift_ridge))
        statistics = old.joined(statistics)
        head_CD = torch.cat([before.tensors["head"], head_CD])
        sizes = [*before.meta["task_sizes"], *sizes]
    if settings.head.alignment and chain:
        draws = generator(settings.training.seed, "alignment", *_draw_names(bench, node))
        head_CD = align_classifier(
            head_CD,
            statistics,
            sizes,
            draws,
            samples=settings.head.alignment_samples,
            epochs=settings.head.alignment_epochs,
            logit_norm=settings.head.logit_norm,
        )
    tensors = {f"{MERGED}{name}": tensor for name, tensor in factors.items()}
    tensors |= {f"memory/{name}": tensor for name, tensor in method.state_tensors().items()}
    tensors |= {
        "head": head_CD,
        "class_means": statistics.means_CD,
        "class_counts": statistics.counts_C,
        "class_scatter": statistics.scatter_DD,
    }
    if statistics.covariances_CDD is not None:
        tensors["class_covariances"] = statistics.covariances_CDD
    seen = [*(chain[-1].meta["classes"] if chain else []), *classes]
    parent = chain[-1].digest if chain else bench.root_key
    return tensors, {"classes": seen, "task_sizes": sizes, "parent_digest": parent, "facts": method.facts}
