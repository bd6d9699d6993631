"""What a study would compute, before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loda.graph import StepNode
from orchestrate.expected import try_costs
from orchestrate.robustness.variants import make_cells
from orchestrate.session import Session, open_session
from orchestrate.store import StageStore
from orchestrate.study import Study
from orchestrate.work import OrderWork

TREE_LIMIT = 1000  # stages: beyond, no picture of them
SAMPLE = 200  # stored steps that are read for their cost; keys are hashes, so the first ones are as good as any


def make_plan(study: Study, measure: bool = False) -> dict[str, Any]:
    """Stages asked for, distinct, stored and to run; hours and bytes by measured stages once there are any.

    The settings that a search will suggest aren't known beforehand: for them the plan gives the most that can be
    needed, as if settings shared nothing. A study without validation images can't be searched: its plan is that of a
    run. What is stored is counted for the study file's own setting, which is also
    taken for the chosen one.

    Args:
        measure: try two stages with one epoch here, and expect hours by them.

    Raises:
        ConfigError: bad settings, all at once.
    """
    searched = study.stream.validation > 0  # without validation images nothing can be searched: only `run` is meant
    session = open_session(study, search=searched)
    search = session.study.search
    works = {"tune": session.tune_orders} if searched else {}
    works["evaluate"] = session.evaluate_orders
    own = {kind: [_stages(session.nodes({}, work)) for work in works[kind]] for kind in works}
    tune = own.get("tune", [])
    tried, distinct = _distinct(tune), _distinct(own["evaluate"])
    tried_steps = _steps(tried)
    others = search.trials - search.include_defaults  # settings that aren't the study file's own
    if search.include_defaults:
        distinct = _distinct([*tune, *own["evaluate"]])
    steps = _steps(distinct)
    there = {key for key in steps if session.store.has(key)}
    to_run = Counter(step for key, step in steps.items() if key not in there)
    to_run += Counter({step: others * count for step, count in Counter(tried_steps.values()).items()})
    stored_stages = sum(there.issuperset(_steps({stage: distinct[stage]})) for stage in distinct)
    expected = _expected(to_run, _measured(session.store, sorted(there)), session.study.resources.concurrent_trials)
    if measure:
        expected = _tried(session, distinct, _distinct(own["evaluate"]), tried, others, there)
    parts = [_part("evaluation", own["evaluate"], 1, "")]
    if searched:
        note = " (at most: settings share what they don't change)"
        parts.insert(0, _part("search", tune, search.trials, note))
    requested = sum(part["stages"] for part in parts)
    stages_distinct = len(distinct) + others * len(tried)
    return {
        "study": session.study.name,
        "study_digest": session.study.digest,
        "tasks": session.task_names,
        "order_kind": session.order_plan.kind,
        "order_design": session.order_plan.design,
        "orders": {kind: [list(work.order) for work in works[kind]] for kind in works},
        "order_names": {kind: [work.name for work in works[kind]] for kind in works},
        "parts": parts,
        "sharing": session.study.resources.sharing,
        "stages_requested": requested,
        "stages_distinct": stages_distinct,
        "stages_stored": stored_stages,
        "stages_to_run": stages_distinct - stored_stages,
        "share_saved_percent": 100 * (1 - stages_distinct / requested),
        "steps_requested": sum(part["steps"] for part in parts),
        "distinct_steps": len(steps),
        "stored_steps": len(there),
        "steps_to_run": sum(to_run.values()),
        "steps_to_run_by_step": dict(to_run),
        **expected,
        "store": session.study.resources.store,
        "store_bytes": session.store.size_bytes(),
        "tree": {kind: _tree(session, works[kind], own[kind], there) for kind in works}
        if len(distinct) + len(tried) <= TREE_LIMIT
        else None,
        "robustness": _compared(session),
    }


def _compared(session: Session) -> dict[str, Any] | None:
    """What ``orchestrate robustness`` would compute, exactly, as all its settings are known; None without variants."""
    if not session.study.robustness.variants:
        return None
    cells = make_cells(session)
    orders = [_stages(session.nodes(cell.settings, work)) for cell in cells for work in session.evaluate_orders]
    distinct = _distinct(orders)
    steps = _steps(distinct)
    there = {key for key in steps if session.store.has(key)}
    to_run = Counter(step for key, step in steps.items() if key not in there)
    requested = sum(len(stages) for stages in orders)
    stored = sum(there.issuperset(_steps({stage: distinct[stage]})) for stage in distinct)
    return {
        "variants": list(session.study.robustness.variants),
        "settings": len(cells),
        "orders": len(session.evaluate_orders),
        "stages_requested": requested,
        "stages_distinct": len(distinct),
        "stages_stored": stored,
        "stages_to_run": len(distinct) - stored,
        "share_saved_percent": 100 * (1 - len(distinct) / requested),
        "steps_to_run": sum(to_run.values()),
        **_expected(to_run, _measured(session.store, sorted(there)), session.study.resources.concurrent_trials),
    }


Stage = tuple[StepNode, ...]  # the steps of one task at one position


def _stages(nodes: Sequence[StepNode]) -> list[Stage]:
    """The steps of an order, stage by stage."""
    ends = [index + 1 for index, node in enumerate(nodes) if node.step == "evaluate"]
    return [tuple(nodes[start:end]) for start, end in zip([0, *ends], ends)]


def _state(stage: Stage) -> str:
    """The key of what a stage leaves behind: two that share it are one stage, whatever they are scored on."""
    return next(node.key for node in stage if node.step == "consolidate")


def _distinct(orders: Iterable[list[Stage]]) -> dict[str, list[Stage]]:
    """Stages by their state; one is there several times where it is scored on several splits."""
    found: dict[str, list[Stage]] = {}
    for stages in orders:
        for stage in stages:
            found.setdefault(_state(stage), []).append(stage)
    return found


def _nodes(stages: Mapping[str, list[Stage]]) -> dict[str, StepNode]:
    """Steps by key."""
    return {node.key: node for same in stages.values() for stage in same for node in stage}


def _steps(stages: Mapping[str, list[Stage]]) -> dict[str, str]:
    """Kind of step by key."""
    return {key: node.step for key, node in _nodes(stages).items()}


def _part(name: str, orders: list[list[Stage]], settings: int, note: str) -> dict[str, Any]:
    distinct = _distinct(orders)
    return {
        "name": name,
        "orders": len(orders),
        "settings": settings,
        "stages": settings * sum(len(stages) for stages in orders),
        "stages_distinct": settings * len(distinct),
        "steps": settings * sum(len(stage) for stages in orders for stage in stages),
        "note": note,
    }


def _measured(store: StageStore, keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean seconds and bytes by step: of this study's stored steps, of the store's newest where it has none."""
    found = store.mean_costs_by_step()
    return found | store.mean_costs_by_step(keys[:SAMPLE]) if keys else found


def _expected(to_run: Mapping[str, int], measured: Mapping[str, tuple[float, float]], lanes: int) -> dict[str, Any]:
    if not all(step in measured for step in to_run):
        return {
            "expected_worker_seconds": None,
            "expected_worker_hours": None,
            "expected_bytes": None,
            "expected": "unknown until the first stages have run here; --measure tries two of them",
        }
    seconds = sum(count * measured[step][0] for step, count in to_run.items())
    size = sum(count * measured[step][1] for step, count in to_run.items())
    time = f"{seconds / 3600:.2f} worker-hours at most, {seconds / lanes / 60:.1f} min at {lanes} trials at once"
    return {
        "expected_worker_seconds": seconds,
        "expected_worker_hours": seconds / 3600,
        "expected_bytes": round(size),
        "expected": f"{time}; {size / 1e6:.1f} MB",
    }


def _tried(
    session: Session,
    distinct: Mapping[str, list[Stage]],
    evaluated: Mapping[str, list[Stage]],
    tried: Mapping[str, list[Stage]],
    others: int,
    there: set[str],
) -> dict[str, Any]:
    """Hours by a trial on this machine; beside them those of the evaluation orders, which are all that `run` needs."""
    costs = try_costs(session)
    resources = session.study.resources
    own = [(node, 1) for key, node in _nodes(distinct).items() if key not in there]
    suggested = [(node, others) for node in _nodes(tried).values()]
    run = [(node, 1) for key, node in _nodes(evaluated).items() if key not in there]
    found = costs.expected([*own, *suggested], resources.workers, resources.concurrent_trials)
    alone = costs.expected(run, resources.workers, resources.concurrent_trials)
    return found | {"expected_run_seconds": alone["expected_worker_seconds"], "expected_run": alone["expected"]}


def _tree(
    session: Session, works: Sequence[OrderWork], orders: Sequence[list[Stage]], there: set[str]
) -> list[dict[str, Any]]:
    """Nested stages of the study file's own setting: ``task``, ``stored``, ``orders`` that walk it, ``children``."""
    roots: list[dict[str, Any]] = []
    made: dict[str, dict[str, Any]] = {}
    for work, stages in zip(works, orders, strict=True):
        siblings = roots
        for stage in stages:
            key = _state(stage)
            if key not in made:
                stored = there.issuperset(node.key for node in stage)
                made[key] = {"task": _title(session, work, stage), "stored": stored, "orders": 0, "children": []}
                siblings.append(made[key])
            made[key]["orders"] += 1
            siblings = made[key]["children"]
    return roots


def _title(session: Session, work: OrderWork, stage: Stage) -> str:
    prefix = stage[-1].prefix
    if len(prefix) > stage[-1].position + 1:
        return "all tasks"  # a joint method
    name = session.task_names[prefix[-1]]
    return f"{work.root}: {name}" if work.classes is not None and stage[-1].position == 0 else name
