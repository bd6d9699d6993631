"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from loda.errors import ConfigError, StageError
from orchestrate.cli_input import Json, NameArgument, NoSharing, Set, StudyArgument, app
from orchestrate.cli_input import load_changed as _load
from orchestrate.cli_input import print_json as _print
from orchestrate.cli_input import run_folder as _run_folder
from orchestrate.redaction import guard_logs, redact


def _stdout_is_ours() -> contextlib.AbstractContextManager[Any]:
    """While a study runs, what Ray and others print goes to stderr: stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


@app.command()
def sweep(study: StudyArgument = None, set_: Set = None, no_sharing: NoSharing = False, as_json: Json = False) -> None:
    """Search settings over tune orders, then judge the best one on held-out orders and test images.

    Interrupted? The same command goes on.

    Example: `orchestrate sweep`, or `orchestrate sweep my-study.yaml -s search.trials=30`
    """
    from orchestrate import show
    from orchestrate import sweep as sweeping

    with _stdout_is_ours():
        outcome = sweeping.sweep(_load(study, set_, no_sharing), quiet=False)
    _print(outcome.values) if as_json else show.sweep(outcome.values)


@app.command()
def run(
    study: StudyArgument = None,
    set_: Set = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    no_sharing: NoSharing = False,
    as_json: Json = False,
) -> None:
    """Run one setting over its evaluation orders; no search.

    Example: `orchestrate run my-study.yaml --local -s method.name=sequential`
    """
    from orchestrate import show
    from orchestrate import sweep as sweeping

    with _stdout_is_ours():
        outcome = sweeping.run_study(_load(study, set_, no_sharing), local=local)
    _print(outcome.values) if as_json else show.run(outcome.values)


@app.command()
def plan(
    study: StudyArgument = None,
    set_: Set = None,
    no_sharing: NoSharing = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Try two stages with one epoch here, and expect hours by them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a sweep would compute: stages asked for, distinct, stored, to run; share saved, hours, bytes, and a tree.

    Example: `orchestrate plan my-study.yaml`
    """
    from orchestrate import show
    from orchestrate.plan import make_plan

    loaded = _load(study, set_, no_sharing)
    if measure:
        with Console(stderr=True).status("trying two stages with one epoch; nothing is stored"):
            values = make_plan(loaded, measure=True)
    else:
        values = make_plan(loaded)
    _print(values) if as_json else show.plan(values)


@app.command()
def resume(study: NameArgument = None, as_json: Json = False) -> None:
    """Go on with a study where it stopped, from the settings in its run folder.

    Example: `orchestrate resume alphabets`
    """
    from orchestrate import show
    from orchestrate import sweep as sweeping
    from orchestrate.session import read_command, read_run_study

    folder = _run_folder(study)
    found = read_run_study(folder)
    command = read_command(folder)
    with _stdout_is_ours():
        if command == "robustness":
            from orchestrate.robustness.running import run_robustness

            outcome = run_robustness(found)
        else:
            outcome = sweeping.sweep(found) if command == "sweep" else sweeping.run_study(found)
    _print(outcome.values) if as_json else show.result(outcome.values)


@app.command()
def robustness(
    study: StudyArgument = None,
    set_: Set = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    no_sharing: NoSharing = False,
    stored: Annotated[bool, typer.Option("--stored", help="Compute nothing; report what is in the store.")] = False,
    as_json: Json = False,
) -> None:
    """Run the study's variants over all its evaluation orders, and say how far results depend on the order.

    Interrupted? The same command goes on.

    Example: `orchestrate robustness my-study.yaml`
    """
    from orchestrate import show_robustness
    from orchestrate.robustness.running import run_robustness

    with _stdout_is_ours():
        outcome = run_robustness(_load(study, set_, no_sharing), local=local, stored=stored)
    _print(outcome.values) if as_json else show_robustness.robustness(outcome.values)


# Last, so that help lists these commands after those above.
from orchestrate import cli_data, cli_launch, cli_results  # noqa: E402

# Importing them registers their commands; `orchestrate` calls main.
__all__ = ["app", "cli_data", "cli_launch", "cli_results", "main"]


def main() -> None:
    """Entry point: bad input ends with exit code 2 and no traceback, a failed study with 1, Ctrl-C with 130."""
    guard_logs()
    errors = Console(stderr=True)
    words = [word for word in sys.argv[1:] if word != "--json"]
    again = redact(" ".join(["orchestrate", *words]))
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
    return redact(text).replace("[", r"\[")


if __name__ == "__main__":
    main()
