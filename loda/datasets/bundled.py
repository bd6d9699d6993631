"""The alphabets that come with the package: part of Omniglot's evaluation set (Lake et al. 2015, MIT licence)."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources

from loda.datasets.base import ImageDataset
from loda.datasets.parquet import load_parquet


def load_alphabets() -> ImageDataset:
    """Characters of several alphabets: a character is a class, an alphabet a task; dark ink on white, 105 x 105."""
    with resources.as_file(resources.files("loda") / "bundled" / "alphabets.parquet") as path:
        dataset = load_parquet(path, task_column="task", name="alphabets")
    return replace(dataset, licence="MIT, (c) 2015 Brenden Lake")
