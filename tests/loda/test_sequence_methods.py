"""What sets the methods' sequences apart: warm starts, independence of the order, streams of odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loda.classifier import drift_map
from loda.run import run_sequence
from loda.workbench import merge_factors, open_workbench
from tests.conftest import SettingsFactory
from tests.loda.running import ORDER, artifact_of, digests, run_all


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
    run = run_all(settings)
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
                assert torch.equal(tensor, artifact_of(run, "adapt", position - 1).tensors[f"branch/{name}"])


def test_joint_does_not_depend_on_the_order(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "joint", "rank": 4})
    one, two = run_all(settings, (0, 1, 2)), run_all(settings, (2, 0, 1))
    assert digests(one) == digests(two) and len(one[0]) == 4


def test_joint_does_not_depend_on_how_classes_are_cut_into_tasks(tiny_settings: SettingsFactory) -> None:
    runs = [
        run_all(tiny_settings(method={"name": "joint", "rank": 4}, stream={"tasks": tasks}), tuple(range(tasks)))
        for tasks in (2, 3)
    ]
    states = [artifact_of(run, "consolidate", 0) for run in runs]
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


def test_sequential_rests_on_the_newest_pair_alone(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"name": "sequential", "rank": 4, "scale": 0.5})
    run = run_all(settings)
    bench = open_workbench(settings)
    trained, state = artifact_of(run, "adapt", 2).tensors, artifact_of(run, "consolidate", 2)
    with torch.no_grad():
        for name in bench.backbone.layers:
            up_Or, down_rD = trained[f"branch/{name}/lora/up"], trained[f"branch/{name}/lora/down"]
            bench.backbone.model.get_submodule(name).weight.add_(0.5 * up_Or @ down_rD)  # type: ignore[operator]
    label = state.meta["classes"][-1]
    features_ND, _ = bench.pass_over(bench.images(bench.indices([label], "train")))
    torch.testing.assert_close(state.tensors["class_means"][-1], features_ND.mean(0), rtol=1e-4, atol=1e-5)


def test_older_classes_statistics_follow_the_drift_that_the_new_task_shows(tiny_settings: SettingsFactory) -> None:
    method = {"name": "sequential", "rank": 4}
    settings = tiny_settings(method=method, head={"drift": "linear", "drift_ridge": 0.01}, training={"lr": 0.1})
    run = run_all(settings)
    bench = open_workbench(settings)
    before, after = (artifact_of(run, "consolidate", position) for position in (0, 1))
    old_ND = artifact_of(run, "observe", 1).tensors["features"]
    bench.backbone.load_merges([merge_factors(after)])
    classes = bench.tasks[ORDER[1]].classes
    new_ND, _ = bench.pass_over(bench.images(bench.indices(classes, "train")))
    assert float((new_ND - old_ND).abs().max()) > 1e-2  # training did move the features
    map_DD = drift_map(old_ND, new_ND, 0.01)
    expected_CD = before.tensors["class_means"].double() @ map_DD
    torch.testing.assert_close(after.tensors["class_means"][:2].double(), expected_CD, rtol=0, atol=1e-4)
    assert float((after.tensors["class_means"][:2] - before.tensors["class_means"]).abs().max()) > 1e-3
