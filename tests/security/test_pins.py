"""Nothing older than the version that closed a hole which would matter here can be installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
# The first version without the hole, and which one it was.
CLOSED = {
    "ray": ("2.54.0", "CVE-2026-27482 (DELETE from a browser), CVE-2025-62593 (code from a browser)"),
    "mlflow": ("3.10.0", "CVE-2026-2652 (authentication passed by), files read by CreateModelVersion"),
    "torch": ("2.6.0", "CVE-2025-32434 (code in spite of weights_only)"),
    "pyarrow": ("14.0.1", "CVE-2023-47248 (code by extension types)"),
    "pillow": ("11.3.0", "CVE-2025-48379 (heap overflow)"),
    "pyyaml": ("5.4", "CVE-2020-14343 (code by full_load)"),
    "jinja2": ("3.1.6", "CVE-2025-27516 (code from templates)"),
}


def declared() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    return {requirement.name.lower(): requirement for requirement in found}


def locked() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name", CLOSED)
def test_the_lower_bound_is_above_the_hole(name: str) -> None:
    closed, what = Version(CLOSED[name][0]), CLOSED[name][1]
    lowest = min(Version(s.version) for s in declared()[name].specifier if s.operator in (">=", "==", "~="))
    assert lowest >= closed, f"{name} {lowest} has {what}"
    assert locked()[name] >= closed


def test_every_dependency_has_a_lower_bound_and_a_tested_version() -> None:
    without = [
        name for name, found in declared().items() if not any(s.operator in (">=", "==") for s in found.specifier)
    ]
    untested = [
        name for name, found in declared().items() if name not in locked() or locked()[name] not in found.specifier
    ]
    assert without + untested == []


def test_the_audit_can_not_pass_unseen() -> None:
    """Strict, and over the very versions that are installed."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\naudit: install\n")[1].split("\n\n")[0]
    assert "pip-audit --requirement constraints.txt" in recipe
    assert "--strict" in recipe
    assert not [line for line in recipe.splitlines() if line.startswith("\t-") or "|| true" in line]
    assert "-c constraints.txt" in makefile
