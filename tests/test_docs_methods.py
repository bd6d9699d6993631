"""The pages on methods: the one of docs/adding-a-method.md works as it stands, and the list is complete."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loda.methods import BUILT_IN
from tests.conftest import SettingsFactory

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    """The page's package as pip would leave it, and an environment that sees it."""
    site = tmp_path / "site"
    (site / "my_methods").mkdir(parents=True)
    (site / "my_methods" / "__init__.py").touch()
    (site / "my_methods" / "soup.py").write_text(block("python"), encoding="utf-8")
    information = site / "my_methods-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n", encoding="utf-8")
    ((group, line),) = re.findall(r'entry-points\."(.*?)"\]\n(.*)', block("toml"))
    (information / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def called(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_pages_method_is_short() -> None:
    assert len([line for line in block("python").splitlines() if line.strip()]) < 60


def test_the_pages_method_is_listed_and_learns(
    package: dict[str, str], tiny_settings: SettingsFactory, tmp_path: Path
) -> None:
    listed = called(package, tmp_path, "-m", "orchestrate.cli", "methods", "--json")
    assert listed.returncode == 0, listed.stderr
    assert "soup" in {row["name"] for row in json.loads(listed.stdout)}
    values = json.loads(tiny_settings().model_dump_json()) | {"method": {"name": "soup", "rank": 4}}
    study = tmp_path / "my-study.yaml"
    study.write_text(yaml.safe_dump(values), encoding="utf-8")
    program = (
        "import sys, json, loda\n"
        "from loda.workbench import memory_tensors, merge_factors\n"
        "states = []\n"
        "keep = lambda node, artifact: states.append(artifact) if node.step == 'consolidate' else None\n"
        "result = loda.run_sequence(sys.argv[1], on_step=keep)\n"
        "sizes = [len(memory_tensors(states[-1])), len(merge_factors(states[0]))]\n"
        "try:\n"
        "    loda.run_sequence({**json.load(open(sys.argv[2])), 'method': {'name': 'soup', 'rank': 33}})\n"
        "except loda.ConfigError as error:\n"
        "    print(json.dumps([result.summary.a_last, *sizes, str(error)]))\n"
    )
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(values), encoding="utf-8")
    done = called(package, tmp_path, "-c", program, str(study), str(plain))
    assert done.returncode == 0, done.stderr
    accuracy, remembered, merged, refusal = json.loads(done.stdout)
    assert 0 <= accuracy <= 100 and remembered == 4 and merged == 8
    assert "method.rank: 33 exceeds the width 32" in refusal


def test_the_page_of_methods_lists_those_that_there_are() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for method in BUILT_IN:
        (row,) = re.findall(rf"^\| `{method.name}` \|.*(?:arXiv|CVPR).*$", page, flags=re.MULTILINE)
        for identifier in re.findall(r"arXiv [\d.]+", method.source):
            assert identifier in row
