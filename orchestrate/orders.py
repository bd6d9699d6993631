"""Task orders: which ones a search tunes on, and which others the chosen setting is judged on.

Both lists come from one seeded sequence of all orders, read from its two sides, so that they never meet:

- up to 8 tasks (40,320 orders) the sequence is a shuffle of all orders: evaluation reads from the front, tuning from
  the back, until they would touch;
- beyond, a bit of SHA-256(seed, order) says on which side an order lies, and each side draws from its own generator,
  leaving out what lies on the other side or has been drawn.

Hence, for one seed: more evaluation orders keep the earlier ones, more tuning orders likewise, and neither count
changes the other list. Results stay usable when a study grows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from loda.errors import ConfigError

Order = tuple[int, ...]

DESIGNS = ("random", "all", "file")
ALL_LIMIT = 7  # tasks: 5,040 orders
DRAW_LIMIT = 20_000  # orders of one kind where all can't be listed; far below the 181,440 a side of 9 tasks
_SHUFFLE_LIMIT = 8  # tasks: 40,320 orders are shuffled as a list


@dataclass(frozen=True)
class OrderPlan:
    """Orders of one study; each is a tuple of task indices, and no order is in both lists.

    Attributes:
        design: "random" | "all" | "file".
        tasks: how many tasks an order holds.
        seed: of the draw; "file" doesn't use it.
        tune: orders that the search scores settings on (validation images).
        evaluate: orders that the chosen setting is judged on (test images).
    """

    design: str
    tasks: int
    seed: int
    tune: tuple[Order, ...]
    evaluate: tuple[Order, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the record of the study."""
        return json.loads(json.dumps(asdict(self)))


def design_orders(
    design: str,
    tasks: int,
    tune: int,
    evaluate: int,
    seed: int,
    *,
    file: str | Path | None = None,
    task_names: Sequence[str] | None = None,
) -> OrderPlan:
    """Choose the orders of a study.

    Args:
        design: ``random``: distinct orders, drawn with ``seed``. ``all``: every order that tuning doesn't use is
            evaluated, at most 7 tasks; ``evaluate`` isn't read. ``file``: as listed in ``file``.
        tasks: how many tasks the stream has.
        tune, evaluate: how many orders of each kind.
        seed: not negative; neither the partition seed nor the training seed.
        file: YAML or JSON: ``{tune: [[0, 1, 2], ...], evaluate: [...]}``, of which the first ``tune`` and ``evaluate``
            are taken, or one list, of which ``evaluate`` are taken from the front and ``tune`` from the back.
        task_names: makes messages clearer, and lets the file name tasks instead of counting them from 0.

    Raises:
        ConfigError: all problems; with too few distinct orders it says how many exist.
    """
    problems = []
    if design not in DESIGNS:
        problems.append(f"orders.design: expected one of {', '.join(DESIGNS)}, but got {design!r}")
    for key, value, least in (("tune", tune, 0), ("evaluate", evaluate, 0), ("seed", seed, 0)):
        if value < least:
            problems.append(f"orders.{key}: must not be negative, but got {value}")
    if tasks < 1:
        problems.append(f"orders: a stream needs at least one task, but has {tasks}")
    if (design == "file") != (file is not None):
        problems.append("orders.file: give a file with design: file, and only then")
    if problems:
        raise ConfigError(problems)
    if design == "file":
        assert file is not None
        chosen = _from_file(Path(file), tasks, tune, evaluate, task_names)
    elif design == "all":
        chosen = _all_orders(tasks, tune, seed)
    else:
        chosen = _random_orders(tasks, tune, evaluate, seed)
    return OrderPlan(design, tasks, seed, *chosen)


def _shuffled(tasks: int, seed: int) -> list[Order]:
    orders = list(itertools.permutations(range(tasks)))
    return [orders[i] for i in np.random.default_rng(seed).permutation(len(orders))]


def _two_sides(sequence: Sequence[Order], tune: int, evaluate: int) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    """Tuning orders from the back, evaluation orders from the front."""
    return tuple(sequence[::-1][:tune]), tuple(sequence[:evaluate])


def _all_orders(tasks: int, tune: int, seed: int) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    count = math.factorial(tasks)
    if tasks > ALL_LIMIT:
        raise ConfigError(
            f"orders.design: all orders of {tasks} tasks are {count:,}; at most {ALL_LIMIT} tasks "
            f"({math.factorial(ALL_LIMIT):,} orders) are supported, use design: random"
        )
    if tune >= count:
        raise ConfigError(
            f"orders.tune: {tune} tuning orders leave none to evaluate: {tasks} tasks have {count} distinct orders"
        )
    return _two_sides(_shuffled(tasks, seed), tune, count - tune)


def _random_orders(tasks: int, tune: int, evaluate: int, seed: int) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    count = math.factorial(tasks)
    if tasks <= _SHUFFLE_LIMIT:
        if tune + evaluate > count:
            raise ConfigError(
                f"orders: {tune} tuning and {evaluate} evaluation orders must all differ, but {tasks} tasks have only "
                f"{count:,} distinct orders; ask for fewer, or cut the stream into more tasks"
            )
        return _two_sides(_shuffled(tasks, seed), tune, evaluate)
    if max(tune, evaluate) > DRAW_LIMIT:
        raise ConfigError(
            f"orders: at most {DRAW_LIMIT:,} tuning and {DRAW_LIMIT:,} evaluation orders are drawn (of {count:,} that "
            f"{tasks} tasks have), but got tune {tune:,}, evaluate {evaluate:,}"
        )
    return _draw(tasks, tune, seed, side=1), _draw(tasks, evaluate, seed, side=0)


def _draw(tasks: int, count: int, seed: int, side: int) -> tuple[Order, ...]:
    generator = np.random.default_rng([seed, side])
    drawn: dict[Order, None] = {}
    while len(drawn) < count:
        order = tuple(generator.permutation(tasks).tolist())
        if hashlib.sha256(f"{seed}:{order}".encode()).digest()[0] & 1 == side:
            drawn[order] = None
    return tuple(drawn)


def _from_file(
    path: Path, tasks: int, tune: int, evaluate: int, task_names: Sequence[str] | None
) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    where = f"orders.file {str(path)!r}"
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} can't be read: {error}") from error
    if isinstance(content, list):
        parts = {"list": content}
    elif isinstance(content, dict) and content and set(content) <= {"tune", "evaluate"}:
        parts = {key: content.get(key) or [] for key in ("tune", "evaluate")}
    else:
        raise ConfigError(f"{where}: expected a list of orders, or a mapping with the lists 'tune' and 'evaluate'")
    problems: list[str] = []
    seen: dict[Order, str] = {}
    read: dict[str, list[Order]] = {}
    for key, entries in parts.items():
        read[key] = []
        if not isinstance(entries, list):
            problems.append(f"{where}: {key} must be a list of orders, but is {entries!r}")
            continue
        for number, entry in enumerate(entries, start=1):
            place = f"order {number} of {key}"
            order, found = _read_order(entry, tasks, task_names)
            problems += [f"{where}: {place} {problem}" for problem in found]
            if order is None:
                continue
            if order in seen:
                problems.append(f"{where}: {place} is the same as {seen[order]}: {list(order)}")
            seen.setdefault(order, place)
            read[key].append(order)
    wanted = {"list": tune + evaluate} if "list" in parts else {"tune": tune, "evaluate": evaluate}
    for key, number in wanted.items():
        if isinstance(parts[key], list) and number > len(parts[key]):
            problems.append(f"{where}: {number} orders are wanted from {key}, but it holds only {len(parts[key])}")
    if problems:
        raise ConfigError(problems)
    if "list" in read:
        return _two_sides(read["list"], tune, evaluate)
    return tuple(read["tune"][:tune]), tuple(read["evaluate"][:evaluate])


def _read_order(entry: Any, tasks: int, task_names: Sequence[str] | None) -> tuple[Order | None, list[str]]:
    """An order of a file, or what is wrong with it."""
    if not isinstance(entry, list):
        return None, [f"must be a list of {tasks} tasks, but is {entry!r}"]
    names = list(task_names or ())
    positions = [names.index(item) if isinstance(item, str) and item in names else item for item in entry]
    unknown = [p for p in positions if not isinstance(p, int) or isinstance(p, bool) or not 0 <= p < tasks]
    if unknown:
        known = f"0 to {tasks - 1}" + (f" or {', '.join(names)}" if names else "")
        return None, [f"names {', '.join(map(repr, unknown))}, but tasks are {known}"]

    def title(task: int) -> str:
        return f"{task} ({names[task]})" if names else str(task)

    repeated = [title(task) for task in range(tasks) if positions.count(task) > 1]
    omitted = [title(task) for task in range(tasks) if task not in positions]
    problems = [f"repeats task {', '.join(repeated)}"] if repeated else []
    problems += [f"omits task {', '.join(omitted)}"] if omitted else []
    return (None, problems) if problems else (tuple(positions), [])
