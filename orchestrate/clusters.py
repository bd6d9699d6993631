"""Cluster files that come with the package, by name."""

from __future__ import annotations

from importlib import resources

from loda.errors import ConfigError

SUFFIXES = (".yaml", ".sbatch")


def bundled_clusters() -> dict[str, str]:
    """File name by name, sorted."""
    files = sorted(entry.name for entry in resources.files("clusters").iterdir() if entry.name.endswith(SUFFIXES))
    return {file.rpartition(".")[0]: file for file in files}


def cluster_text(name: str) -> str:
    """The content of a bundled cluster file.

    Raises:
        ConfigError: no such name.
    """
    files = bundled_clusters()
    if name not in files:
        raise ConfigError(f"no cluster file {name!r}; there are {', '.join(files)}")
    return (resources.files("clusters") / files[name]).read_text(encoding="utf-8")
