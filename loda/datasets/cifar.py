"""CIFAR-100 (Krizhevsky 2009) from the "python version" of its authors: ``cifar100:PATH``."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from loda.datasets.base import SPLITS, ImageDataset
from loda.datasets.plain_pickle import read_plain_pickle
from loda.datasets.spec import parse_source
from loda.errors import ConfigError
from loda.reading import ReadingError, open_tar, read_bytes

FOLDER = "cifar-100-python"
MEMBERS = (*SPLITS, "meta")
SIDE = 32
_MOST_BYTES = 2**29  # of one file: the published training batch has 155 MB
_MOST_UNPACKED = 2**30  # of all
# A raw picture that Pillow opens: the bytes depend on no compressor's version, so neither does the digest.
_HEADER = f"P6 {SIDE} {SIDE} 255\n".encode()


def load_cifar100(argument: str) -> ImageDataset:
    """``PATH[?groups=coarse]``: the folder ``cifar-100-python`` (or one that holds it) or its ``.tar.gz``.

    Labels are the fine ones, 0 to 99, as numbered there. ``groups=coarse`` makes the 20 super-classes natural tasks.
    The batches are pickles; they are read, never unpickled (:mod:`loda.datasets.plain_pickle`).

    Raises:
        ConfigError: options, missing, damaged or refused files.
    """
    source = parse_source("cifar100", argument, {"groups": "coarse"})
    groups = source.text("groups", "none")
    if groups not in ("none", "coarse"):
        raise ConfigError(f"stream.dataset: cifar100: groups={groups}: expected coarse")
    members = _members(source.path)
    problems: list[str] = []
    parts: dict[str, dict[str, Any]] = {}
    for member in MEMBERS:
        try:
            parts[member] = read_plain_pickle(members[member], f"stream.dataset: cifar100: {FOLDER}/{member}")
            del members[member]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    names = _texts(parts["meta"].get("fine_label_names"))
    images: list[bytes] = []
    labels: list[int] = []
    coarse: list[int] = []
    for split in SPLITS:
        pixels, fine, super_labels = _batch(parts[split], split)
        images += [_HEADER + image.tobytes() for image in pixels]
        labels += fine
        coarse += super_labels
    if len(names) <= max(labels):
        raise ConfigError(f"stream.dataset: cifar100: {FOLDER}/meta has no name for each label ('fine_label_names')")
    return ImageDataset(
        "cifar100",
        images,
        np.asarray(labels),
        names,
        np.repeat(SPLITS, [len(parts[split]["fine_labels"]) for split in SPLITS]),
        _group_names(parts["meta"], labels, coarse) if groups == "coarse" else None,
    )


def _members(path: Path) -> dict[str, bytes]:
    """The content of the three files."""
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        missing = [name for name in MEMBERS if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"stream.dataset: cifar100: no {' and no '.join(missing)} in {str(folder)!r}; expected the files "
                f"{', '.join(MEMBERS)} of the folder {FOLDER} (the 'python version' of CIFAR-100)"
            )
        try:
            return {name: read_bytes(folder / name, _MOST_BYTES) for name in MEMBERS}
        except (OSError, ReadingError) as error:
            raise ConfigError(f"stream.dataset: cifar100: {str(folder)!r}: a file can't be read ({error})") from error
    found = {}
    try:
        with open_tar(path, _MOST_UNPACKED) as archive:
            for name in MEMBERS:
                entry = archive.getmember(f"{FOLDER}/{name}")
                file = archive.extractfile(entry) if entry.isfile() and entry.size <= _MOST_BYTES else None
                if file is None:
                    raise KeyError(f"{FOLDER}/{name} is no plain file of a fitting size")
                found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise ConfigError(
            f"stream.dataset: cifar100: {str(path)!r} can't be read as the archive of {FOLDER} "
            f"({str(error.args[0]) if error.args else error}); get it again, or give the unpacked folder"
        ) from error
    return found


def _batch(values: dict[str, Any], split: str) -> tuple[np.ndarray, list[int], list[int]]:
    """Images (n, 32, 32, 3) uint8, fine labels (n,) and coarse labels (n,) of one file."""
    where = f"stream.dataset: cifar100: {FOLDER}/{split}"
    data, fine, coarse = (values.get(key) for key in ("data", "fine_labels", "coarse_labels"))
    if not (isinstance(data, np.ndarray) and data.ndim == 2 and data.shape[1] == 3 * SIDE**2 and len(data)):
        raise ConfigError(f"{where}: 'data' must be an array of bytes, (n, {3 * SIDE**2})")
    for key, labels in (("fine_labels", fine), ("coarse_labels", coarse)):
        if not (isinstance(labels, list) and len(labels) == len(data) and all(type(v) is int for v in labels)):
            raise ConfigError(f"{where}: {key!r} must be a list of {len(data)} whole numbers")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), list(fine or []), list(coarse or [])


def _texts(values: Any) -> list[str]:
    """The values if they are a list of texts, else nothing."""
    return list(values) if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def _group_names(meta: dict[str, Any], labels: list[int], coarse: list[int]) -> list[str]:
    names = _texts(meta.get("coarse_label_names"))
    of_class = dict(zip(labels, coarse))
    if any(of_class[label] != group or not 0 <= group < len(names) for label, group in zip(labels, coarse)):
        raise ConfigError("stream.dataset: cifar100: the super-classes don't fit the classes; leave groups out")
    return [names[of_class[label]] for label in sorted(of_class)]
