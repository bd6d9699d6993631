"""Stanford Cars (Krause et al. 2013): ``cars:PATH``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loda.datasets.base import shown
from loda.datasets.files import Listing
from loda.datasets.folders import list_folder
from loda.datasets.spec import parse_source
from loda.errors import ConfigError
from loda.reading import ReadingError, check_mat, plain_name

# Where the files are in the archives of its authors, and where torchvision's StanfordCars wants them.
_PLACES = {
    "train": ("devkit/cars_train_annos.mat", "cars_train_annos.mat"),
    "test": ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"),
    "meta": ("devkit/cars_meta.mat", "cars_meta.mat"),
}


def list_cars(argument: str) -> Listing:
    """``PATH``: the archives' own layout (cars_train/, cars_test/, devkit/*.mat), or folders train/CLASS, test/CLASS.

    The labels of the devkit run from 1; here they run from 0, in its order.

    Raises:
        ConfigError: a missing or damaged file: all at once.
    """
    source = parse_source("cars", argument, {})
    root = source.path
    found = {key: next((root / p for p in places if (root / p).is_file()), None) for key, places in _PLACES.items()}
    if not any(found.values()) and (root / "train").is_dir():
        return list_folder(str(root))
    problems = [
        f"stream.dataset: cars: no {_PLACES[key][0]} in {str(root)!r}; it comes with the data set's devkit"
        + (" (the test labels are a separate file)" if key == "test" else "")
        for key, file in found.items()
        if file is None
    ]
    if problems:
        raise ConfigError(problems)
    tables: dict[str, Any] = {}
    for key, file in found.items():
        if file is not None:
            try:
                tables[key] = _mat(file, "class_names" if key == "meta" else "annotations")
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    names = [str(name) for name in tables["meta"]]
    files, labels, splits = [], [], []
    for split in ("train", "test"):
        unknown = []
        for row in tables[split]:
            label = str(row["class"])
            try:
                plain_name(str(row["fname"]))
            except ReadingError as error:
                raise ConfigError(f"stream.dataset: cars: {str(found[split])!r}: {error}") from error
            if not (label.isascii() and label.isdigit() and 1 <= int(label) <= len(names)):
                unknown.append(f"{row['fname']} has {label}")
                continue
            files.append(f"cars_{split}/{row['fname']}")
            labels.append(int(label) - 1)
            splits.append(split)
        if unknown:
            problems.append(
                f"stream.dataset: cars: {str(found[split])!r}: classes must be from 1 to {len(names)}, as many as "
                f"{_PLACES['meta'][0]} names, but {shown(unknown)}"
            )
    if problems:
        raise ConfigError(problems)
    missing = [file for file in files if not (root / file).is_file()]
    wrong = [f"{len(missing)} annotated images aren't in {str(root)!r}: {shown(missing)}"] if missing else []
    return Listing(root.name, root, files, labels, splits, names, problems=wrong)


def _mat(file: Path, variable: str) -> Any:
    """One variable of a MATLAB 5 file, (n,): texts, or records with ``fname`` and ``class``."""
    from scipy.io import loadmat

    try:
        check_mat(file)
        values = loadmat(file, squeeze_me=True, variable_names=[variable])[variable].reshape(-1)
    except Exception as error:  # damaged files raise almost anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"stream.dataset: cars: {str(file)!r} can't be read for {variable!r} ({reason})") from error
    if variable == "annotations" and not {"fname", "class"} <= set(values.dtype.names or ()):
        raise ConfigError(f"stream.dataset: cars: {str(file)!r} has annotations without 'fname' and 'class'")
    return values
