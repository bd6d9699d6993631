"""The workers of a study: a Ray cluster, and in it lanes or, for the executor ``inline``, nothing more."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrate.cluster import ray_cluster
from orchestrate.lanes import Lanes
from orchestrate.session import Session


@dataclass
class Workers:
    """What trials run on.

    Attributes:
        storage: Tune's and Train's own notes. Nothing in it is needed later: the store, Optuna's database and MLflow
            hold what is.
        lanes: worker groups that walk orders; None: trials walk their orders themselves.
    """

    storage: Path
    lanes: Lanes | None
    inline_startup_seconds: float = 0.0  # from Tune's start of a trial to its first step, summed over trials

    def startup_seconds(self) -> float:
        """What starting workers took, summed over those that start side by side."""
        return self.inline_startup_seconds if self.lanes is None else self.lanes.startup_seconds()

    def busy_seconds(self) -> float | None:
        """What lanes spent on orders, summed over lanes; None without lanes."""
        return None if self.lanes is None else self.lanes.busy_seconds()


@contextlib.contextmanager
def open_workers(session: Session) -> Iterator[Workers]:
    """Start, or join, a cluster, and start the study's lanes; they start while the caller goes on.

    Raises:
        ConfigError: the cluster doesn't answer.
    """
    storage = session.folder / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True, exist_ok=True)
    resources = session.study.resources
    with ray_cluster(session.study):
        if resources.executor == "inline":
            yield Workers(storage, None)
        else:
            with Lanes(session.payload(), resources, str(storage)) as lanes:
                yield Workers(storage, lanes)
    shutil.rmtree(storage, ignore_errors=True)
