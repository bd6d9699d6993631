"""What commands make of their arguments. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from loda.errors import ConfigError

if TYPE_CHECKING:
    from orchestrate.study import Study


def load_changed(source: str | None, changes: list[str] | None, no_sharing: bool = False) -> Study:
    """The study that a command names, with its ``--set`` changes and ``--no-sharing``.

    Raises:
        ConfigError: a bad file or change.
    """
    import yaml

    from orchestrate.study import load_study

    study = load_study(source)
    problems, values = [], {}
    for change in changes or []:
        key, equals, text = change.partition("=")
        if not equals or not key:
            problems.append(f"--set {change}: expected KEY=VALUE, for example training.lr=0.1")
            continue
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"--set {change}: {text!r} is not a YAML value")
    if problems:
        raise ConfigError(problems)
    if no_sharing:
        values["resources.sharing"] = False
    return study.with_values(values) if values else study


def run_folder(name: str | None) -> Path:
    """The run folder that a name, a study file or a folder stands for."""
    from orchestrate.study import bundled_studies, load_study

    given = Path(name) if name else Path("runs") / "alphabets"
    if given.is_dir() and (given / "study.yaml").is_file():
        return given
    if given.is_file() or name in bundled_studies():
        study = load_study(name)
        return Path(study.resources.runs) / study.name
    return Path("runs") / given.name


def print_json(values: Any) -> None:
    """The one document of ``--json``."""
    typer.echo(json.dumps(values, indent=1, default=str))
