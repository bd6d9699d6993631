"""The command line's frame: the application, arguments that commands share, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loda.errors import ConfigError
from orchestrate.redaction import redact

if TYPE_CHECKING:
    from orchestrate.study import Study


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="LoRA studies for continual learning: sweeps over settings and task orders on Ray, Optuna and MLflow.",
)
StudyArgument = Annotated[
    str | None, typer.Argument(help="A study file, or a bundled study's name. Default: alphabets.")
]
NameArgument = Annotated[str | None, typer.Argument(help="A study that was run (its name, file or folder).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else goes to stderr.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Replace a setting: -s training.lr=0.1. May be repeated.", metavar="KEY=VALUE"),
]
NoSharing = Annotated[
    bool,
    typer.Option("--no-sharing", help="Every order of every setting computes all of its own steps; same results."),
]


def load_changed(source: str | None, changes: list[str] | None, no_sharing: bool = False) -> Study:
    """The study that a command names, with its ``--set`` changes and ``--no-sharing``.

    Raises:
        ConfigError: a bad file or change.
    """
    from loda.reading import ReadingError, parse_yaml
    from orchestrate.study import load_study

    study = load_study(source)
    problems, values = [], {}
    for change in changes or []:
        key, equals, text = change.partition("=")
        if not equals or not key:
            problems.append(f"--set {change}: expected KEY=VALUE, for example training.lr=0.1")
            continue
        try:
            values[key] = parse_yaml(text)
        except ReadingError:
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
    typer.echo(redact(json.dumps(values, indent=1, default=str)))
