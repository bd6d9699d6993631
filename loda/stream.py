"""Classes become tasks; images become training, validation and test rows."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loda.datasets.base import ImageDataset, shown
from loda.errors import ConfigError

PARTITIONS = ("auto", "natural", "random", "published")


@dataclass(frozen=True)
class Task:
    """Classes that are learned together.

    Attributes:
        name: for tables and plots, unique in its stream.
        classes: labels, ascending.
    """

    name: str
    classes: tuple[int, ...]


def published_class_order(seed: int, classes: int) -> tuple[int, ...]:
    """The class order of the published tables: ``np.random.seed(seed)`` then ``np.random.permutation(classes)``.

    Numpy's global generator is left alone. Published seeds: 1993, 1996, 1997 (He et al. 2026).
    """
    return tuple(np.random.RandomState(seed).permutation(classes).tolist())


def cut_classes(order: Sequence[int], tasks: int) -> tuple[Task, ...]:
    """Tasks of nearly equal size from classes in an order; the first ones get the remainder."""
    return _tasks(np.array_split(np.asarray(order), tasks))


def cut_published(order: Sequence[int], tasks: int) -> tuple[Task, ...]:
    """Tasks as the published tables cut them: all of one size, rounded up, and the last gets what is left (PILOT).

    196 classes in 10 tasks are nine times 20, then 16. Where that would leave a task without classes, they are cut
    evenly, as :func:`cut_classes` does.
    """
    size = math.ceil(len(order) / tasks)
    if size * (tasks - 1) >= len(order):
        return cut_classes(order, tasks)
    return _tasks(np.split(np.asarray(order), range(size, len(order), size)))


def _tasks(cut: Sequence[np.ndarray]) -> tuple[Task, ...]:
    return tuple(Task(f"task-{i + 1:02d}", tuple(sorted(part.tolist()))) for i, part in enumerate(cut))


def partition_classes(
    dataset: ImageDataset, tasks: int | None, partition_seed: int, kind: str = "auto"
) -> tuple[Task, ...]:
    """Cut the classes into tasks; which task comes when is the business of the task order, not of this.

    Args:
        dataset: gives the number of classes and, for natural tasks, the group of each class.
        tasks: how many; None: one per natural group.
        partition_seed: of the shuffle.
        kind: ``natural``: the dataset's groups, whole. If there are more than ``tasks``, they are dealt in shuffled
            order, each to the task with the fewest classes, and then moved or swapped while that evens the class
            counts. ``random``: shuffled classes, cut evenly (the first tasks get the remainder). ``published``:
            :func:`published_class_order`, cut by :func:`cut_published`. ``auto``: natural if the dataset has groups,
            else random.

    Returns:
        Natural tasks by their lowest label; random ones in the order of the cut.

    Raises:
        ConfigError: what was asked can't be had.
    """
    if kind == "auto":
        kind = "natural" if dataset.groups else "random"
    classes = dataset.classes
    problems = []
    if kind not in PARTITIONS:
        problems.append(f"stream.partition: expected one of {', '.join(PARTITIONS)}, but got {kind!r}")
    if partition_seed < 0:
        problems.append(f"stream.partition_seed: must not be negative, but got {partition_seed}")
    if tasks is not None and tasks < 1:
        problems.append(f"stream.tasks: must be at least 1, but got {tasks}")
    elif tasks is not None and tasks > classes:
        problems.append(f"stream.tasks: {tasks} tasks, but dataset {dataset.name!r} has only {classes} classes")
    elif kind == "natural" and not dataset.groups:
        problems.append(f"stream.partition: dataset {dataset.name!r} has no column 'task'; use partition: random")
    elif kind == "natural" and tasks is not None and tasks > len(set(dataset.groups or ())):
        problems.append(
            f"stream.tasks: {tasks} tasks, but dataset {dataset.name!r} has only {len(set(dataset.groups or ()))} "
            "natural groups; ask for fewer tasks, or use partition: random"
        )
    elif kind in ("random", "published") and tasks is None:
        problems.append(f"stream.tasks: say how many tasks the {classes} classes of {dataset.name!r} are cut into")
    if problems:
        raise ConfigError(problems)
    if kind == "natural":
        return _natural_tasks(dataset.groups or [], tasks, partition_seed)
    if kind == "published":
        return cut_published(published_class_order(partition_seed, classes), tasks or 1)
    order = tuple(np.random.default_rng(partition_seed).permutation(classes).tolist())
    return cut_classes(order, tasks or 1)


def _natural_tasks(groups: Sequence[str], tasks: int | None, seed: int) -> tuple[Task, ...]:
    members: dict[str, list[int]] = {}
    for label, group in enumerate(groups):
        members.setdefault(group, []).append(label)
    names = list(members)  # by lowest label
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    dealt = _deal([len(members[name]) for name in shuffled], tasks or len(names))
    made = []
    for hand in dealt:
        held = sorted((shuffled[i] for i in hand), key=names.index)
        title = "+".join(held) if len(held) <= 3 else f"{held[0]} and {len(held) - 1} more"
        made.append(Task(title, tuple(sorted(label for name in held for label in members[name]))))
    return tuple(sorted(made, key=lambda task: task.classes))


def _deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Deal items into hands of nearly equal total size; the order of the items matters, so a shuffle does too.

    Greedy, then moves and swaps while they lessen the sum of squared totals (whole numbers, so it ends):
    no single move or swap of two items would do better, which isn't always the best of all deals.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for item, size in enumerate(sizes):
        # An empty hand goes first, so that none stays empty.
        target = min(range(hands), key=lambda h: (bool(dealt[h]), totals[h], h))
        dealt[target].append(item)
        totals[target] += size
    while (step := _evening_step(sizes, dealt, totals)) is not None:
        giver, taker, given, returned = step
        dealt[giver].remove(given)
        dealt[taker].append(given)
        if returned is not None:
            dealt[taker].remove(returned)
            dealt[giver].append(returned)
        change = sizes[given] - (sizes[returned] if returned is not None else 0)
        totals[giver] -= change
        totals[taker] += change
    return dealt


def _evening_step(
    sizes: Sequence[int], dealt: list[list[int]], totals: list[int]
) -> tuple[int, int, int, int | None] | None:
    """The first move (or swap) of an item from a larger to a smaller hand that evens them: giver, taker, items."""
    for giver in range(len(dealt)):
        for taker in range(len(dealt)):
            gap = totals[giver] - totals[taker]
            if gap < 2:
                continue
            for given in dealt[giver]:
                for returned in (None, *dealt[taker]):
                    if returned is None and len(dealt[giver]) == 1:
                        continue
                    change = sizes[given] - (sizes[returned] if returned is not None else 0)
                    if 0 < change < gap:
                        return giver, taker, given, returned
    return None


def split_indices(dataset: ImageDataset, validation: float, seed: int) -> dict[str, np.ndarray]:
    """Rows for training, validation and test; test rows are the dataset's own and never take part in the draw.

    Each class gives ``round(validation * n)`` of its ``n`` training images to validation: at least 1 when
    ``validation`` > 0, and at least 1 is left to train on. The draw of a class is seeded by its name: the other
    classes of the dataset don't change it.

    Args:
        dataset: labels, names and splits.
        validation: a share, 0 <= validation < 1.
        seed: of the draw, not negative.

    Returns:
        "train", "validation", "test": (n,) int64 row numbers, ascending.

    Raises:
        ConfigError: a bad share or seed, or a class with a single training image where validation needs one too.
    """
    problems = []
    if not (math.isfinite(validation) and 0 <= validation < 1):
        problems.append(f"stream.validation: expected a share from 0 to below 1, but got {validation}")
    if seed < 0:
        problems.append(f"stream.partition_seed: must not be negative, but got {seed}")
    if problems:
        raise ConfigError(problems)
    training = dataset.split == "train"
    if validation > 0:
        counts = np.bincount(dataset.labels[training], minlength=dataset.classes)
        alone = [dataset.class_label(int(label)) for label in np.flatnonzero(counts < 2)]
        if alone:
            raise ConfigError(
                f"stream.validation: a class needs 2 training images to give one to validation, but {shown(alone)} "
                f"of dataset {dataset.name!r} has 1; add images or set validation: 0"
            )
    held_out = np.zeros(len(dataset), dtype=bool)
    seen: Counter[str] = Counter()
    for label, name in enumerate(dataset.class_names if validation > 0 else []):
        rows = np.flatnonzero(training & (dataset.labels == label))
        share = min(max(round(validation * len(rows)), 1), len(rows) - 1)
        # Names may repeat (two "crane" in ImageNet): the second one gets its own draw.
        text = f"{seed}\x1f{seen[name]}\x1f{name}"
        seen[name] += 1
        generator = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
        held_out[rows[generator.permutation(len(rows))[:share]]] = True
    chosen = {"train": training & ~held_out, "validation": held_out, "test": ~training}
    return {key: np.flatnonzero(mask).astype(np.int64) for key, mask in chosen.items()}
