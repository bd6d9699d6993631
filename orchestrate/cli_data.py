"""``orchestrate data``: a look at images before a study uses them."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrate.cli_input import Json, app
from orchestrate.cli_input import print_json as _print

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data", help="Look at a data set before a study uses it.")


@data_app.callback()
def _data() -> None:
    """Look at a data set before a study uses it."""


@data_app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="A folder or file of images, or NAME:PATH as in a study.")],
    quick: Annotated[bool, typer.Option("--quick", help="Read headers only, don't decode the pixels.")] = False,
    as_json: Json = False,
) -> None:
    """Find the layout of a data set, count it, name what is wrong with it, and print its line for a study.

    Exit code 1 if something is wrong with the data, 2 if they can't be read as a data set.

    Example: `orchestrate data check ~/data/imagenet-r`
    """
    from loda.datasets.inspection import inspect
    from orchestrate import show_data

    with show_data.reading() as progress:
        values = inspect(dataset, pixels=not quick, progress=progress)
    _print(values) if as_json else show_data.check(values)
    if values["wrong"]:
        raise typer.Exit(1)
