"""Sources of images: bundled, Parquet, and whatever other packages register under ``loda.datasets``."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from loda.datasets.base import ImageDataset
from loda.datasets.bundled import load_alphabets
from loda.datasets.parquet import load_parquet
from loda.errors import ConfigError

__all__ = ["ImageDataset", "absolute_spec", "dataset_names", "load_dataset", "load_parquet"]

ENTRY_POINTS = "loda.datasets"
_BUILT_IN: dict[str, Callable[..., ImageDataset]] = {"alphabets": load_alphabets, "parquet": load_parquet}
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
        spec: ``alphabets``, ``parquet:PATH``, or ``NAME`` / ``NAME:ARGUMENT`` of a registered source, which is a
            callable of no or one argument that returns an :class:`ImageDataset`.
        verify: read the header of every image (tens of thousands a second): a damaged one is named before any work.

    Raises:
        ConfigError: unknown name, or everything that is wrong with the data.
    """
    name, colon, argument = spec.partition(":")
    if name == "parquet" and not argument:
        raise ConfigError(f"stream.dataset: {spec!r} names no file; write parquet:PATH")
    if name == "alphabets" and colon:
        raise ConfigError(f"stream.dataset: 'alphabets' takes no argument, but got {spec!r}")
    if name in _BUILT_IN:
        dataset = _BUILT_IN[name](argument) if colon else _BUILT_IN[name]()
    else:
        dataset = _call_plug_in(name, [argument] if colon else [])
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"stream.dataset: {name!r} returned {type(dataset).__name__}, expected an ImageDataset")
    if verify:
        dataset.verify()
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
        f"stream.dataset: no dataset {name!r}{reason}{hint}. Known: {', '.join(usable)}. Your own images: parquet:PATH"
    )


def absolute_spec(spec: str) -> str:
    """The spec with the path of a ``parquet:PATH`` made absolute, for workers that run in another directory."""
    name, _, argument = spec.partition(":")
    return f"parquet:{Path(argument).expanduser().absolute()}" if name == "parquet" and argument else spec
