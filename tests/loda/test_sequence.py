"""Whole sequences: the same key is the same bits, and orders share what they have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import loda
from loda.backbone import Backbone
from loda.energy import unpack_symmetric
from loda.errors import ConfigError
from loda.graph import sequence_nodes
from loda.head import cosines
from loda.run import run_nodes, run_sequence, summarise
from loda.state import Artifact
from loda.timm_models import build_backbone
from loda.workbench import merge_factors, open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import ORDER, Run, artifact_of, digests, keys_of, reread, run_all


@pytest.fixture(scope="module")
def loda_run(tiny_settings: SettingsFactory) -> Run:
    return run_all(tiny_settings())


def test_the_same_settings_give_the_same_bits_twice(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    assert digests(run_all(tiny_settings())) == digests(loda_run)


def test_a_workbench_carries_nothing_from_one_order_to_the_next(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    for order in ((1, 0, 2), ORDER):
        artifacts: dict[str, Artifact] = {}
        nodes = sequence_nodes(bench, settings, order, "test")
        run_nodes(bench, nodes, artifacts)
    assert {key: artifact.digest for key, artifact in artifacts.items()} == digests(loda_run)


def test_the_global_generator_and_thread_count_outside_do_not_matter(
    tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    torch.manual_seed(12345)
    torch.set_num_threads(2)
    assert digests(run_all(tiny_settings())) == digests(loda_run)
    assert torch.get_num_threads() == 1


def test_orders_that_begin_alike_share_keys_and_bits_of_their_first_stages(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(stream={"tasks": 4})
    one, two = run_all(settings, (2, 0, 1, 3)), run_all(settings, (2, 0, 3, 1))
    for a, b in zip(one[0], two[0], strict=True):
        assert (a.key == b.key) == (a.position < 2), (a.step, a.position)
        if a.position < 2:
            assert one[1][a.key].digest == two[1][b.key].digest
    assert len({node.key for node in one[0]}) == 16


def test_the_numbering_of_tasks_does_not_matter(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    """Keys name classes, not positions in a partition: the same key from another partition is the same bits."""
    settings = tiny_settings()
    bench = open_workbench(settings)
    renamed = tuple(dataclasses.replace(task, name=f"other {task.name}") for task in reversed(bench.tasks))
    bench = dataclasses.replace(bench, tasks=renamed)
    nodes = sequence_nodes(bench, settings, [2 - index for index in ORDER], "test")
    artifacts: dict[str, Artifact] = {}
    run_nodes(bench, nodes, artifacts)
    assert [node.key for node in nodes] == [node.key for node in loda_run[0]]
    assert digests((nodes, artifacts)) == digests(loda_run)


def test_a_workbench_of_other_settings_is_refused_or_gives_what_was_asked(tiny_settings: SettingsFactory) -> None:
    asked, other = tiny_settings(), tiny_settings(training={"epochs": 1})
    try:
        result = run_sequence(asked, ORDER, bench=open_workbench(other))
    except ConfigError:
        return
    assert result.state_digest == run_sequence(asked, ORDER).state_digest


def test_gamma_m_leaves_training_of_the_second_task_and_changes_its_merge(tiny_settings: SettingsFactory) -> None:
    plain, other = keys_of(tiny_settings()), keys_of(tiny_settings(method={"gamma_m": 1.0}))
    same = {name for name in plain if plain[name] == other[name]}
    assert same == {
        ("observe", 0), ("adapt", 0), ("consolidate", 0), ("evaluate", 0), ("observe", 1), ("adapt", 1),
    }  # fmt: skip


def test_the_isolated_rank_leaves_the_first_task(tiny_settings: SettingsFactory) -> None:
    plain, other = keys_of(tiny_settings()), keys_of(tiny_settings(method={"rank_isolated": 2}))
    assert {name for name in plain if plain[name] == other[name]} == {
        ("observe", 0), ("adapt", 0), ("consolidate", 0), ("evaluate", 0), ("observe", 1),
    }  # fmt: skip


@pytest.mark.parametrize("head", [{"classifier": "class_means"}, {"classifier": "lda"}])
def test_the_classifier_changes_evaluation_only(head: dict[str, Any], tiny_settings: SettingsFactory) -> None:
    plain, other = keys_of(tiny_settings()), keys_of(tiny_settings(head=head))
    assert {step for step, position in plain if plain[step, position] != other[step, position]} == {"evaluate"}
    shrunk = [keys_of(tiny_settings(head={"classifier": "lda", "shrinkage": value})) for value in (0.1, 0.5)]
    assert shrunk[0]["evaluate", 1] != shrunk[1]["evaluate", 1]
    # Shrinkage is read by LDA alone.
    assert keys_of(tiny_settings(head={"shrinkage": 0.5})) == plain


def test_training_seeds_matter(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    other = run_all(tiny_settings(training={"seed": 1}))
    for position in range(3):
        ours, theirs = (artifact_of(run, "adapt", position) for run in (loda_run, other))
        assert ours.digest != theirs.digest
        assert not torch.equal(ours.tensors["head"], theirs.tensors["head"])
    assert artifact_of(other, "observe", 0).digest == artifact_of(loda_run, "observe", 0).digest


@pytest.mark.parametrize("tail", [0, 1, 3, 4, 6, 9])
@pytest.mark.parametrize("method", ["loda", "sequential"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    method: str, tail: int, tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    settings = tiny_settings(method={"name": method} | ({"rank": 4} if method == "sequential" else {}))
    whole = loda_run if method == "loda" else run_all(settings)
    kept = {node.key: reread(whole[1][node.key]) for node in whole[0][:tail]}
    assert digests(run_all(settings, known=kept)) == digests(whole)


def test_only_what_a_step_reads_is_needed_to_compute_it(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    settings = tiny_settings()
    for node in loda_run[0][::-1]:
        bench = open_workbench(settings)
        known = {key: reread(loda_run[1][key]) for key in node.reads}
        run_nodes(bench, [node], known)
        assert known[node.key].digest == loda_run[1][node.key].digest, (node.step, node.position)


def test_run_sequence_gives_the_numbers_of_its_steps(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    seen: list[tuple[str, int]] = []
    result = run_sequence(
        tiny_settings(), ORDER, on_step=lambda node, artifact: seen.append((node.step, node.position))
    )
    assert seen == [(step, t) for t in range(3) for step in ("observe", "adapt", "consolidate", "evaluate")]
    assert result.state_digest == artifact_of(loda_run, "consolidate", 2).digest == result.state.digest
    expected = summarise(ORDER, *loda_run)
    np.testing.assert_array_equal(result.accuracy_matrix, expected.accuracy_matrix)
    assert result.order == ORDER and result.test_counts.tolist() == [8, 8, 8]
    assert np.isnan(result.accuracy_matrix[np.triu_indices(3, 1)]).all()
    lower = result.accuracy_matrix[np.tril_indices(3)]
    assert ((lower >= 0) & (lower <= 100)).all()
    assert result.summary.a_last == pytest.approx(result.accuracy_matrix[2].mean(), abs=0.006)
    assert loda.run_sequence is run_sequence


def test_the_final_model_is_a_plain_backbone_with_the_reported_accuracy(
    tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    """Rebuilt from W_0 and the stored factors alone, with a slow accuracy, image by image."""
    settings = tiny_settings()
    bench = open_workbench(settings)
    backbone = build_backbone(**settings.backbone.model_dump())
    states = [artifact_of(loda_run, "consolidate", position) for position in range(3)]
    with torch.no_grad():
        for name in backbone.layers:
            weight = backbone.model.get_submodule(name).weight
            delta = sum(
                merge_factors(s)[f"{name}.up"].double() @ merge_factors(s)[f"{name}.down"].double() for s in states
            )
            assert float(delta.norm()) > 1e-3  # type: ignore[union-attr]
            weight += delta  # type: ignore[operator]
    seen = [label for index in ORDER for label in bench.tasks[index].classes]
    assert states[-1].meta["classes"] == seen
    rows = bench.splits["test"]
    for position, index in enumerate(ORDER):
        right = []
        for row in rows[np.isin(bench.dataset.labels[rows], bench.tasks[index].classes)]:
            image = bench.images(np.asarray([row])).float() / 255
            with torch.no_grad():
                scores = cosines(backbone.features(backbone.normalize(image)), states[-1].tensors["head"])
            right.append(seen[int(scores.argmax())] == int(bench.dataset.labels[row]))
        assert artifact_of(loda_run, "evaluate", 2).meta["correct"][position] == sum(right)
        assert artifact_of(loda_run, "evaluate", 2).meta["count"][position] == len(right)


def _layer_inputs(backbone: Backbone, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tokens (N, D) that enter each adapted layer."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        inputs[name] = x.reshape(-1, x.shape[-1])

    handles = [
        backbone.model.get_submodule(name).register_forward_pre_hook(lambda module, x, name=name: keep(name, x[0]))
        for name in backbone.layers
    ]
    with torch.no_grad():
        backbone.features(images_BCHW)
    for handle in handles:
        handle.remove()
    return inputs


def test_the_old_moment_is_the_sum_of_each_tasks_moment_at_its_merged_weights(
    tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    backbone = bench.backbone
    expected = {name: torch.zeros(width, width, dtype=torch.float64) for name, (width, _) in backbone.widths.items()}
    merges = []
    for position, index in enumerate(ORDER[:2]):
        state = artifact_of(loda_run, "consolidate", position)
        merges.append(merge_factors(state))
        backbone.load_merges(merges)
        images = bench.images(bench.indices(bench.tasks[index].classes, "train")).float() / 255
        for name, x_ND in _layer_inputs(backbone, backbone.normalize(images)).items():
            expected[name] += (x_ND.double().mT @ x_ND.double()) / len(x_ND)
        for width, names in backbone.layers_by_width.items():
            found = unpack_symmetric(state.tensors[f"memory/moments.{width}"])
            for layer, name in enumerate(names):
                torch.testing.assert_close(found[layer], expected[name], rtol=1e-4, atol=1e-6)


def test_a_run_leaves_the_frozen_weights_as_they_were(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    before = {name: tensor.clone() for name, tensor in bench.backbone.model.state_dict().items()}
    run_sequence(settings, ORDER, bench=bench)
    assert bench.backbone.attached == {}
    targets = {f"{name}.weight" for name in bench.backbone.layers}
    after = bench.backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name not in targets)
    bench.backbone.load_merges([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.backbone.model.state_dict().items())
