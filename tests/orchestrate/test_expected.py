"""Expected hours from two stages that are tried: what they are carried over to, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loda.graph import StepNode
from orchestrate.expected import MeasuredCosts, try_costs
from orchestrate.session import Session, open_session
from orchestrate.study import load_study
from tests.e2e.studies import call, write_study


def opened(folder: Path, parquet: Path, **sections: Any) -> Session:
    file = write_study(folder, parquet, mlflow=False, **sections)
    return open_session(load_study(file).with_values({"resources.store": str(folder / "stages")}), search=False)


def made_up(session: Session) -> MeasuredCosts:
    """As if the first two stages had been tried: a second an image and step, two in a later task."""
    nodes = session.nodes({}, session.evaluate_orders[0])
    tried = try_costs(session)
    return MeasuredCosts(
        session.bench,
        {(node.step, node.position): float(1 + node.position) for node in nodes if node.position < 2},
        {0: 10.0, 1: 20.0},
        tried.images,
        {kind: 100 + kind[1] for kind in tried.bytes},
        1.0,
    )


def by_step(session: Session) -> dict[tuple[str, int], StepNode]:
    return {(node.step, node.position): node for node in session.nodes({}, session.evaluate_orders[0])}


def test_later_tasks_cost_what_the_second_did_by_their_images(tmp_path: Path, shapes_parquet: Path) -> None:
    session = opened(tmp_path, shapes_parquet, training={"epochs": 3})
    costs, nodes = made_up(session), by_step(session)
    assert costs.of(nodes["observe", 0]) == (1.0, 100)
    assert costs.of(nodes["adapt", 0]) == (1 + 3 * 10, 100)
    # Tasks are of one size: the third costs what the second does, but for evaluating, which passes all seen images.
    assert costs.of(nodes["adapt", 1]) == costs.of(nodes["adapt", 2]) == (2 + 3 * 20, 101)
    assert costs.of(nodes["consolidate", 2]) == (2.0, 101)
    bench, tested = session.bench, len(session.bench.indices(session.bench.tasks[0].classes, "test"))
    trained = len(bench.indices(bench.tasks[0].classes, "train"))
    second, third = (count * tested + 2 * tested + trained for count in (2, 3))
    assert costs.of(nodes["evaluate", 2])[0] == pytest.approx(2 * third / second)
    total = costs.expected([(node, 2) for node in nodes.values()], workers=2, lanes=1)
    assert total["expected_worker_seconds"] == pytest.approx(sum(costs.of(node)[0] for node in nodes.values()))
    assert total["expected_bytes"] == 2 * sum(costs.of(node)[1] for node in nodes.values())


def test_more_epochs_are_expected_from_the_same_trial(tmp_path: Path, shapes_parquet: Path) -> None:
    session = opened(tmp_path, shapes_parquet)
    costs = try_costs(session)
    assert set(costs.epoch_seconds) == {0, 1} and all(value > 0 for value in costs.epoch_seconds.values())
    assert set(costs.seconds) == {(node.step, p) for (_, p), node in by_step(session).items() if p < 2}
    assert all(value > 0 for value in costs.seconds.values())
    assert not list((tmp_path / "stages").rglob("*.safetensors"))


@pytest.mark.parametrize("method", ["simplecil", "joint"])
def test_methods_of_one_stage_or_without_training_are_expected_too(
    method: str, tmp_path: Path, shapes_parquet: Path
) -> None:
    file = write_study(tmp_path, shapes_parquet, mlflow=False)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | {"method": {"name": method}}))
    session = open_session(load_study(file), search=False)
    costs = try_costs(session)
    nodes = session.nodes({}, session.evaluate_orders[0])
    assert all(costs.of(node)[0] > 0 for node in nodes if node.step != "adapt" or method == "joint")


def test_the_plan_says_what_it_tried(
    tmp_path: Path, shapes_parquet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, shapes_parquet, mlflow=False)
    plan = call(tmp_path, "plan", "study.yaml", "--measure", "--json", patch=monkeypatch, capture=capsys).values
    assert 0 < plan["expected_run_seconds"] < plan["expected_worker_seconds"]
    assert "tried here" in plan["expected"] and plan["stages_stored"] == 0
    without = call(tmp_path, "plan", "study.yaml", patch=monkeypatch, capture=capsys)
    assert "--measure" in without.out and "tried here" not in without.out
    text = call(tmp_path, "plan", "study.yaml", "--measure", patch=monkeypatch, capture=capsys).out
    assert "expected of orchestrate run" in " ".join(text.split())
