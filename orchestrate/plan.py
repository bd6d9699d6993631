"""What a study would compute, before anything starts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from orchestrate.session import open_session
from orchestrate.study import Study
from orchestrate.work import stages_of


def make_plan(study: Study) -> dict[str, Any]:
    """Stages asked for, distinct, stored and to run; hours by measured timings once there are any.

    The settings that a search will suggest aren't known beforehand: for them the plan gives the most that can be
    needed, and counts as shared only what the study file's own setting shares.

    Raises:
        ConfigError: bad settings, all at once.
    """
    session = open_session(study, search=True)
    stages = stages_of(session.study, len(session.bench.tasks))
    own = {
        "evaluate": [node for work in session.evaluate_orders for node in session.nodes({}, work)],
        "tune": [node for work in session.tune_orders for node in session.nodes({}, work)],
    }
    trials = session.study.search.trials
    parts = [
        {
            "name": "search",
            "orders": len(session.tune_orders),
            "settings": trials,
            "stages": trials * len(session.tune_orders) * stages,
            "steps": trials * len(own["tune"]),
            "note": " (at most: settings share what they don't change)",
        },
        {
            "name": "evaluation",
            "orders": len(session.evaluate_orders),
            "settings": 1,
            "stages": len(session.evaluate_orders) * stages,
            "steps": len(own["evaluate"]),
            "note": "",
        },
    ]
    distinct = {node.key: node.step for nodes in own.values() for node in nodes}
    stored = sum(session.store.has(key) for key in distinct)
    missing = Counter(step for key, step in distinct.items() if not session.store.has(key))
    others = Counter({step: (trials - 1) * count for step, count in Counter(n.step for n in own["tune"]).items()})
    to_run = missing + others
    seconds = session.store.mean_seconds_by_step()
    expected = None
    if all(step in seconds for step in to_run):
        expected = sum(count * seconds[step] for step, count in to_run.items())
    parallel = session.study.resources.concurrent_trials
    text = "unknown until the first stages have run here"
    if expected is not None:
        minutes = expected / parallel / 60
        text = f"{expected / 3600:.2f} worker-hours at most, {minutes:.1f} min at {parallel} trials at once"
    return {
        "study": session.study.name,
        "study_digest": session.study.digest,
        "tasks": session.task_names,
        "orders": {kind: [list(order) for order in getattr(session.order_plan, kind)] for kind in ("tune", "evaluate")},
        "parts": parts,
        "stages_requested": sum(int(part["stages"]) for part in parts),  # type: ignore[call-overload]
        "steps_requested": sum(int(part["steps"]) for part in parts),  # type: ignore[call-overload]
        "distinct_steps": len(distinct),
        "stored_steps": stored,
        "steps_to_run": sum(to_run.values()),
        "expected_worker_seconds": expected,
        "expected": text,
        "store": session.study.resources.store,
        "store_bytes": session.store.size_bytes(),
    }
