"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loda.errors import ConfigError, StageError

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


def _load(source: str | None, changes: list[str] | None) -> Any:
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
    return study.with_values(values) if values else study


def _run_folder(name: str | None) -> Path:
    """The run folder that a name, a study file or a folder stands for."""
    from orchestrate.study import bundled_studies, load_study

    given = Path(name) if name else Path("runs") / "alphabets"
    if given.is_dir() and (given / "study.yaml").is_file():
        return given
    if given.is_file() or name in bundled_studies():
        study = load_study(name)
        return Path(study.resources.runs) / study.name
    return Path("runs") / given.name


def _stdout_is_ours() -> contextlib.AbstractContextManager[Any]:
    """While a study runs, what Ray and others print goes to stderr: stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


def _print(values: Any) -> None:
    typer.echo(json.dumps(values, indent=1, default=str))


@app.command()
def sweep(study: StudyArgument = None, set_: Set = None, as_json: Json = False) -> None:
    """Search settings over tune orders, then judge the best one on held-out orders and test images.

    Interrupted? The same command goes on.

    Example: `orchestrate sweep`, or `orchestrate sweep my-study.yaml -s search.trials=30`
    """
    from orchestrate import show
    from orchestrate import sweep as sweeping

    with _stdout_is_ours():
        outcome = sweeping.sweep(_load(study, set_), quiet=False)
    _print(outcome.values) if as_json else show.sweep(outcome.values)


@app.command()
def run(
    study: StudyArgument = None,
    set_: Set = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    as_json: Json = False,
) -> None:
    """Run one setting over its evaluation orders; no search.

    Example: `orchestrate run my-study.yaml --local -s method.name=sequential`
    """
    from orchestrate import show
    from orchestrate import sweep as sweeping

    with _stdout_is_ours():
        outcome = sweeping.run_study(_load(study, set_), local=local)
    _print(outcome.values) if as_json else show.run(outcome.values)


@app.command()
def plan(study: StudyArgument = None, set_: Set = None, as_json: Json = False) -> None:
    """What a sweep would compute: stages asked for, distinct, stored, to run, and how long that takes.

    Example: `orchestrate plan my-study.yaml`
    """
    from orchestrate import show
    from orchestrate.plan import make_plan

    values = make_plan(_load(study, set_))
    _print(values) if as_json else show.plan(values)


@app.command()
def resume(study: NameArgument = None, as_json: Json = False) -> None:
    """Go on with a study where it stopped, from the settings in its run folder.

    Example: `orchestrate resume alphabets`
    """
    from orchestrate import show
    from orchestrate import sweep as sweeping
    from orchestrate.session import read_run_study

    folder = _run_folder(study)
    found = read_run_study(folder)
    searched = (folder / "optuna.db").is_file()
    with _stdout_is_ours():
        outcome = sweeping.sweep(found) if searched else sweeping.run_study(found)
    if as_json:
        _print(outcome.values)
    else:
        show.sweep(outcome.values) if searched else show.run(outcome.values)


@app.command("list")
def list_(
    runs: Annotated[str, typer.Option(help="The folder of runs.")] = "runs",
    as_json: Json = False,
) -> None:
    """Bundled studies and search spaces, methods, and the studies that were run.

    Example: `orchestrate list`
    """
    from orchestrate import show
    from orchestrate.catalogue import catalogue

    values = catalogue(Path(runs))
    _print(values) if as_json else show.catalogue(values)


@app.command("show")
def show_(study: NameArgument = None, as_json: Json = False) -> None:
    """The result of a study that was run.

    Example: `orchestrate show alphabets`
    """
    from orchestrate import show
    from orchestrate.session import read_run_study

    folder = _run_folder(study)
    found = read_run_study(folder)
    file = folder / "summary.json"
    if not file.is_file():
        command = f"orchestrate resume {found.name}"
        raise ConfigError(f"{found.name} has no result yet: it was interrupted or failed; `{command}` goes on")
    values = json.loads(file.read_bytes())
    if as_json:
        _print(values)
    else:
        show.sweep(values) if "best" in values else show.run(values)


@app.command()
def report(
    study: NameArgument = None,
    output: Annotated[Path | None, typer.Option(help="Default: report.html in the study's run folder.")] = None,
    as_json: Json = False,
) -> None:
    """One HTML file about a study, finished or not; for example `orchestrate report alphabets`."""
    from orchestrate.report import make_report

    values = make_report(_run_folder(study), output)
    _print(values) if as_json else typer.echo(values["report"])


@app.command()
def export(
    study: Annotated[str, typer.Argument(help="A study that was run.")],
    directory: Annotated[Path, typer.Argument(help="Where model.safetensors and config.json go.")],
    order: Annotated[str | None, typer.Option(help="Which evaluation order's model; default: the first.")] = None,
    as_json: Json = False,
) -> None:
    """Write the chosen setting's merged model: plain timm loads it, with class names, and no code of ours.

    Example: `orchestrate export alphabets model/`, then `timm.create_model("local-dir:model", pretrained=True)`
    """
    from orchestrate.catalogue import export_study

    config = export_study(_run_folder(study), directory, order)
    if as_json:
        _print({"directory": str(directory), "config": config})
    else:
        typer.echo(f'{directory}: timm.create_model("local-dir:{directory}", pretrained=True)')


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
    study: Annotated[str | None, typer.Option(help="Open this study's page; default: the newest.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow's store; default: mlflow.db here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and the page, start nothing.")] = False,
) -> None:
    """Serve the MLflow pages on 127.0.0.1.

    Example: `orchestrate ui --port 5001`
    """
    from orchestrate.catalogue import experiment_of
    from orchestrate.tracking_uri import tracking_uri, ui_command, ui_environment, ui_url

    store = tracking_uri(uri, Path.cwd())
    command = ui_command(store, port)
    experiment = experiment_of(study, store)
    page = ui_url(port, experiment) if experiment else f"http://127.0.0.1:{port}"
    typer.echo(f"{page}\n(Ctrl-C stops the server)", err=True)
    if dry_run:
        typer.echo(" ".join(command))
        return
    raise typer.Exit(subprocess.run(command, env=os.environ | ui_environment(), check=False).returncode)


@app.command()
def doctor(study: StudyArgument = None, as_json: Json = False) -> None:
    """Check this machine and a study: versions, cores, memory, GPU, store, MLflow, backbone and data.

    Example: `orchestrate doctor my-study.yaml`
    """
    from orchestrate import show
    from orchestrate.doctor import examine

    values = examine(_load(study, None))
    _print(values) if as_json else show.doctor(values)
    if any(not check["ok"] for check in values["checks"]):
        raise typer.Exit(2)


@app.command()
def methods(as_json: Json = False) -> None:
    """The methods that studies can use.

    Example: `orchestrate methods --json`
    """
    from orchestrate import show
    from orchestrate.catalogue import method_rows

    values = method_rows()
    _print(values) if as_json else show.methods(values)


def main() -> None:
    """Entry point: bad input ends with exit code 2 and no traceback, a failed study with 1, Ctrl-C with 130."""
    errors = Console(stderr=True)
    words = [word for word in sys.argv[1:] if word != "--json"]
    again = " ".join(["orchestrate", *words])
    try:
        app()
    except ConfigError as error:
        for problem in error.problems:
            errors.print(f"[red]error:[/red] {_escaped(problem)}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except StageError as error:
        errors.print(f"[red]failed:[/red] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        errors.print(f"Finished stages are kept; go on with: {again}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == 130:  # typer has made this of the KeyboardInterrupt
            errors.print(f"\nStopped. Finished stages are kept; go on with: {again}", highlight=False, soft_wrap=True)
        raise


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
