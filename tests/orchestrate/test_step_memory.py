"""What a worker keeps of the stages that it has seen."""

from __future__ import annotations

import pytest
import torch

from loda.state import Artifact
from orchestrate import step_memory
from orchestrate.step_memory import StepMemory


def consolidated(value: float) -> Artifact:
    return Artifact({"merge/layer.up": torch.full((4, 2), value), "memory/moments.8": torch.zeros(1000)}, {"of": value})


def test_a_parent_is_kept_whole_and_the_tasks_before_it_by_what_they_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "KEPT_BYTES", 2 * consolidated(0).nbytes)
    memory = StepMemory()
    for index in range(5):
        memory.add(str(index), consolidated(index))
    assert [memory.get(str(index), merged_only=False) is not None for index in range(5)] == [0, 0, 0, 1, 1]
    for index in range(5):
        part = memory.get(str(index), merged_only=True)
        assert part is not None and part.meta == {"of": index}
        assert list(part.tensors) == ["merge/layer.up"]
        assert torch.equal(part.tensors["merge/layer.up"], torch.full((4, 2), float(index)))


def test_one_artifact_larger_than_the_bound_is_kept_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "KEPT_BYTES", 1)
    memory = StepMemory()
    whole = consolidated(1)
    memory.add("a", whole)
    assert memory.get("a", merged_only=False) is whole
    assert memory.get("b", merged_only=True) is None


def test_a_part_shares_its_tensors_and_a_step_without_factors_has_none() -> None:
    whole = consolidated(3)
    assert whole.part("merge/").tensors["merge/layer.up"] is whole.tensors["merge/layer.up"]
    memory = StepMemory()
    memory.add("observe", Artifact({"features": torch.zeros(3)}))
    assert memory.get("observe", merged_only=True) is not None  # the whole one will do
