"""A look at a data set before a study uses it: which layout it has, what is in it, and what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loda.datasets import LISTINGS, PATH_SOURCES, absolute_spec, dataset_names, load_dataset
from loda.datasets.base import SPLITS
from loda.datasets.cifar import FOLDER as CIFAR_FOLDER
from loda.datasets.cifar import MEMBERS as CIFAR_FILES
from loda.datasets.files import FileImages, Scanned, scan
from loda.datasets.folders import TEST_FOLDERS
from loda.datasets.lists import DOMAINS
from loda.errors import ConfigError

# Training and test images of the splits that published tables use; a set is known by the name of its folder.
KNOWN: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "ImageNet-R": (("imagenetr",), 24000, 6000),
    "ImageNet-A": (("imageneta",), 5981, 1519),
    "CUB-200": (("cub", "cub200", "cub2002011"), 9430, 2358),
    "CIFAR-100": (("cifar100", "cifar100python", "cifar100pythontargz"), 50000, 10000),
}


def detect(given: str) -> str:
    """The ``NAME:PATH`` of what lies at a path; a ``NAME:PATH`` or a known name is left as it is.

    Raises:
        ConfigError: nothing there, or no layout that is known.
    """
    path = Path(given).expanduser()
    name = given.partition(":")[0]
    if not path.exists():
        if name in dataset_names():
            return given
        raise ConfigError(
            f"{given!r}: nothing there; give the folder or file of a data set, or one of "
            f"{', '.join(f'{name}:PATH' for name in PATH_SOURCES)}"
        )
    if path.is_file():
        if path.suffix == ".parquet":
            return f"parquet:{given}"
        if path.name.endswith((".tar.gz", ".tgz")):
            return f"cifar100:{given}"
        raise ConfigError(f"{given!r}: a file, but neither Parquet nor an archive of {CIFAR_FOLDER}; unpack archives")
    if (path / CIFAR_FOLDER).is_dir() or all((path / name).is_file() for name in CIFAR_FILES):
        return f"cifar100:{given}"
    listed = [domain for domain in DOMAINS if (path / f"{domain}_train.txt").is_file()]
    if listed:
        return f"domainnet:{given}" + ("" if len(listed) == len(DOMAINS) else f"?domains={','.join(listed)}")
    if any(path.glob("devkit/*.mat")) or any(path.glob("cars_*.mat")):
        return f"cars:{given}"
    if all((path / f"{split}.txt").is_file() for split in SPLITS):
        return f"lists:{given}"
    if (path / "train").is_dir() or any((path / name).is_dir() for name in TEST_FOLDERS):
        return f"folder:{given}"
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
        return f"classes:{given}"
    raise ConfigError(
        f"{given!r}: no layout that is known. Expected folders train/CLASS and test/CLASS (or val/CLASS), a folder for "
        f"each class, lists train.txt and test.txt, DomainNet's lists, {CIFAR_FOLDER}, or the devkit of Stanford Cars"
    )


def inspect(given: str, pixels: bool = True, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Everything about a data set that is worth knowing before a study.

    Args:
        given: a path or ``NAME:PATH``.
        pixels: decode every image; otherwise only headers (and checksums) are read.
        progress: told after each image how many have been read, and of how many.

    Returns:
        ``dataset``: for a study; ``layout``; ``classes``; ``images``: a split; ``smallest``, ``largest``: class and
        training images; ``widths``, ``heights``: least, median, most; ``modes``: Pillow's, counted; ``known``: the
        published set with this name, its split sizes, and whether they are the same, or None; ``ignored``: files that
        are no images, by suffix; ``wrong``: ``what``, ``count`` and
        ``items`` for each kind of problem.

    Raises:
        ConfigError: it can't be read as a data set at all.
    """
    spec = detect(given)
    name, _, argument = spec.partition(":")
    wrong: list[dict[str, Any]] = []
    ignored: Counter[str] = Counter()
    if name in LISTINGS:
        listing = LISTINGS[name](argument)
        ignored = listing.ignored
        wrong += [{"what": problem, "count": 1, "items": []} for problem in listing.problems]
        labels, split, names = (
            np.asarray(listing.labels, dtype=np.int64),
            np.asarray(listing.split),
            listing.class_names,
        )
        places: Sequence[str] = listing.files
        read = FileImages(listing.root, listing.files).__getitem__
    else:
        dataset = load_dataset(spec, verify=False)
        labels, split, names = dataset.labels, dataset.split, dataset.class_names
        places = [dataset.describe(row) for row in range(len(dataset))]
        read = dataset.encoded
    total = len(labels)
    scanned = scan(read, total, pixels, progress and (lambda count: progress(count, total)))
    counts = {part: np.bincount(labels[split == part], minlength=len(names)) for part in SPLITS}
    wrong += _class_problems(counts, names) + _image_problems(scanned, split, places)
    images = {part: int(counts[part].sum()) for part in SPLITS}
    sizes = [image.size for image in scanned if image.size]
    return {
        "dataset": absolute_spec(spec),
        "layout": name,
        "classes": len(names),
        "images": images,
        **_extremes(counts["train"], names),
        "widths": _spread([width for width, _ in sizes]),
        "heights": _spread([height for _, height in sizes]),
        "modes": dict(Counter(image.mode for image in scanned if image.mode).most_common()),
        "known": _known(argument, images),
        "ignored": dict(ignored.most_common()),
        "wrong": wrong,
    }


def _class_problems(counts: Mapping[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    train, test = counts["train"] > 0, counts["test"] > 0
    kinds = {
        "classes without any image": ~train & ~test,
        "classes with training images only": train & ~test,
        "classes with test images only": ~train & test,
    }
    return [_kind(what, [names[i] for i in np.flatnonzero(hit).tolist()]) for what, hit in kinds.items() if hit.any()]


def _image_problems(scanned: Sequence[Scanned], split: np.ndarray, places: Sequence[str]) -> list[dict[str, Any]]:
    damaged = [f"{places[row]} ({image.problem})" for row, image in enumerate(scanned) if image.problem]
    rows: dict[bytes, dict[str, int]] = defaultdict(dict)
    for row, image in enumerate(scanned):
        if not image.problem:
            rows[image.sha256].setdefault(str(split[row]), row)
    both = [f"{places[found['train']]} = {places[found['test']]}" for found in rows.values() if len(found) == 2]
    problems = []
    if damaged:
        problems.append(_kind("images that can't be decoded", damaged))
    if both:
        problems.append(_kind("images that are in train and in test, byte for byte", both))
    return problems


def _kind(what: str, items: list[str]) -> dict[str, Any]:
    return {"what": what, "count": len(items), "items": items}


def _extremes(train: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    return {
        key: {"class": names[row], "train": int(train[row])}
        for key, row in (("smallest", int(train.argmin())), ("largest", int(train.argmax())))
    }


def _spread(values: Sequence[int]) -> list[int] | None:
    """Least, median (the lower of two) and most."""
    ordered = sorted(values)
    return [ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]] if ordered else None


def _known(argument: str, images: Mapping[str, int]) -> dict[str, Any] | None:
    """The published split of the set that is named like the folder or file, or has just these sizes."""
    base = Path(argument.partition("?")[0]).expanduser().absolute().name
    plain = "".join(c for c in base.lower() if c.isalnum())
    for name, (aliases, train, test) in KNOWN.items():
        same = images == {"train": train, "test": test}
        if plain in aliases or same:
            return {"name": name, "train": train, "test": test, "same": same}
    return None
