"""Commands that compute no stage: what there is, what came of studies, and whether this machine is fit for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from loda.errors import ConfigError
from orchestrate.cli_input import Json, NameArgument, StudyArgument, app
from orchestrate.cli_input import load_changed as _load
from orchestrate.cli_input import print_json as _print
from orchestrate.cli_input import run_folder as _run_folder


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A study that was run (its name, file or folder).")],
    second: Annotated[str, typer.Argument(help="Another one, on orders of the same tasks.")],
    as_json: Json = False,
) -> None:
    """Compare two finished studies order by order: the first one's (baseline) setting minus those of the second.

    Example: `orchestrate compare alphabets alphabets-sequential`
    """
    from orchestrate import show_robustness
    from orchestrate.compare import compare_studies

    values = compare_studies(_run_folder(first), _run_folder(second))
    _print(values) if as_json else show_robustness.compare(values)


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
    from orchestrate.records import read_record
    from orchestrate.session import read_run_study

    folder = _run_folder(study)
    found = read_run_study(folder)
    files = [file for name in ("summary", "robustness") if (file := folder / f"{name}.json").is_file()]
    if not files:
        command = f"orchestrate resume {found.name}"
        raise ConfigError(f"{found.name} has no result yet: it was interrupted or failed; `{command}` goes on")
    values = read_record(files[0])
    if as_json:
        _print(values)
    else:
        show.result(values)


@app.command()
def report(
    study: NameArgument = None,
    output: Annotated[Path | None, typer.Option(help="Default: report.html in the study's run folder.")] = None,
    as_json: Json = False,
) -> None:
    """One HTML file about a study, finished or not: accuracy, effects of the order, search, time, versions.

    Example: `orchestrate report alphabets`
    """
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
    from orchestrate.processes import serve
    from orchestrate.redaction import expand, redact
    from orchestrate.tracking_uri import tracking_uri, ui_command, ui_environment, ui_url

    store = tracking_uri(uri if uri is None else expand(uri, "--uri"), Path.cwd())
    command = ui_command(store, port)
    experiment = experiment_of(study, uri or store)
    page = ui_url(port, experiment) if experiment else f"http://127.0.0.1:{port}"
    typer.echo(f"{page}\n(Ctrl-C stops the server)", err=True)
    if dry_run:
        hidden = "" if store in command else f"MLFLOW_BACKEND_STORE_URI='{redact(uri or store)}' "
        typer.echo(hidden + " ".join(command))
        return
    raise typer.Exit(serve(command, os.environ | ui_environment(store)))


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
def methods(
    preset: Annotated[str | None, typer.Option(help="the values of this method's paper, as options of run")] = None,
    as_json: Json = False,
) -> None:
    """The methods that studies can use.

    Example: `orchestrate methods --json`, `orchestrate run my-study.yaml $(orchestrate methods --preset inflora)`
    """
    from orchestrate import show
    from orchestrate.catalogue import method_rows, preset_options

    if preset is not None:
        options = preset_options(preset)
        _print(options) if as_json else typer.echo(" ".join(f"-s {path}={value}" for path, value in options.items()))
        return
    values = method_rows()
    _print(values) if as_json else show.methods(values)
