"""A study opened for work: validated, its orders drawn, its folders and store ready."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loda.datasets import absolute_spec
from loda.distributed import WorkerGroup
from loda.errors import ConfigError
from loda.graph import StepNode
from loda.methods import build_method
from loda.reading import ReadingError, inside, read_bytes, read_yaml
from loda.workbench import Workbench, canonical_digest, open_workbench
from orchestrate.cluster import resource_problems
from orchestrate.objective import objective_directions
from orchestrate.orders import OrderPlan, design_class_orders, design_orders
from orchestrate.redaction import redact, secrets_in
from orchestrate.sampler import search_problems
from orchestrate.similarity import FILE as SIMILARITY_FILE
from orchestrate.similarity import TaskSimilarity, task_similarity
from orchestrate.space import SearchSpace, load_space
from orchestrate.store import StageStore
from orchestrate.study import Study
from orchestrate.work import OrderWork, name_orders


def absolute_study(study: Study) -> Study:
    """The study with every local path made absolute, for workers that run in another directory."""
    weights, store = study.backbone.weights, study.resources.store
    changes: dict[str, Any] = {
        "stream.dataset": absolute_spec(study.stream.dataset),
        "resources.store": store if "://" in store else str(Path(store).expanduser().absolute()),
        "resources.runs": str(Path(study.resources.runs).expanduser().absolute()),
    }
    if Path(study.search.space).is_file():
        changes["search.space"] = str(Path(study.search.space).absolute())
    if weights not in (None, "random"):
        changes["backbone.weights"] = str(Path(str(weights)).expanduser().absolute())
    if study.compute.pixel_cache is not None:
        changes["compute.pixel_cache"] = str(Path(study.compute.pixel_cache).expanduser().absolute())
    if study.orders.file is not None:
        changes["orders.file"] = str(Path(study.orders.file).expanduser().absolute())
    return study.with_values(changes)


@dataclass
class Session:
    """What every command that works on a study needs.

    Attributes:
        study: resolved, with absolute paths.
        folder: ``runs/<study>/``.
        bench: backbone and data, loaded once in the driver; it validates the study and computes stage keys.
    """

    study: Study
    folder: Path
    bench: Workbench
    store: StageStore
    order_plan: OrderPlan
    space: SearchSpace | None
    similarity: TaskSimilarity | None = None  # what the design "extremes" chose its orders by

    @property
    def tune_orders(self) -> tuple[OrderWork, ...]:
        """Orders of the search, scored on validation images."""
        return name_orders(self.order_plan, "tune", "validation")

    @property
    def evaluate_orders(self) -> tuple[OrderWork, ...]:
        """Orders that the chosen setting is judged on, on test images."""
        return name_orders(self.order_plan, "evaluate", "test")

    def nodes(self, settings: Mapping[str, Any], work: OrderWork) -> list[StepNode]:
        """The steps of one order under one setting."""
        return work.nodes(self.bench, self.study.with_values(settings))

    @property
    def task_names(self) -> list[str]:
        """Names of all tasks, by index."""
        return [task.name for task in self.bench.tasks]

    def payload(self) -> dict[str, Any]:
        """What a trial needs to open the same study."""
        return {
            "study": self.study.resolved(),
            "store": self.study.resources.store,
            "objectives": [name for name, _ in objective_directions(self.study.search.objective)],
        }


def open_session(study: Study, *, search: bool) -> Session:
    """Validate everything that can be validated before work starts, and load data and backbone.

    Args:
        search: whether the study's search space is needed.

    Raises:
        ConfigError: every problem at once.
    """
    problems = [*resource_problems(study), *secrets_in(study.resolved())]
    study = absolute_study(study)
    space = None
    if search:
        problems += search_problems(study.search)
        if study.racing.on and study.search.objective.multi:
            problems.append("racing: needs a single objective; remove search.objective.multi or switch racing off")
        try:
            space = load_space(study.search.space)
            problems += space.problems(study)
        except ConfigError as error:
            problems += error.problems
        if study.stream.validation == 0:
            problems.append("stream.validation: a search scores settings on validation images; set it above 0")
    bench: Workbench | None = None
    try:
        # Workers of a group have another root key than a single process: the driver plans for them.
        bench = open_workbench(study.run_settings(), WorkerGroup(0, study.resources.workers))
        if space is not None and not problems:
            for text, extreme in space.extremes(study):
                found = build_method(extreme.method).problems(bench.backbone.widths)
                problems += [f"search space {space.name!r}, {text}: {problem}" for problem in found]
    except ConfigError as error:
        problems += error.problems
    if problems or bench is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    folder = Path(study.resources.runs) / study.name
    similarity = None
    if study.orders.design == "extremes":
        similarity = task_similarity(bench, study.orders.similarity, folder)
    return Session(
        *(study, folder, bench, StageStore(study.resources.store), _order_plan(study, bench, similarity), space),
        similarity,
    )


def _order_plan(study: Study, bench: Workbench, similarity: TaskSimilarity | None) -> OrderPlan:
    orders, tasks = study.orders, len(bench.tasks)
    tune = orders.tune  # also where nothing is searched: the evaluation orders must be the same ones
    if orders.kind == "class":
        return design_class_orders(orders.class_seeds, bench.dataset.classes, tasks, tune, orders.seed)
    return design_orders(
        orders.design,
        tasks,
        tune,
        orders.evaluate,
        orders.seed,
        file=orders.file,
        task_names=[task.name for task in bench.tasks],
        roots=orders.roots,
        continuations=orders.continuations,
        depth=orders.depth,
        similarity_TT=None if similarity is None else similarity.matrix_TT,
    )


def stream_record(session: Session) -> dict[str, Any]:
    """What orders of two studies are matched by: the images, and each evaluation order as the classes of its tasks."""
    orders = {}
    for work in session.evaluate_orders:
        own = work.classes
        tasks = own or [session.bench.tasks[task].classes for task in work.order]
        orders[work.name] = canonical_digest(["task" if own is None else "class", tasks])
    return {"data_digest": session.bench.dataset.digest, "orders": orders}


def claim_folder(session: Session, command: str) -> None:
    """Create ``runs/<study>/`` with the study file, or find it there, unchanged.

    Args:
        command: ``run``, ``sweep`` or ``robustness``: what `orchestrate resume` goes on with.

    Raises:
        ConfigError: the name is taken by a different study (the differences are listed), or the folder or the store
            can't be written.
    """
    file = session.folder / "study.yaml"
    if file.is_file():
        changed = list(_differences(read_run_study(session.folder).resolved(), session.study.resolved()))
        if changed:
            raise ConfigError(
                [
                    f"{file}: a different study of the name {session.study.name!r} was run before; give this one "
                    "another name, or remove that folder. Finished stages stay in the store either way. It differs in:",
                    *(f"  {line}" for line in changed),
                ]
            )
    session.store.check_writable()
    try:
        session.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(session.folder / "command", command)
        write_atomic(session.folder / "stream.json", json.dumps(stream_record(session), indent=1))
        write_atomic(file, session.study.to_yaml())
        seeds = {"partition_seed": session.study.stream.partition_seed, "training_seed": session.study.training.seed}
        write_atomic(session.folder / "orders.json", json.dumps(session.order_plan.to_dict() | seeds, indent=1))
        if session.similarity is not None:
            write_atomic(session.folder / SIMILARITY_FILE, session.similarity.to_json())
    except OSError as error:
        raise ConfigError(f"resources.runs: can't write {session.folder}: {error}") from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines for the settings that results depend on and that differ."""
    for key in sorted({*old, *new}):
        path = f"{prefix}{key}"
        if path in ("resources", "tracking", "robustness", "compute.pixel_cache", "compute.pixel_cache_gb"):
            continue  # where and how it runs may change, and what it is compared with
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{path}.")
        elif path == "search.space" and Path(str(before)).name == Path(str(after)).name:
            continue  # a folder that moved; Optuna's storage refuses other ranges itself
        elif before != after:
            yield f"{path}: {before!r} before, {after!r} now"


def read_command(folder: Path) -> str:
    """Which command worked on a run folder last."""
    file = folder / "command"
    if file.is_file():
        try:
            return read_bytes(inside(folder, file), 1024).decode("ascii").strip()
        except (ReadingError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} can't be read: {error}; remove it") from error
    return "sweep" if (folder / "optuna.db").is_file() else "run"  # a folder of an older version


def read_run_study(folder: Path) -> Study:
    """The study of a run folder, as resolved when it ran.

    Raises:
        ConfigError: there is none.
    """
    from orchestrate.study import parse_study

    file = folder / "study.yaml"
    if not file.is_file():
        known = (
            sorted(path.parent.name for path in folder.parent.glob("*/study.yaml")) if folder.parent.is_dir() else []
        )
        raise ConfigError(f"no study {folder.name!r} in {folder.parent} (there: {', '.join(known) or 'none yet'})")
    try:
        values = read_yaml(inside(folder, file))
    except (ReadingError, OSError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from error
    return parse_study(values, str(file))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: temporary file, fsync, rename. Texts are written without secrets."""
    data = redact(content).encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
