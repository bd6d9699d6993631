"""Whole sequences: the same key is the same bits, orders share what they have in common, workers agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

import loda
from loda.backbone import build_backbone
from loda.energy import unpack_symmetric
from loda.errors import ConfigError, StageError
from loda.graph import StepNode, sequence_nodes
from loda.head import cosines
from loda.run import load_run_settings, run_nodes, run_sequence, summarise
from loda.settings import RunSettings
from loda.state import Artifact
from loda.subspace import general_subspace
from loda.workbench import merge_factors, open_workbench
from tests.conftest import SettingsFactory

ORDER = (2, 0, 1)
Run = tuple[list[StepNode], dict[str, Artifact]]


def _run(settings: RunSettings, order: Sequence[int] = ORDER, known: Mapping[str, Artifact] | None = None) -> Run:
    """All steps of one order in a fresh workbench."""
    bench = open_workbench(settings)
    nodes = sequence_nodes(bench, settings, order, "test")
    artifacts = dict(known or {})
    run_nodes(bench, nodes, artifacts)
    return nodes, artifacts


def _keys(settings: RunSettings, order: Sequence[int] = ORDER) -> dict[tuple[str, int], str]:
    nodes = sequence_nodes(open_workbench(settings), settings, order, "test")
    return {(node.step, node.position): node.key for node in nodes}


def _digests(run: Run) -> dict[str, str]:
    return {node.key: run[1][node.key].digest for node in run[0]}


def _reread(artifact: Artifact) -> Artifact:
    """As a store gives it back: from files, and with the tensors in another order, which files don't keep."""
    again = Artifact.from_files(artifact.to_files())
    return Artifact(dict(sorted(again.tensors.items(), reverse=True)), again.meta, again.timings)


def _artifact(run: Run, step: str, position: int) -> Artifact:
    return run[1][next(n.key for n in run[0] if n.step == step and n.position == position)]


@pytest.fixture(scope="module")
def loda_run(tiny_settings: SettingsFactory) -> Run:
    return _run(tiny_settings())


def test_the_same_settings_give_the_same_bits_twice(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    assert _digests(_run(tiny_settings())) == _digests(loda_run)


def test_a_workbench_carries_nothing_from_one_order_to_the_next(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    for order in ((1, 0, 2), ORDER):
        artifacts: dict[str, Artifact] = {}
        nodes = sequence_nodes(bench, settings, order, "test")
        run_nodes(bench, nodes, artifacts)
    assert {key: artifact.digest for key, artifact in artifacts.items()} == _digests(loda_run)


def test_the_global_generator_and_thread_count_outside_do_not_matter(
    tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    torch.manual_seed(12345)
    torch.set_num_threads(2)
    assert _digests(_run(tiny_settings())) == _digests(loda_run)
    assert torch.get_num_threads() == 1


def test_orders_that_begin_alike_share_keys_and_bits_of_their_first_stages(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(stream={"tasks": 4})
    one, two = _run(settings, (2, 0, 1, 3)), _run(settings, (2, 0, 3, 1))
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
    assert _digests((nodes, artifacts)) == _digests(loda_run)


def test_a_workbench_of_other_settings_is_refused_or_gives_what_was_asked(tiny_settings: SettingsFactory) -> None:
    asked, other = tiny_settings(), tiny_settings(training={"epochs": 1})
    try:
        result = run_sequence(asked, ORDER, bench=open_workbench(other))
    except ConfigError:
        return
    assert result.state_digest == run_sequence(asked, ORDER).state_digest


def test_gamma_m_leaves_training_of_the_second_task_and_changes_its_merge(tiny_settings: SettingsFactory) -> None:
    plain, other = _keys(tiny_settings()), _keys(tiny_settings(method={"gamma_m": 1.0}))
    same = {name for name in plain if plain[name] == other[name]}
    assert same == {
        ("observe", 0), ("adapt", 0), ("consolidate", 0), ("evaluate", 0), ("observe", 1), ("adapt", 1),
    }  # fmt: skip


def test_the_isolated_rank_leaves_the_first_task(tiny_settings: SettingsFactory) -> None:
    plain, other = _keys(tiny_settings()), _keys(tiny_settings(method={"rank_isolated": 2}))
    assert {name for name in plain if plain[name] == other[name]} == {
        ("observe", 0), ("adapt", 0), ("consolidate", 0), ("evaluate", 0), ("observe", 1),
    }  # fmt: skip


@pytest.mark.parametrize("head", [{"classifier": "class_means"}, {"classifier": "lda"}])
def test_the_classifier_changes_evaluation_only(head: dict[str, Any], tiny_settings: SettingsFactory) -> None:
    plain, other = _keys(tiny_settings()), _keys(tiny_settings(head=head))
    assert {step for step, position in plain if plain[step, position] != other[step, position]} == {"evaluate"}
    lda = {"classifier": "lda", "shrinkage": 0.5}
    assert _keys(tiny_settings(head=lda))["evaluate", 1] != _keys(tiny_settings(head={**lda, "shrinkage": 0.1}))["evaluate", 1]  # fmt: skip
    # Shrinkage is read by LDA alone.
    assert _keys(tiny_settings(head={"shrinkage": 0.5})) == plain


def test_training_seeds_matter(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    other = _run(tiny_settings(training={"seed": 1}))
    for position in range(3):
        ours, theirs = (_artifact(run, "adapt", position) for run in (loda_run, other))
        assert ours.digest != theirs.digest
        assert not torch.equal(ours.tensors["head"], theirs.tensors["head"])
    assert _artifact(other, "observe", 0).digest == _artifact(loda_run, "observe", 0).digest


@pytest.mark.parametrize("tail", [0, 1, 3, 4, 6, 9])
@pytest.mark.parametrize("method", ["loda", "sequential"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    method: str, tail: int, tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    settings = tiny_settings(method={"name": method} | ({"rank": 4} if method == "sequential" else {}))
    whole = loda_run if method == "loda" else _run(settings)
    kept = {node.key: _reread(whole[1][node.key]) for node in whole[0][:tail]}
    assert _digests(_run(settings, known=kept)) == _digests(whole)


def test_only_what_a_step_reads_is_needed_to_compute_it(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    settings = tiny_settings()
    for node in loda_run[0][::-1]:
        bench = open_workbench(settings)
        known = {key: _reread(loda_run[1][key]) for key in node.reads}
        run_nodes(bench, [node], known)
        assert known[node.key].digest == loda_run[1][node.key].digest, (node.step, node.position)


def test_run_sequence_gives_the_numbers_of_its_steps(tiny_settings: SettingsFactory, loda_run: Run) -> None:
    seen: list[tuple[str, int]] = []
    result = run_sequence(
        tiny_settings(), ORDER, on_step=lambda node, artifact: seen.append((node.step, node.position))
    )
    assert seen == [(step, t) for t in range(3) for step in ("observe", "adapt", "consolidate", "evaluate")]
    assert result.state_digest == _artifact(loda_run, "consolidate", 2).digest == result.state.digest
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
    states = [_artifact(loda_run, "consolidate", position) for position in range(3)]
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
        assert _artifact(loda_run, "evaluate", 2).meta["correct"][position] == sum(right)
        assert _artifact(loda_run, "evaluate", 2).meta["count"][position] == len(right)


def test_the_old_moment_is_the_sum_of_each_tasks_moment_at_its_merged_weights(
    tiny_settings: SettingsFactory, loda_run: Run
) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    backbone = bench.backbone
    expected = {name: torch.zeros(width, width, dtype=torch.float64) for name, (width, _) in backbone.widths.items()}
    merges = []
    for position, index in enumerate(ORDER[:2]):
        state = _artifact(loda_run, "consolidate", position)
        merges.append(merge_factors(state))
        backbone.load_merges(merges)
        inputs: dict[str, torch.Tensor] = {}
        handles = [
            backbone.model.get_submodule(name).register_forward_pre_hook(
                lambda module, given, name=name: inputs.__setitem__(name, given[0].reshape(-1, given[0].shape[-1]))
            )
            for name in backbone.layers
        ]
        images = bench.images(bench.indices(bench.tasks[index].classes, "train")).float() / 255
        with torch.no_grad():
            backbone.features(backbone.normalize(images))
        for handle in handles:
            handle.remove()
        for name, x_ND in inputs.items():
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


def test_sequential_starts_each_task_where_the_last_one_ended(
    tiny_settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loda.stage as stage

    starts: list[dict[str, torch.Tensor]] = []
    train_task: Callable[..., Any] = stage.train_task

    def recording(backbone: Any, *rest: Any, **options: Any) -> Any:
        starts.append({name: tensor.clone() for name, tensor in backbone.branch_tensors().items()})
        starts[-1] |= {f"W {name}": backbone._linear(name).weight.clone() for name in backbone.layers}
        return train_task(backbone, *rest, **options)

    monkeypatch.setattr(stage, "train_task", recording)
    settings = tiny_settings(method={"name": "sequential", "rank": 4})
    run = _run(settings)
    original = open_workbench(settings).backbone.original
    for position in range(3):
        for name, weight in original.items():
            assert torch.equal(starts[position][f"W {name}"], weight)  # W_0 lies under the one pair
        branches = {name: tensor for name, tensor in starts[position].items() if not name.startswith("W ")}
        assert len(branches) == 8
        for name, tensor in branches.items():
            if position == 0:
                assert name.endswith("/down") or not tensor.any()
            else:
                assert torch.equal(tensor, _artifact(run, "adapt", position - 1).tensors[f"branch/{name}"])


def test_joint_does_not_depend_on_the_order(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "joint", "rank": 4})
    one, two = _run(settings, (0, 1, 2)), _run(settings, (2, 0, 1))
    assert _digests(one) == _digests(two) and len(one[0]) == 4


def test_joint_does_not_depend_on_how_classes_are_cut_into_tasks(tiny_settings: SettingsFactory) -> None:
    runs = [
        _run(tiny_settings(method={"name": "joint", "rank": 4}, stream={"tasks": tasks}), tuple(range(tasks)))
        for tasks in (2, 3)
    ]
    states = [_artifact(run, "consolidate", 0) for run in runs]
    assert runs[0][0][1].key == runs[1][0][1].key  # one key for the training ...
    assert list(states[0].tensors) == list(states[1].tensors)
    for name, tensor in states[0].tensors.items():
        assert torch.equal(tensor, states[1].tensors[name]), name
    assert states[0].digest == states[1].digest  # ... so one set of bits


@pytest.mark.parametrize("tasks", [1, 3])
def test_joint_reports_one_row_with_the_accuracy_on_all_images(tasks: int, tiny_settings: SettingsFactory) -> None:
    result = run_sequence(tiny_settings(method={"name": "joint", "rank": 4}, stream={"tasks": tasks}))
    meta = result.evaluations[0].meta
    assert result.accuracy_matrix.shape == (1, tasks)
    expected = 100 * sum(meta["correct"]) / sum(meta["count"])
    assert result.summary.a_last == pytest.approx(expected, abs=0.006)
    assert result.summary.a_avg == pytest.approx(expected, abs=0.006)


def test_a_stream_of_one_task_runs(tiny_settings: SettingsFactory) -> None:
    assert run_sequence(tiny_settings(stream={"tasks": 1})).accuracy_matrix.shape == (1, 1)


def test_tasks_of_one_class_run(tiny_settings: SettingsFactory) -> None:
    result = run_sequence(tiny_settings(stream={"tasks": 6}, training={"epochs": 1}))
    assert result.accuracy_matrix.shape == (6, 6) and result.accuracy_matrix[0, 0] == 100


@pytest.mark.parametrize("classifier", ["class_means", "lda"])
def test_simplecil_does_not_depend_on_the_order(classifier: str, tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "simplecil", "classifier": classifier})
    bench = open_workbench(settings)
    results = [run_sequence(settings, order, bench=bench) for order in ((0, 1, 2), (2, 0, 1))]
    rows = []
    for result in results:
        weight_CD, bias_C = (result.evaluations[-1].tensors[f"classifier.{part}"] for part in ("weight", "bias"))
        classes = result.state.meta["classes"]
        rows.append({label: torch.cat([weight_CD[i], bias_C[i : i + 1]]) for i, label in enumerate(classes)})
    for label in range(6):
        torch.testing.assert_close(rows[0][label], rows[1][label], rtol=1e-5, atol=1e-5)
    by_task = [dict(zip(r.order, r.accuracy_matrix[-1], strict=True)) for r in results]
    assert by_task[0] == by_task[1]


def test_validation_images_take_no_part_in_test_and_training(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings()
    bench = open_workbench(settings)
    validation, test = (run_sequence(settings, ORDER, split=split, bench=bench) for split in ("validation", "test"))
    assert validation.test_counts.tolist() == [4, 4, 4] and test.test_counts.tolist() == [8, 8, 8]
    assert validation.state_digest == test.state_digest  # the same training
    assert not set(bench.splits["train"]) & {*bench.splits["validation"], *bench.splits["test"]}


def test_validation_without_held_out_images_is_refused(tiny_settings: SettingsFactory) -> None:
    with pytest.raises(ConfigError, match="validation"):
        run_sequence(tiny_settings(stream={"validation": 0.0}), split="validation")


def test_divergence_names_the_stage(tiny_settings: SettingsFactory) -> None:
    with pytest.raises(StageError, match=r"adapt of stage 1 \(task-0\d\): .*diverged; lower training.lr"):
        run_sequence(tiny_settings(training={"lr": 1e30}))


@pytest.mark.parametrize("name", ["loda", "sequential"])
def test_divergence_in_the_very_last_step_names_the_stage_too(name: str, tiny_settings: SettingsFactory) -> None:
    """The loss is taken before the step: one batch, one epoch, and it never sees the weights that it led to."""
    method = {"name": name, "gao": False} if name == "loda" else {"name": name, "rank": 4}
    settings = tiny_settings(method=method, training={"lr": 1e38, "epochs": 1, "batch_size": 64})
    with pytest.raises(StageError, match=r"of stage 1 \(task-0\d\)"):
        run_sequence(settings)


def test_bad_settings_are_told_all_at_once(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"rank_general": 33, "rank_isolated": 40}, stream={"tasks": 7})
    with pytest.raises(ConfigError) as caught:
        run_sequence(settings)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for part in ("method.rank_general: 33 exceeds the width 32", "method.rank_isolated: 40", "stream.tasks: 7"):
        assert part in told


def test_unreadable_values_are_told_all_at_once_with_their_keys() -> None:
    bad = {
        "training": {"lr": -1, "epochs": "many", "learning_rate": 1},
        "head": {"classifier": "svm"},
        "method": {"name": "loda", "rank_general": 0, "rank": 3},
        "streams": {},
    }
    with pytest.raises(ConfigError) as caught:
        load_run_settings(bad)
    told = "\n".join(caught.value.problems)
    for key in ("training.lr", "training.epochs", "training.learning_rate", "head.classifier", "streams"):
        assert any(problem.startswith(f"{key}:") for problem in caught.value.problems), key
    assert "rank_general" in told and "method" in told


def test_an_unknown_method_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'simplecli'; did you mean 'simplecil'\?"):
        load_run_settings({"method": {"name": "simplecli"}})


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 2)])
def test_an_order_that_is_no_permutation_is_refused(order: tuple[int, ...], tiny_settings: SettingsFactory) -> None:
    with pytest.raises(ConfigError, match="order: expected each task from 0 to 2 once"):
        run_sequence(tiny_settings(), order)


def test_a_study_file_is_read_and_its_platform_sections_are_left_out(
    tiny_settings: SettingsFactory, tmp_path: Path
) -> None:
    settings = tiny_settings()
    values = json.loads(settings.model_dump_json()) | {"name": "tiny", "orders": {"count": 2}, "tracking": {}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    assert load_run_settings(file) == settings


@pytest.mark.parametrize("text", ["- a\n- b\n", "training: [1, 2\n", "just words\n", "training: 3\n"])
def test_a_file_that_is_no_study_is_refused_with_its_reason(text: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_run_settings(file)


def test_a_missing_study_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no study file 'nowhere\.yaml'"):
        load_run_settings("nowhere.yaml")


def _worker(rank: int, size: int, folder: str, settings: dict[str, Any]) -> None:
    """One of several data-parallel workers; leaves its artifacts as files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        nodes, artifacts = _run(RunSettings(**settings))
        for node in nodes:
            path = Path(folder) / f"worker-{rank}" / f"{node.step}-{node.position}"
            path.mkdir(parents=True)
            for name, content in artifacts[node.key].to_files().items():
                (path / name).write_bytes(content)
    finally:
        dist.destroy_process_group()


def test_two_data_parallel_workers_agree_with_one(tiny_settings: SettingsFactory, tmp_path: Path) -> None:
    # Batches of 5 from two classes: some halves have a single image, and then one worker has none.
    settings = tiny_settings(training={"epochs": 2, "batch_size": 5, "lr": 0.02})
    mp.spawn(_worker, args=(2, str(tmp_path), settings.model_dump()), nprocs=2)
    alone = _run(settings)

    def read(rank: int, step: str, position: int) -> Artifact:
        path = tmp_path / f"worker-{rank}" / f"{step}-{position}"
        return Artifact.from_files({file.name: file.read_bytes() for file in path.iterdir()})

    for node in alone[0]:
        assert read(0, node.step, node.position).digest == read(1, node.step, node.position).digest
    moments = [name for name in _artifact(alone, "observe", 0).tensors if name.startswith("moments.")]
    assert moments
    for name in moments:
        bases = [
            general_subspace(unpack_symmetric(artifact.tensors[name]), 4).basis
            for artifact in (_artifact(alone, "observe", 0), read(0, "observe", 0))
        ]
        projectors = [basis_LDr @ basis_LDr.mT for basis_LDr in bases]
        assert float((projectors[0] - projectors[1]).abs().max()) < 1e-6
    for position in range(3):
        for step in ("adapt", "consolidate"):
            ours, theirs = _artifact(alone, step, position).tensors, read(0, step, position).tensors
            assert sorted(ours) == sorted(theirs)
            for name, tensor in ours.items():
                torch.testing.assert_close(
                    theirs[name], tensor, rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
                )
