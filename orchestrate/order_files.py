"""Orders that are listed in a file, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loda.errors import ConfigError
from loda.reading import ReadingError, read_yaml
from orchestrate.designs import Order, Orders, two_sides


def orders_from_file(path: Path, tasks: int, tune: int, evaluate: int, task_names: Sequence[str] | None) -> Orders:
    """Tuning and evaluation orders from a YAML or JSON file, as ``design_orders`` says.

    Raises:
        ConfigError: every problem of the file: orders that repeat, omit or don't know a task, equal orders, too few.
    """
    where = f"orders.file {str(path)!r}"
    try:
        content = read_yaml(path.expanduser())  # JSON is YAML, too
    except (OSError, ReadingError) as error:
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
        return two_sides(read["list"], tune, evaluate)
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
