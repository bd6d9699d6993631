"""Sources of images: bundled, Parquet, folders, lists, and what other packages register under ``loda.datasets``."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from loda.datasets.base import ImageDataset
from loda.datasets.bundled import load_alphabets
from loda.datasets.cars import list_cars
from loda.datasets.cifar import load_cifar100
from loda.datasets.files import FileImages, Listing
from loda.datasets.folders import list_classes, list_folder
from loda.datasets.lists import list_domainnet, list_lists
from loda.datasets.parquet import load_parquet
from loda.errors import ConfigError

__all__ = ["ImageDataset", "absolute_spec", "dataset_names", "load_dataset", "load_parquet"]

ENTRY_POINTS = "loda.datasets"
# Sources that find files, and leave opening them for later.
LISTINGS: dict[str, Callable[[str], Listing]] = {
    "folder": list_folder,
    "classes": list_classes,
    "lists": list_lists,
    "domainnet": list_domainnet,
    "cars": list_cars,
}
_BUILT_IN: dict[str, Callable[..., ImageDataset | Listing]] = {
    "alphabets": load_alphabets,
    "parquet": load_parquet,
    "cifar100": load_cifar100,
    **LISTINGS,
}
PATH_SOURCES = tuple(name for name in _BUILT_IN if name != "alphabets")
_log = logging.getLogger(__name__)


def _plug_ins() -> dict[str, metadata.EntryPoint]:
    """Registered sources; a built-in name can't be taken."""
    found = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in _BUILT_IN:
            if not entry.value.startswith("loda.datasets"):
                _log.warning("dataset plug-in %r (%s) skipped: the name is built in", entry.name, entry.value)
        else:
            found[entry.name] = entry
    return found


def dataset_names() -> list[str]:
    """Names that :func:`load_dataset` knows, registered ones included."""
    return sorted({*_BUILT_IN, *_plug_ins()})


def load_dataset(spec: str, verify: bool = True) -> ImageDataset:
    """Images by name.

    Args:
        spec: ``alphabets``, ``parquet:PATH``, ``folder:PATH?test=val`` and the like, or ``NAME`` / ``NAME:ARGUMENT``
            of a registered source, which is a callable of no or one argument that returns an :class:`ImageDataset`.
        verify: read the header of every image (tens of thousands a second): a damaged one is named before any work.

    Raises:
        ConfigError: unknown name, or everything that is wrong with the data.
    """
    name, colon, argument = spec.partition(":")
    if name in PATH_SOURCES and not argument:
        raise ConfigError(f"stream.dataset: {spec!r} names no file; write {name}:PATH")
    if name == "alphabets" and colon:
        raise ConfigError(f"stream.dataset: 'alphabets' takes no argument, but got {spec!r}")
    if name in _BUILT_IN:
        found = _BUILT_IN[name](argument) if colon else _BUILT_IN[name]()
        dataset = dataset_of(found) if isinstance(found, Listing) else found
    else:
        dataset = _call_plug_in(name, [argument] if colon else [])
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"stream.dataset: {name!r} returned {type(dataset).__name__}, expected an ImageDataset")
    if verify:
        dataset.verify()
    return dataset


def dataset_of(listing: Listing) -> ImageDataset:
    """A listing's files as a data set; none of them is read yet.

    Raises:
        ConfigError: what the listing or its labels, names and splits have wrong: all at once.
    """
    problems = [f"dataset {listing.name!r}: {problem}" for problem in listing.problems]
    try:
        dataset = ImageDataset(
            listing.name,
            FileImages(listing.root, listing.files),
            np.asarray(listing.labels, dtype=np.int64),
            listing.class_names,
            np.asarray(listing.split),
            listing.groups,
            listing.files,
            listing.licence,
        )
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return dataset


def _call_plug_in(name: str, arguments: list[str]) -> ImageDataset:
    source = _load_plug_in(name)
    try:
        return source(*arguments)
    except ConfigError:
        raise
    except Exception as error:  # a source that fails is bad input to us
        _log.debug("dataset plug-in %r failed", name, exc_info=True)
        raise ConfigError(
            f"stream.dataset: {name!r} failed with {type(error).__name__}: {error}; called with {arguments}"
        ) from error


def _load_plug_in(name: str) -> Callable[..., ImageDataset]:
    plug_ins = _plug_ins()
    reason = ""
    if name in plug_ins:
        try:
            return plug_ins[name].load()
        except Exception as error:  # other people's code: whatever it raises, it must not take the rest down
            _log.warning("dataset plug-in %r (%s) skipped: %s", name, plug_ins[name].value, error)
            reason = f" (its plug-in {plug_ins[name].value} doesn't load: {type(error).__name__}: {error})"
    usable = sorted({*_BUILT_IN, *plug_ins} - {name})
    close = difflib.get_close_matches(name, usable, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"stream.dataset: no dataset {name!r}{reason}{hint}. Known: {', '.join(usable)}. "
        "Your own images: folder:PATH or parquet:PATH"
    )


def absolute_spec(spec: str) -> str:
    """The spec with the path of a ``parquet:PATH`` or the like made absolute, for workers in another directory."""
    name, _, argument = spec.partition(":")
    if name not in PATH_SOURCES or not argument:
        return spec
    path, mark, options = (argument, "", "") if name == "parquet" else argument.partition("?")
    return f"{name}:{Path(path).expanduser().absolute()}{mark}{options}" if path else spec
