"""A study that was searched and judged once, for all tests that only look at what it left."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.e2e.studies import orchestrate, write_study


@dataclass(frozen=True)
class Searched:
    """The working directory of a finished sweep, and its ``--json`` document."""

    folder: Path
    values: dict[str, Any]

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def results(self) -> pd.DataFrame:
        return pd.read_parquet(self.runs / "results.parquet")

    def copy(self, target: Path) -> Path:
        """The run folder, copied to be damaged."""
        return shutil.copytree(self.runs, target / "runs" / "tiny")


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory, shapes_parquet: Path) -> Searched:
    """Six settings on one order, the best one judged on the five others of three tasks; starts Ray once."""
    folder = tmp_path_factory.mktemp("searched")
    write_study(
        folder,
        shapes_parquet,
        orders={"tune": 1, "evaluate": 5},
        search={"trials": 6},
        resources={"executor": "inline", "concurrent_trials": 1},
    )
    return Searched(folder, orchestrate(folder, "sweep", "study.yaml", "--json").values)
