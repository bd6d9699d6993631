"""Classes to tasks, images to splits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loda.datasets import ImageDataset, load_dataset
from loda.errors import ConfigError
from loda.stream import partition_classes, published_class_order, split_indices


def dataset(
    classes: int, train: int = 5, test: int = 2, groups: list[str] | None = None, names: list[str] | None = None
) -> ImageDataset:
    """Images are never decoded here."""
    labels = np.repeat(np.arange(classes), train + test)
    split = np.array((["train"] * train + ["test"] * test) * classes)
    names = names or [f"class {label}" for label in range(classes)]
    return ImageDataset("made", [b"x"] * len(labels), labels, names, split, groups)


def test_published_class_orders_begin_as_published_and_leave_numpy_alone() -> None:
    np.random.seed(7)
    expected_next = np.random.random()
    np.random.seed(7)
    assert published_class_order(1993, 200)[:5] == (168, 136, 51, 9, 183)
    assert published_class_order(1993, 100)[:5] == (68, 56, 78, 8, 23)
    assert np.random.random() == expected_next
    for seed in (1993, 1996, 1997):
        np.random.seed(seed)
        assert published_class_order(seed, 81) == tuple(np.random.permutation(81))


def test_published_partition_cuts_the_published_order() -> None:
    tasks = partition_classes(dataset(20), 4, 1993, "published")
    order = published_class_order(1993, 20)
    assert [task.classes for task in tasks] == [tuple(sorted(order[i : i + 5])) for i in (0, 5, 10, 15)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data(), st.integers(0, 1000))
def test_random_partition_covers_all_classes_once_and_evenly(classes: int, data: st.DataObject, seed: int) -> None:
    tasks = data.draw(st.integers(1, classes))
    parts = partition_classes(dataset(classes, 1, 1), tasks, seed, "random")
    assert sorted(label for task in parts for label in task.classes) == list(range(classes))
    sizes = [len(task.classes) for task in parts]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1  # the first get the remainder
    assert all(list(task.classes) == sorted(task.classes) for task in parts)
    assert len({task.name for task in parts}) == tasks


def test_random_partition_follows_its_seed_only() -> None:
    data = dataset(30)
    assert partition_classes(data, 5, 3, "random") == partition_classes(data, 5, 3, "random")
    assert partition_classes(data, 5, 3, "random") != partition_classes(data, 5, 4, "random")


def test_natural_tasks_are_the_groups_in_label_order_whatever_the_seed() -> None:
    data = dataset(6, groups=["b", "b", "a", "c", "c", "a"])
    for seed in range(5):
        for tasks in (None, 3):
            parts = partition_classes(data, tasks, seed)
            assert [(task.name, task.classes) for task in parts] == [("b", (0, 1)), ("a", (2, 5)), ("c", (3, 4))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=14), st.data(), st.integers(0, 50))
def test_dealt_groups_stay_whole_fill_every_task_and_are_even(sizes: list[int], data: st.DataObject, seed: int) -> None:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    tasks = data.draw(st.integers(1, len(sizes)))
    stream = dataset(len(groups), 1, 1, groups)
    parts = partition_classes(stream, tasks, seed, "natural")
    assert parts == partition_classes(stream, tasks, seed, "natural")
    assert len(parts) == tasks and len({task.name for task in parts}) == tasks
    assert sorted(label for task in parts for label in task.classes) == list(range(len(groups)))
    homes = [{groups[label] for label in task.classes} for task in parts]
    assert sum(map(len, homes)) == len(sizes)  # no group is in two tasks
    # No single group could be moved to a smaller task with a gain.
    totals = [len(task.classes) for task in parts]
    for home, total in zip(homes, totals):
        if len(home) > 1:
            smallest = min(sizes[int(group[1:])] for group in home)
            assert total - min(totals) <= smallest


def test_dealing_evens_class_counts_and_follows_the_seed() -> None:
    sizes = [8, 7, 6, 5, 4, 3, 2, 1]
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    stream = dataset(len(groups), 1, 1, groups)
    dealt = {seed: partition_classes(stream, 4, seed) for seed in range(8)}
    for parts in dealt.values():
        totals = [len(task.classes) for task in parts]
        assert max(totals) - min(totals) <= 2  # 36 classes in 4 tasks
    assert len(set(dealt.values())) > 1


def test_bundled_stream_has_an_alphabet_a_task() -> None:
    data = load_dataset("alphabets", verify=False)
    parts = partition_classes(data, None, 0)
    assert data.groups is not None and len(parts) == len(set(data.groups))
    assert all({data.groups[label] for label in task.classes} == {task.name} for task in parts)


@pytest.mark.parametrize(
    ("groups", "tasks", "seed", "kind", "message"),
    [
        (None, 5, 0, "random", "5 tasks, but dataset 'made' has only 4 classes"),
        (None, None, 0, "auto", "say how many tasks"),
        (None, 2, 0, "natural", "no column 'task'"),
        (["a", "a", "b", "b"], 3, 0, "auto", "only 2 natural groups"),
        (None, 2, 0, "alphabetical", "expected one of auto, natural, random, published"),
        (None, 2, -1, "random", "partition_seed: must not be negative"),
        (None, 0, 0, "random", "at least 1"),
    ],
)
def test_partitions_that_cannot_be_had(
    groups: list[str] | None, tasks: int | None, seed: int, kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition_classes(dataset(4, groups=groups), tasks, seed, kind)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20), st.floats(0, 0.99), st.integers(0, 1000))
def test_validation_is_a_stratified_share_of_training_images(train: int, share: float, seed: int) -> None:
    data = dataset(3, train, 2)
    rows = split_indices(data, share, seed)
    together = np.concatenate([rows["train"], rows["validation"], rows["test"]])
    assert sorted(together.tolist()) == list(range(len(data)))
    assert (data.split[rows["test"]] == "test").all() and (data.split[rows["validation"]] == "train").all()
    expected = 0 if share == 0 else min(max(round(share * train), 1), train - 1)
    assert np.bincount(data.labels[rows["validation"]], minlength=3).tolist() == [expected] * 3
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in rows.values())


def test_validation_of_a_class_does_not_depend_on_other_classes() -> None:
    names = ["ant", "bee", "cat", "dog"]
    whole, part = dataset(4, 9, 2, names=names), dataset(2, 9, 2, names=["bee", "dog"])
    held = {}
    for data in (whole, part):
        rows = split_indices(data, 0.3, seed=5)["validation"]
        held[data.classes] = {
            name: (rows[data.labels[rows] == label] - label * 11).tolist()
            for label, name in enumerate(data.class_names)
        }
    assert held[2] == {name: held[4][name] for name in ("bee", "dog")}
    assert len({tuple(rows) for rows in held[4].values()}) > 1  # yet classes draw differently


def test_classes_of_one_name_draw_apart_and_seeds_differ() -> None:
    data = dataset(6, 20, 1, names=["crane"] * 6)
    rows = split_indices(data, 0.3, 0)["validation"]
    assert len({tuple(rows[data.labels[rows] == label] - label * 21) for label in range(6)}) > 1
    assert not np.array_equal(rows, split_indices(data, 0.3, 1)["validation"])


def test_a_single_training_image_cannot_be_shared() -> None:
    data = dataset(2, 1, 1)
    with pytest.raises(ConfigError, match=r"0 \(class 0\), 1 \(class 1\).*set validation: 0"):
        split_indices(data, 0.2, 0)
    assert len(split_indices(data, 0, 0)["validation"]) == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_bad_share_and_seed_come_together(share: float) -> None:
    with pytest.raises(ConfigError) as caught:
        split_indices(dataset(2), share, -1)
    assert len(caught.value.problems) == 2
