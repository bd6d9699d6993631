"""Commands about clusters."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrate.cli_input import Json, app
from orchestrate.cli_input import print_json as _print


@app.command()
def clusters(
    name: Annotated[str | None, typer.Argument(help="A cluster file to print.")] = None, as_json: Json = False
) -> None:
    """Cluster files that come with the package; with a name, that file itself, to be edited.

    Example: `orchestrate clusters aws > aws.yaml`
    """
    from orchestrate.clusters import bundled_clusters, cluster_text

    if name is not None:
        text = cluster_text(name)
        _print({"name": name, "text": text}) if as_json else typer.echo(text, nl=False)
        return
    files = bundled_clusters()
    _print(files) if as_json else typer.echo("\n".join(files))
