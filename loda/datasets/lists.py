"""Images named by lists of ``path label`` lines: ``lists:PATH`` and ``domainnet:PATH``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from loda.datasets.base import SPLITS, shown
from loda.datasets.files import Listing
from loda.datasets.spec import Source, parse_source
from loda.errors import ConfigError
from loda.reading import ReadingError, read_bytes

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
Line = tuple[str, int]
_MOST_BYTES = 2**28  # of a list: three million lines


def list_lists(argument: str) -> Listing:
    """``PATH?train=a.txt&test=b.txt[&classes=FILE]``: lines ``path label``, paths from PATH, labels from 0.

    Raises:
        ConfigError: options, missing files, bad lines: all at once.
    """
    source = parse_source("lists", argument, {"train": "train.txt", "test": "test.txt", "classes": "classes.txt"})
    lines: dict[str, list[Line]] = {}
    problems = []
    for split in SPLITS:
        file = source.path / source.text(split, f"{split}.txt")
        found, wrong = _read_list(file, f"name it by ?{split}=FILE")
        lines[split] = found
        problems += [f"stream.dataset: lists: {problem}" for problem in wrong]
    if problems:
        raise ConfigError(problems)
    return _listing(source, lines)


def list_domainnet(argument: str) -> Listing:
    """``PATH[?domains=real,sketch&classes=FILE]``: DomainNet's ``<domain>_train.txt``, ``<domain>_test.txt``.

    Images of all domains (or of those named) are put together by class: class-incremental, not domain-incremental.
    ``classes`` names a file with one class name or label a line: those only, renumbered in its order.

    Raises:
        ConfigError: options, missing files, bad lines: all at once.
    """
    source = parse_source("domainnet", argument, {"domains": "real,sketch", "classes": "classes.txt"})
    domains = [name.strip() for name in source.text("domains", ",".join(DOMAINS)).split(",")]
    unknown = [name for name in domains if name not in DOMAINS]
    problems = [f"stream.dataset: domainnet: no domain {name!r}; domains: {', '.join(DOMAINS)}" for name in unknown]
    if len(set(domains)) < len(domains):
        problems.append(f"stream.dataset: domainnet: domains={','.join(domains)} names one twice")
    lines: dict[str, list[Line]] = {split: [] for split in SPLITS}
    for domain in sorted({*domains} - {*unknown}):
        for split in SPLITS:
            found, wrong = _read_list(source.path / f"{domain}_{split}.txt", "leave its domain out by ?domains=")
            lines[split] += found
            problems += [f"stream.dataset: domainnet: {problem}" for problem in wrong]
    if problems:
        raise ConfigError(problems)
    return _listing(source, lines)


def _read_list(file: Path, remedy: str) -> tuple[list[Line], list[str]]:
    """Its lines as (path, label), and what is wrong with them."""
    try:
        text = read_bytes(file, _MOST_BYTES).decode()
    except FileNotFoundError:
        return [], [f"no list {str(file)!r}; put it there, or {remedy}"]
    except (OSError, ReadingError, UnicodeDecodeError) as error:
        return [], [f"{str(file)!r} can't be read as text ({error})"]
    found, wrong = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        path, label = ("", *line.rsplit(maxsplit=1))[-2:]
        inside = not PurePosixPath(path.strip()).is_absolute() and ".." not in PurePosixPath(path).parts
        if path.strip() and inside and label.isascii() and label.isdigit():
            found.append((str(PurePosixPath(path.strip())), int(label)))
        else:
            wrong.append(f"line {number} {line.strip()[:80]!r}")
    problems = []
    if wrong:
        problems.append(
            f"{str(file)!r}: expected 'path/from/the/root.jpg label' with a label from 0, but {shown(wrong)}"
        )
    elif not found:
        problems.append(f"{str(file)!r} names no image")
    return found, problems


def _listing(source: Source, lines: dict[str, list[Line]]) -> Listing:
    names = _class_names([line for split in SPLITS for line in lines[split]])
    chosen = _chosen(source, names)
    number = {label: position for position, label in enumerate(chosen)}
    rows = [(path, number[label], split) for split in SPLITS for path, label in lines[split] if label in number]
    missing = [path for path, _, _ in rows if not (source.path / path).is_file()]
    problems = []
    if missing:
        problems.append(f"{len(missing)} files of the lists aren't in {str(source.path)!r}: {shown(missing)}")
    twice = [path for path, count in Counter(path for path, _, _ in rows).items() if count > 1]
    if twice:
        problems.append(f"{len(twice)} files are named more than once: {shown(twice)}")
    return Listing(
        source.path.name,
        source.path,
        files=[path for path, _, _ in rows],
        labels=[label for _, label, _ in rows],
        split=[split for _, _, split in rows],
        class_names=[names[label] for label in chosen],
        problems=problems,
    )


def _class_names(lines: list[Line]) -> dict[int, str]:
    """Label to name, by label: the images' folder, where all images of a label share its name; else its number."""
    folders: dict[int, set[str]] = {}
    for path, label in lines:
        folders.setdefault(label, set()).add(PurePosixPath(path).parent.name)
    return {
        label: next(iter(folders[label])) if len(folders[label]) == 1 and folders[label] != {""} else f"class {label}"
        for label in sorted(folders)
    }


def _chosen(source: Source, names: dict[int, str]) -> list[int]:
    """The labels to keep, in their new order."""
    file = source.file("classes")
    if file is None:
        return list(names)
    by_name = {name: label for label, name in names.items()}
    try:
        text = read_bytes(file, _MOST_BYTES).decode()
    except (OSError, ReadingError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"stream.dataset: {source.name}: classes={file.name}: not readable as text ({error})"
        ) from error
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    found = [by_name.get(text, int(text) if text.isascii() and text.isdigit() else -1) for text in wanted]
    unknown = [text for text, label in zip(wanted, found) if label not in names]
    problems = []
    if unknown:
        problems.append(f"stream.dataset: {source.name}: classes={file.name}: not in the lists: {shown(unknown)}")
    if len(set(found)) < len(found) and not unknown:
        problems.append(f"stream.dataset: {source.name}: classes={file.name} names a class twice")
    if not wanted:
        problems.append(f"stream.dataset: {source.name}: classes={file.name} is empty; expected a class a line")
    if problems:
        raise ConfigError(problems)
    return found
