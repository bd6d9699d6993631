"""Merged weights along a chain: always the same sum, and never summed again from the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from loda.merging import MergedWeights

WIDTHS = {"first": (6, 9), "second": (9, 4)}  # (d_in, d_out), not square


def original() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(d_out, d_in, generator=draws) for name, (d_in, d_out) in WIDTHS.items()}


def factors(seed: int, rank: int = 2) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for name, (d_in, d_out) in WIDTHS.items():
        found |= {
            f"{name}.up": torch.randn(d_out, rank, generator=draws),
            f"{name}.down": torch.randn(rank, d_in, generator=draws),
        }
    if seed % 3 == 0:
        found["second.delta"] = torch.randn(4, 9, generator=draws)
    if seed % 4 == 0:
        del found["first.up"], found["first.down"]  # a task that left this layer as it was
    return found


def straight(merges: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    weights = original()
    for merge in merges:
        for name in weights:
            if f"{name}.up" in merge:
                weights[name] += merge[f"{name}.up"] @ merge[f"{name}.down"]
            if f"{name}.delta" in merge:
                weights[name] += merge[f"{name}.delta"]
    return weights


class Counting(MergedWeights):
    summed = 0

    def _plus(self, weights: Mapping[str, Tensor], merges: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        self.summed += len(merges)
        return super()._plus(weights, merges)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


TASKS = [factors(seed) for seed in range(1, 9)]
A, B, C, D, E, F, G, H = range(8)


@pytest.mark.parametrize(
    "chains",
    [
        [[], [A], [A, B], [A, B, C], [], [A, B, C, D]],  # as stages go, with probes of the frozen backbone between
        [[A, B, C, D], [A, B], [A, B, C], [A], [A, B, E]],  # shorter again, then another branch
        [[A, B, C], [D, E, F], [A, B, C], [D, B, C]],
        [[A, B], [A, B], [B, A], [A, A, A]],
    ],
)
def test_every_chain_gives_the_bits_of_the_plain_sum(chains: list[list[int]]) -> None:
    start = original()
    merged = MergedWeights(start)
    for chain in chains:
        assert same(merged.after([TASKS[index] for index in chain]), straight([TASKS[index] for index in chain]))
    assert same(start, original())


def test_a_chain_that_grows_is_not_summed_again() -> None:
    merged = Counting(original())
    per_task = []
    for length in range(1, len(TASKS) + 1):
        before = merged.summed
        # What a stage asks for: its parent twice, itself with factors that are not stored yet, then as they were read.
        earlier, fresh = TASKS[: length - 1], {name: tensor.clone() for name, tensor in TASKS[length - 1].items()}
        for wanted in (earlier, earlier, [*earlier, fresh], [], earlier, TASKS[:length]):
            assert same(merged.after(wanted), straight(wanted))
        per_task.append(merged.summed - before)
    assert per_task[-1] == per_task[3] <= 6


def test_equal_values_in_other_tensors_are_another_chain() -> None:
    merged = MergedWeights(original())
    merged.after(TASKS[:4])
    others = [{name: 2 * tensor for name, tensor in task.items()} for task in TASKS[:4]]
    assert same(merged.after(others), straight(others))
