"""The wheel holds everything that an installation without the checkout needs, and names a command that exists."""

from __future__ import annotations

import configparser
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("loda", "orchestrate", "search_spaces", "clusters")
NOT_SHIPPED = {"__pycache__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built without a network from a copy, so that no build folder is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out)]
    built = subprocess.run([*command, str(copy)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile, package: str) -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {path.as_posix() for path in files if not NOT_SHIPPED & set(path.parts) and path.name[0] != "."}
    assert expected
    assert expected - set(wheel.namelist()) == set()


@pytest.mark.parametrize(
    "name",
    [
        "loda/bundled/alphabets.parquet",
        "loda/bundled/ALPHABETS_LICENSE.md",
        "loda/bundled/alphabet_vit.safetensors",
        "loda/bundled/alphabet_vit.json",
        "loda/bundled/alphabet_vit.md",
        "loda/datasets/parquet.py",
        "loda/methods/loda.py",
        "loda/py.typed",
        "orchestrate/py.typed",
        "orchestrate/studies/alphabets.yaml",
        "search_spaces/loda.yaml",
        "search_spaces/loda-small.yaml",
        "search_spaces/gao.yaml",
    ],
)
def test_bundled_file_is_in_the_wheel_with_its_bytes(wheel: zipfile.ZipFile, name: str) -> None:
    assert wheel.read(name) == (ROOT / name).read_bytes()


def test_wheel_has_nothing_but_the_packages_and_its_licence(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (metadata,) = tops - set(PACKAGES)
    assert metadata.endswith(".dist-info")
    assert b"Apache License" in wheel.read(f"{metadata}/licenses/LICENSE")


def test_pins_agree_with_the_ranges_and_carry_no_build_tag() -> None:
    """A pin that no machine but ours can install, or that a range forbids, breaks every fresh installation."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert not [name for name, version in pins.items() if "+" in version]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    unmet = [str(need) for need in requirements if pins.get(canonicalize_name(need.name), "0") not in need.specifier]
    assert unmet == []


def test_command_of_the_wheel_names_a_function_in_it(wheel: zipfile.ZipFile) -> None:
    (entries,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(entries).decode())
    module, function = scripts["console_scripts"]["orchestrate"].split(":")
    assert f"{module.replace('.', '/')}.py" in wheel.namelist()
    assert callable(getattr(importlib.import_module(module), function))


def test_packages_import_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The unpacked wheel alone reads its own bundled files."""
    wheel.extractall(tmp_path)
    code = (
        "import loda.datasets, orchestrate, search_spaces\n"
        "from importlib import resources\n"
        "for package in (loda, orchestrate, search_spaces):\n"
        "    print(resources.files(package))\n"
        "print(len(loda.datasets.load_dataset('alphabets').class_names))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    environment = {"PATH": "", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    *places, classes = ran.stdout.split()
    assert all(Path(place).is_relative_to(tmp_path) for place in places)
    assert int(classes) > 1
