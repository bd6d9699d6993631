"""What every registered method must keep to, and what each setting may change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError

from loda.distributed import WorkerGroup
from loda.errors import ConfigError
from loda.gradients import LossGradients
from loda.graph import StepNode, sequence_nodes
from loda.head import CosineHead
from loda.methods import build_method, method_settings, registry
from loda.methods.base import Observation
from loda.run import run_nodes, run_sequence
from loda.settings import HeadSettings, RunSettings, TrainingSettings
from loda.state import Artifact
from loda.training import trainable_parameters
from loda.workbench import Workbench, memory_tensors, merge_factors, open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import reread

METHODS = sorted(registry())
ORDER = (1, 0)
# Small ranks wherever a method has them; everything else as it comes.
RANKS = {"rank": 4, "rank_general": 4, "rank_isolated": 4}
# Random features for a handful of images; a memory that leaves room in layers of width 32, which noise fills.
SMALL: dict[str, Any] = {
    **RANKS,
    "projection": 40,
    "energy_weights": 0.3,
    "energy_features": 0.6,
    "energy": 0.7,
    "frequencies": 200,
    "generator_steps": 20,
    "latent": 8,
}
# What is merged isn't what was trained, by the method's own rule: recalibrated, averaged, or shortened.
CHANGED_BY_MERGING = {"loda", "slao", "lora_pm"}
# A second value for each setting, where none can be derived from its type.
OTHER: dict[str, Any] = {
    "energy_general": 0.7,
    "energy_isolated": 0.7,
    "head_lr": 0.01,
    "augmentation": {"crop_scale": 0.5},
    "rank": 3,
    "rank_general": 3,
    "rank_isolated": 3,
    "projection": 30,
    "ridge": 0.1,
    "reduced_ranks": {1: 2},
    "absorb_threshold": 1.5,  # of a unit direction: anything is absorbed
}
# Settings that are only read beside another one.
BESIDE: dict[str, dict[str, Any]] = {
    "shrinkage": {"classifier": "lda"},
    "drift_ridge": {"drift": "linear"},
    "alignment_epochs": {"alignment": True},
    "alignment_samples": {"alignment": True},
    "logit_norm": {"alignment": True},
    "absorb_threshold": {"absorb": True},
}


def small_values(name: str) -> dict[str, Any]:
    """A method's settings for layers of width 32 and a handful of images."""
    fields = registry()[name].Settings.model_fields
    return {"name": name} | {key: value for key, value in SMALL.items() if key in fields}


def _other_value(settings: BaseModel, key: str) -> Any:
    """Another valid value of a setting."""
    value = getattr(settings, key)
    if key in OTHER:
        return OTHER[key]
    options = get_args(type(settings).model_fields[key].annotation)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return next(option for option in options if option != value)
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, float), f"give setting {key!r} a second value in OTHER"
    return value / 2 if value else 0.1


def _compute(settings: RunSettings) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """Keys by step and position, and digests by key, of a run of its own."""
    bench = open_workbench(settings)
    nodes = sequence_nodes(bench, settings, ORDER[: len(bench.tasks)], "test")
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts)
    return {(n.step, n.position): n.key for n in nodes}, {key: a.digest for key, a in artifacts.items()}


def _settings(build: SettingsFactory, method: Mapping[str, Any], **sections: Mapping[str, Any]) -> RunSettings:
    training = {"epochs": 1, **sections.pop("training", {})}
    return build(stream={"tasks": 2}, method=method, training=training, **sections)


MUTATIONS = [
    *((name, "method", key) for name in METHODS for key in registry()[name].Settings.model_fields if key != "name"),
    *(("loda", "training", key) for key in TrainingSettings.model_fields),
    *(("loda", "head", key) for key in HeadSettings.model_fields),
]


@pytest.mark.parametrize("name,section,key", MUTATIONS, ids=["-".join(mutation) for mutation in MUTATIONS])
def test_a_setting_changes_keys_and_a_key_that_stays_keeps_its_bits(
    name: str, section: str, key: str, tiny_settings: SettingsFactory
) -> None:
    plain_values = small_values(name) if section == "method" else {}
    plain_values = {**plain_values, **BESIDE.get(key, {})}
    base = {"method": small_values(name)}
    plain = _settings(tiny_settings, **{**base, section: plain_values})
    other = _other_value(getattr(plain, section), key)
    changed = _settings(tiny_settings, **{**base, section: {**plain_values, key: other}})
    assert getattr(getattr(plain, section), key) != getattr(getattr(changed, section), key)
    plain_keys, plain_digests = _compute(plain)
    changed_keys, changed_digests = _compute(changed)
    assert plain_keys != changed_keys, "a setting that no key holds: its results would be taken for another's"
    assert changed_keys["observe", 0] == plain_keys["observe", 0]
    for shared in plain_digests.keys() & changed_digests.keys():
        assert plain_digests[shared] == changed_digests[shared], "a step reads a setting that its key doesn't hold"


Trained = tuple[Workbench, list[StepNode], dict[str, Artifact]]


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tiny_settings: SettingsFactory) -> Trained:
    """Two tasks of each method, on layers of several shapes."""
    settings = _settings(
        tiny_settings, small_values(request.param), backbone={"target": ["attn.qkv", "mlp.fc1", "mlp.fc2"]}
    )
    bench = open_workbench(settings)
    nodes = sequence_nodes(bench, settings, ORDER, "test")
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts)
    return bench, nodes, artifacts


def test_everything_computed_is_finite_and_labelled(trained: Trained) -> None:
    _, nodes, artifacts = trained
    for node in nodes:
        artifact = artifacts[node.key]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in artifact.tensors.values()), node.step
        assert artifact.meta["step"] == node.step
        assert artifact.timings["seconds"] > 0
        json.dumps(artifact.meta, allow_nan=False)


def test_merged_factors_fit_the_adapted_layers(trained: Trained) -> None:
    bench, nodes, artifacts = trained
    for node in nodes:
        if node.step == "consolidate":
            factors = merge_factors(artifacts[node.key])
            deltas = {name: tensor for name, tensor in factors.items() if name.endswith(".delta")}
            for name, delta_OD in deltas.items():
                assert tuple(delta_OD.shape) == bench.backbone.widths[name.removesuffix(".delta")][::-1]
            assert {name.rpartition(".")[0] for name in factors} <= set(bench.backbone.layers)
            for layer, (d_in, d_out) in bench.backbone.widths.items():
                if f"{layer}.up" in factors:
                    up_Ok, down_kD = factors[f"{layer}.up"], factors[f"{layer}.down"]
                    assert up_Ok.shape[0] == d_out and down_kD.shape[1] == d_in
                    assert up_Ok.shape[1] == down_kD.shape[0]


def test_training_moves_what_it_should(trained: Trained) -> None:
    bench, nodes, artifacts = trained
    method = build_method(bench.settings.method)
    for node in nodes:
        if node.step == "adapt":
            tensors = artifacts[node.key].tensors
            assert bool(tensors) == method.trains
            ups = [
                tensor for name, tensor in tensors.items() if name.endswith(("/up", "/change", ".ups", ".coefficients"))
            ]
            assert all(bool(up.any()) for up in ups)
            if method.trains:
                assert len(ups) >= len(bench.backbone.layers)
                assert all(loss > 0 for loss in artifacts[node.key].meta["losses"])
                assert artifacts[node.key].meta["trainable_parameters"] > 0


def test_all_that_a_method_remembers_goes_through_its_state(trained: Trained) -> None:
    bench, nodes, artifacts = trained
    last = artifacts[[node for node in nodes if node.step == "consolidate"][-1].key]
    memory = memory_tensors(last)
    method = build_method(bench.settings.method)
    if memory:
        method.load_state_tensors(memory, bench.backbone)
    again = method.state_tensors()
    assert set(again) == set(memory)
    assert all(torch.equal(again[name], memory[name]) for name in memory)


def test_memory_grows_as_the_method_says(trained: Trained) -> None:
    bench, nodes, artifacts = trained
    growth = build_method(bench.settings.method).memory_growth
    states = [artifacts[node.key] for node in nodes if node.step == "consolidate"]
    sizes = [{name: tensor.shape for name, tensor in memory_tensors(state).items()} for state in states]
    counts = [sum(shape.numel() for shape in size.values()) for size in sizes]
    if growth == "constant":
        assert all(size == sizes[0] for size in sizes)
    elif growth == "bounded":
        assert counts[-1] <= sum(d_in * d_in / 2 for d_in, _ in bench.backbone.widths.values())
    else:
        assert growth == "linear" and counts == sorted(set(counts))


def test_frozen_tensors_keep_their_bits_and_no_branch_stays(trained: Trained) -> None:
    bench, _, _ = trained
    fresh = open_workbench(bench.settings).backbone
    assert bench.backbone.attached == {}
    targets = {f"{name}.weight" for name in fresh.layers}
    kept, before = bench.backbone.model.state_dict(), fresh.model.state_dict()
    assert list(kept) == list(before)
    assert all(torch.equal(kept[name], before[name]) for name in before if name not in targets)
    assert all(torch.equal(weight, fresh.original[name]) for name, weight in bench.backbone.original.items())
    bench.backbone.load_merges([])
    kept = bench.backbone.model.state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_merging_leaves_outputs_as_they_were_trained(trained: Trained) -> None:
    bench, nodes, artifacts = trained
    method = build_method(bench.settings.method)
    if not method.trains or not method.mergeable:
        return
    images = bench.images(bench.splits["test"])
    chain: list[Artifact] = []
    for node in nodes:
        if node.step == "adapt":
            adapted = artifacts[node.key]
            branches = {n.removeprefix("branch/"): t for n, t in adapted.tensors.items() if n.startswith("branch/")}
            bench.backbone.load_merges(method.weights_in_training([merge_factors(state) for state in chain]))
            bench.backbone.attach_tensors(branches, dict(adapted.meta["scales"]))
            trained_tensors = {n.removeprefix("trained/"): t for n, t in adapted.tensors.items()}
            method.trained = {n: t for n, t in trained_tensors.items() if f"trained/{n}" in adapted.tensors}
            method.attach_trained(bench.backbone)
            attached_ND, _ = bench.pass_over(images)
            bench.backbone.detach()
        if node.step == "consolidate":
            chain.append(artifacts[node.key])
            bench.backbone.load_merges(method.weights_at_rest([merge_factors(state) for state in chain]))
            merged_ND, _ = bench.pass_over(images)
            if node.position == 0 or method.name not in CHANGED_BY_MERGING:
                torch.testing.assert_close(merged_ND, attached_ND, rtol=1e-5, atol=1e-5)
            else:
                assert float((merged_ND - attached_ND).abs().max()) > 1e-4
    bench.backbone.load_merges([])


@pytest.mark.parametrize("kept", [2, 4, 5, 6])
def test_a_run_taken_up_from_a_store_gives_the_bits_of_the_uninterrupted_one(kept: int, trained: Trained) -> None:
    """Whatever was computed before comes from files; the rest must follow from it alone."""
    bench, nodes, artifacts = trained
    known = {node.key: reread(artifacts[node.key]) for node in nodes[:kept]}
    again = open_workbench(bench.settings)
    run_nodes(again, sequence_nodes(again, bench.settings, ORDER, "test"), known)
    assert {key: a.digest for key, a in known.items()} == {key: a.digest for key, a in artifacts.items()}


def test_the_model_at_rest_gives_the_recorded_class_means(trained: Trained) -> None:
    """What consolidation measured is what the backbone computes with what the method predicts with, and no more."""
    bench, nodes, artifacts = trained
    method = build_method(bench.settings.method)
    states = [artifacts[node.key] for node in nodes if node.step == "consolidate"]
    if memory := memory_tensors(states[-1]):
        method.load_state_tensors(memory, bench.backbone)
    bench.rest(method, [merge_factors(state) for state in states])
    assert bool(bench.backbone.attached) == (method.prediction != "merged")
    classes = states[-1].meta["classes"][-states[-1].meta["task_sizes"][-1] :]
    rows = bench.indices(classes, "train")
    tasks_N = torch.tensor([bench.tasks[1].classes.count(int(label)) for label in bench.dataset.labels[rows]])
    with torch.no_grad():
        features_ND = bench.backbone.features(bench.backbone.normalize(bench.images(rows).float() / 255), tasks_N)
    bench.backbone.detach()
    labels_N = bench.labels(rows, classes)
    for index in range(len(classes)):
        found = states[-1].tensors["class_means"][len(states[-1].meta["classes"]) - len(classes) + index]
        torch.testing.assert_close(found, features_ND[labels_N == index].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_branches_change_nothing_before_the_first_step(name: str, tiny_settings: SettingsFactory) -> None:
    bench = open_workbench(_settings(tiny_settings, small_values(name)))
    images = bench.images(bench.splits["train"])
    features_ND, moments = bench.pass_over(images, record_moments=True)
    assert moments is not None
    method = build_method(bench.settings.method)
    labels_N = torch.from_numpy(bench.dataset.labels[bench.splits["train"]]).long()
    gradients = LossGradients(
        bench.backbone, CosineHead(torch.eye(6, 32)), images, labels_N, 20.0, 0.0, 16, WorkerGroup()
    )
    method.begin_task(bench.backbone, Observation(moments, 0, gradients, tasks=2, of_tasks=(moments, moments)))
    attached_ND, _ = bench.pass_over(images, tasks_N=torch.arange(len(images)) % 2)
    torch.testing.assert_close(attached_ND, features_ND, rtol=0, atol=1e-6)
    assert bool(trainable_parameters(bench.backbone)) == method.trains
    own = {id(tensor) for tensor in trainable_parameters(bench.backbone)}
    frozen = [p for p in bench.backbone.model.parameters() if id(p) not in own]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    bench.backbone.detach()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_introduces_itself(name: str) -> None:
    method = registry()[name]
    assert method.name == name and method.summary and method.source and method.version >= 1
    default = method_settings({"name": name})
    assert isinstance(default, method.Settings) and build_method(default).settings == default
    for position in (0, 1):
        json.dumps(build_method(default).adapt_reads(position), allow_nan=False)
        json.dumps(build_method(default).consolidate_reads(position), allow_nan=False)


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        method_settings({"name": name, "no_such_setting": 1})


@pytest.mark.parametrize("name", [name for name in METHODS if {*RANKS} & {*registry()[name].Settings.model_fields}])
def test_ranks_beyond_the_width_are_problems_before_any_work(name: str, tiny_settings: SettingsFactory) -> None:
    ranks = {key: 33 for key in RANKS if key in registry()[name].Settings.model_fields}
    with pytest.raises(ConfigError) as caught:
        open_workbench(_settings(tiny_settings, {"name": name, **ranks}))
    assert len(caught.value.problems) == len(ranks)
    for key in ranks:
        assert any(problem.startswith(f"method.{key}: 33 exceeds the width 32") for problem in caught.value.problems)


@pytest.mark.parametrize("name", METHODS)
def test_the_largest_rank_that_is_allowed_runs(name: str, tiny_settings: SettingsFactory) -> None:
    ranks = {key: 32 for key in RANKS if key in registry()[name].Settings.model_fields}
    result = run_sequence(_settings(tiny_settings, {**small_values(name), **ranks}))
    assert 0 <= result.summary.a_last <= 100


@pytest.mark.parametrize("name", [name for name in METHODS if registry()[name].mergeable])
def test_classifier_alignment_works_with_every_method_that_keeps_one_backbone(
    name: str, tiny_settings: SettingsFactory
) -> None:
    heads = []
    for alignment in (False, True):
        head = {"alignment": alignment, "alignment_epochs": 1, "alignment_samples": 16}
        result = run_sequence(_settings(tiny_settings, small_values(name), head=head))
        assert 0 <= result.summary.a_last <= 100
        heads.append(result.state.tensors["head"])
    assert torch.equal(*heads) is registry()[name].joint  # it begins with the second task


@pytest.mark.parametrize("name", [name for name in METHODS if registry()[name].trains])
def test_training_lowers_the_loss(name: str, tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(stream={"tasks": 2}, method=small_values(name), training={"epochs": 8, "lr": 0.02})
    losses = []
    run_sequence(settings, on_step=lambda node, a: losses.append(a.meta["losses"]) if node.step == "adapt" else None)
    assert losses and all(loss[-1] < 0.8 * loss[0] for loss in losses), losses
