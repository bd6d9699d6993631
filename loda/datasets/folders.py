"""One folder a class: ``folder:PATH`` (with folders for the splits) and ``classes:PATH`` (without)."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from loda.datasets.files import Listing, class_folders, image_files
from loda.datasets.spec import parse_source
from loda.errors import ConfigError

TEST_FOLDERS = ("test", "val")


def list_folder(argument: str) -> Listing:
    """``PATH[?train=NAME&test=NAME]``: PATH/train/CLASS/... and PATH/test/CLASS/... (or ``val``), the layout of PILOT.

    Classes are numbered by their sorted names, as torchvision's ImageFolder does.

    Raises:
        ConfigError: options, a missing folder, or no classes: all at once.
    """
    source = parse_source("folder", argument, {"train": "train", "test": "test"})
    test = source.options.get("test") or next((n for n in TEST_FOLDERS if (source.path / n).is_dir()), TEST_FOLDERS[0])
    places = {"train": source.text("train", "train"), "test": test}
    problems = [
        f"stream.dataset: folder: no folder {str(source.path / place)!r} for {split} images; expected "
        f"{place}/CLASS/image.jpg there. Another name: ?{split}=NAME; no split folders: classes:{source.path}"
        for split, place in places.items()
        if not (source.path / place).is_dir()
    ]
    if not problems and (source.path / places["train"]).samefile(source.path / places["test"]):
        problems.append(f"stream.dataset: folder: train and test images are both from {places['train']!r}")
    if problems:
        raise ConfigError(problems)
    classes = {split: class_folders(source.path / place, "folder") for split, place in places.items()}
    names = sorted({*classes["train"], *classes["test"]})
    ignored: Counter[str] = Counter()
    files, labels, splits = [], [], []
    for split, place in places.items():
        for name in classes[split]:
            found = image_files(source.path / place / name, ignored)
            files += [f"{place}/{name}/{file}" for file in found]
            labels += [names.index(name)] * len(found)
            splits += [split] * len(found)
    return Listing(source.path.name, source.path, files, labels, splits, names, ignored=ignored)


def list_classes(argument: str) -> Listing:
    """``PATH[?test=0.2&seed=0]``: PATH/CLASS/...; a share of each class's images is drawn for the test.

    The draw of a class is seeded by ``seed`` and the class's name: other classes don't change it. A class with 2 images
    or more gives at least 1 and keeps at least 1.

    Raises:
        ConfigError: options, a missing folder, or no classes: all at once.
    """
    source = parse_source("classes", argument, {"test": "0.2", "seed": "0"})
    share, seed = source.share("test", 0.2), source.seed("seed", 0)
    names = class_folders(source.path, "classes")
    ignored: Counter[str] = Counter(Path(f.name).suffix.lower() or f.name for f in source.path.iterdir() if f.is_file())
    files, labels, splits = [], [], []
    for label, name in enumerate(names):
        found = image_files(source.path / name, ignored)
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
        splits += drawn_split(name, len(found), share, seed)
    return Listing(source.path.name, source.path, files, labels, splits, names, ignored=ignored)


def drawn_split(name: str, images: int, share: float, seed: int) -> list[str]:
    """The split of each image of a class, (images,): ``round(share * images)`` of them are "test"."""
    test = min(max(round(share * images), 1), images - 1) if images > 1 else 0
    text = f"classes split\x1f{seed}\x1f{name}"
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))
    drawn = set(generator.permutation(images)[:test].tolist())
    return ["test" if number in drawn else "train" for number in range(images)]
