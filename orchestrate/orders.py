"""Task orders: which ones a search tunes on, and which others the chosen setting is judged on.

Two kinds, never mixed up: in a **task order** a fixed partition of the classes into tasks is permuted; in a **class
order** the classes are permuted and then cut into tasks, so that every order has tasks of its own (the published
protocol). Designs choose task orders (``orchestrate.designs``, ``extremes``, ``order_files``), seeds class orders.

For one seed, more evaluation orders keep the earlier ones, more tuning orders likewise, and neither count changes the
other list (but for ``extremes``, whose tuning orders make way for the evaluated ones): results stay usable when a study
grows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loda.errors import ConfigError
from loda.stream import cut_published, published_class_order
from orchestrate.designs import ALL_LIMIT, DRAW_LIMIT, Order, all_orders, balanced_orders, random_orders, tree_orders
from orchestrate.extremes import extreme_orders
from orchestrate.order_files import orders_from_file

__all__ = ["ALL_LIMIT", "DESIGNS", "DRAW_LIMIT", "Order", "OrderPlan", "design_class_orders", "design_orders"]

DESIGNS = ("random", "all", "balanced", "tree", "extremes", "file")
CLASS_SEED_LIMIT = 2**32  # numpy's np.random.seed takes no more


@dataclass(frozen=True)
class OrderPlan:
    """Orders of one study; no order is in both lists.

    Attributes:
        design: one of ``DESIGNS``; "published" for class orders.
        tasks: how many tasks an order holds.
        seed: of the draw; "file" doesn't use it.
        tune: orders that the search scores settings on (validation images).
        evaluate: orders that the chosen setting is judged on (test images).
        kind: "task": an order is a tuple of task indices. "class": it is a tuple of all class labels, cut into tasks.
        depth: design "tree": how many tasks the orders of one root share.
        hardness: design "extremes": of each evaluation order, 0 easy to 1 hard.
        class_seeds: kind "class": the seeds of "tune" and "evaluate".
    """

    design: str
    tasks: int
    seed: int
    tune: tuple[Order, ...]
    evaluate: tuple[Order, ...]
    kind: str = "task"
    depth: int | None = None
    hardness: tuple[float, ...] | None = None
    class_seeds: Mapping[str, tuple[int, ...]] | None = None

    def roots(self, part: str) -> tuple[str, ...]:
        """A label for each order of "tune" or "evaluate"; orders with one label begin alike by design.

        Statistics over orders must take such orders as one sample. Outside trees every order has a label of its own.
        """
        if self.class_seeds is not None:
            return tuple(f"class-{seed}" for seed in self.class_seeds[part])
        return tuple("-".join(map(str, order[: self.depth])) for order in getattr(self, part))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the record of the study."""
        roots = {part: self.roots(part) for part in ("tune", "evaluate")}
        return json.loads(json.dumps(asdict(self) | {"roots": roots}))


def design_orders(
    design: str,
    tasks: int,
    tune: int,
    evaluate: int,
    seed: int,
    *,
    file: str | Path | None = None,
    task_names: Sequence[str] | None = None,
    roots: int | None = None,
    continuations: int | None = None,
    depth: int | None = None,
    similarity_TT: np.ndarray | None = None,
) -> OrderPlan:
    """Choose the task orders of a study.

    Args:
        design: ``random``: distinct orders, drawn with ``seed``. ``all``: every order that tuning doesn't use is
            evaluated, at most 7 tasks; ``evaluate`` isn't read. ``balanced``: Williams squares. ``tree``: ``roots``
            beginnings of ``depth`` tasks, each with ``continuations``; ``evaluate`` isn't read. ``extremes``: from easy
            to hard by ``similarity_TT``. ``file``: as listed in ``file``.
        tasks: how many tasks the stream has.
        tune, evaluate: how many orders of each kind.
        seed: not negative; neither the partition seed nor the training seed.
        file: YAML or JSON: ``{tune: [[0, 1, 2], ...], evaluate: [...]}``, of which the first ``tune`` and ``evaluate``
            are taken, or one list, of which ``evaluate`` are taken from the front and ``tune`` from the back.
        task_names: makes messages clearer, and lets the file name tasks instead of counting them from 0.
        roots, continuations, depth: of a tree.
        similarity_TT: (T, T) symmetric similarity of tasks.

    Raises:
        ConfigError: all problems; with too few distinct orders it says how many exist.
    """
    problems = []
    if design not in DESIGNS:
        problems.append(f"orders.design: expected one of {', '.join(DESIGNS)}, but got {design!r}")
    for key, value in (("tune", tune), ("evaluate", evaluate), ("seed", seed)):
        if value < 0:
            problems.append(f"orders.{key}: must not be negative, but got {value}")
    if tasks < 1:
        problems.append(f"orders: a stream needs at least one task, but has {tasks}")
    if (design == "file") != (file is not None):
        problems.append("orders.file: give a file with design: file, and only then")
    for key, size in (("roots", roots), ("continuations", continuations), ("depth", depth)):
        if design == "tree" and (size is None or size < 1):
            problems.append(f"orders.{key}: design: tree needs it, at least 1, but got {size}")
    if problems:
        raise ConfigError(problems)
    if design == "file":
        assert file is not None
        chosen = orders_from_file(Path(file), tasks, tune, evaluate, task_names)
    elif design == "all":
        chosen = all_orders(tasks, tune, seed)
    elif design == "balanced":
        chosen = balanced_orders(tasks, tune, evaluate, seed)
    elif design == "tree":
        assert roots is not None and continuations is not None and depth is not None
        chosen = tree_orders(tasks, tune, seed, roots, continuations, depth)
        return OrderPlan(design, tasks, seed, *chosen, depth=depth)
    elif design == "extremes":
        assert similarity_TT is not None, "extremes are chosen by task similarity"
        chosen, hardness = extreme_orders(tasks, tune, evaluate, seed, similarity_TT)
        return OrderPlan(design, tasks, seed, *chosen, hardness=hardness)
    else:
        chosen = random_orders(tasks, tune, evaluate, seed)
    return OrderPlan(design, tasks, seed, *chosen)


def design_class_orders(class_seeds: Sequence[int], classes: int, tasks: int, tune: int, seed: int) -> OrderPlan:
    """Choose the class orders of a study: ``np.random.seed(s)``, ``np.random.permutation(classes)``, then cut.

    Args:
        class_seeds: of the evaluation orders; published: 1993, 1996, 1997 (He et al. 2026).
        classes, tasks: how many there are; the first tasks get the remainder.
        tune: how many tuning orders; their seeds are drawn with ``seed`` and differ from ``class_seeds``.

    Raises:
        ConfigError: all problems; orders that come to the same tasks in the same order, which few classes can do.
    """
    problems = []
    if tune > DRAW_LIMIT:
        problems.append(f"orders.tune: at most {DRAW_LIMIT:,} tuning orders are drawn, but got {tune:,}")
    made: dict[tuple[tuple[int, ...], ...], int] = {}  # tasks -> seed
    for class_seed in class_seeds:
        cut = tuple(task.classes for task in cut_published(published_class_order(class_seed, classes), tasks))
        if cut in made:
            problems.append(
                f"orders.class_seeds: {made[cut]} and {class_seed} give the same {tasks} tasks of {classes} classes; "
                "leave one of them out"
            )
        made[cut] = class_seed
    if problems:
        raise ConfigError(problems)
    generator = np.random.default_rng([seed, 0])
    found: dict[int, None] = {}
    for _attempt in range(100 * tune):
        if len(found) == tune:
            break
        class_seed = int(generator.integers(CLASS_SEED_LIMIT))
        cut = tuple(task.classes for task in cut_published(published_class_order(class_seed, classes), tasks))
        if class_seed not in class_seeds and made.setdefault(cut, class_seed) == class_seed:
            found[class_seed] = None
    if len(found) < tune:
        raise ConfigError(
            f"orders.tune: {classes} classes in {tasks} tasks have too few class orders for {tune} tuning orders "
            f"beside the {len(class_seeds)} evaluated ones"
        )
    seeds = {"tune": tuple(found), "evaluate": tuple(class_seeds)}
    orders = {part: tuple(published_class_order(s, classes) for s in values) for part, values in seeds.items()}
    return OrderPlan("published", tasks, seed, orders["tune"], orders["evaluate"], "class", class_seeds=seeds)
