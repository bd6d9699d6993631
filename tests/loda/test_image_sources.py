"""Images from folders, lists and archives, as the published sets are distributed; built from the bundled drawings."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from loda.datasets import absolute_spec, load_dataset
from loda.datasets.inspection import inspect
from loda.datasets.plain_pickle import read_plain_pickle
from loda.errors import ConfigError

CLASSES = ("bird", "cat", "dog")
Write = Callable[[Path, int], None]


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def layout(root: Path, test: str = "test") -> Path:
    """Three classes, three training images and two test images each."""
    seed = 0
    for split, count in (("train", 3), (test, 2)):
        for name in CLASSES:
            for index in range(count):
                picture(root / split / name / f"{name}-{index}.png", seed)
                seed += 1
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_a_class_as_published_tool_boxes_have_it(test: str, tmp_path: Path) -> None:
    dataset = load_dataset(f"folder:{layout(tmp_path / 'birds', test)}")
    assert dataset.class_names == list(CLASSES)
    assert [int((dataset.split == split).sum()) for split in ("train", "test")] == [9, 6]
    first = int(np.flatnonzero((dataset.labels == 1) & (dataset.split == "train"))[0])
    with Image.open(tmp_path / "birds/train/cat/cat-0.png") as image:
        expected = np.asarray(image.crop((2, 0, 22, 20)))
    assert np.array_equal(dataset.decode([first], 20)[0].permute(1, 2, 0).numpy(), expected)


def test_the_digest_is_of_the_images_and_not_of_their_place(tmp_path: Path) -> None:
    one = load_dataset(f"folder:{layout(tmp_path / 'here')}").digest
    assert load_dataset(f"folder:{layout(tmp_path / 'there')}").digest == one
    picture(tmp_path / "there/train/cat/cat-0.png", 99)
    assert load_dataset(f"folder:{tmp_path / 'there'}").digest != one


def test_classes_without_a_split_are_split_by_a_seed(tmp_path: Path) -> None:
    root = layout(tmp_path / "all") / "train"
    one, same, other = (load_dataset(f"classes:{root}?test=0.34&seed={seed}") for seed in (0, 0, 5))
    assert (one.split == "test").sum() == len(CLASSES)
    assert list(one.split) == list(same.split) and list(one.split) != list(other.split)


def test_lists_name_images_and_labels(tmp_path: Path) -> None:
    root = layout(tmp_path / "listed")
    for split in ("train", "test"):
        files = sorted((root / split).rglob("*.png"))
        lines = [f"{file.relative_to(root).as_posix()} {CLASSES.index(file.parent.name)}" for file in files]
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    listed, folder = load_dataset(f"lists:{root}?train=train.txt&test=test.txt"), load_dataset(f"folder:{root}")
    assert listed.class_names == folder.class_names and listed.digest == folder.digest
    (root / "train.txt").write_text("train/cat/cat-0.png\n../secret.png 0\n")
    with pytest.raises(ConfigError):
        load_dataset(f"lists:{root}?train=train.txt&test=test.txt")


def test_domainnets_own_lists_and_a_choice_of_classes(tmp_path: Path) -> None:
    names = ("ant", "bee", "cow")
    for domain in ("real", "sketch"):
        for split, count in (("train", 2), ("test", 1)):
            lines = []
            for label, name in enumerate(names):
                for index in range(count):
                    file = f"{domain}/{name}/{split}-{index}.png"
                    picture(tmp_path / file, hash((domain, split, label, index)) % 2**31)
                    lines.append(f"{file} {label}")
            (tmp_path / f"{domain}_{split}.txt").write_text("\n".join(lines))
    dataset = load_dataset(f"domainnet:{tmp_path}?domains=real,sketch")
    assert dataset.class_names == list(names) and len(dataset) == 2 * 3 * 3
    (tmp_path / "chosen.txt").write_text("cow\nant\n")
    chosen = load_dataset(f"domainnet:{tmp_path}?domains=real,sketch&classes=chosen.txt")
    assert sorted(chosen.class_names) == ["ant", "cow"] and len(chosen) == 2 * 2 * 3
    with pytest.raises(ConfigError, match="clipart"):
        load_dataset(f"domainnet:{tmp_path}")


def test_stanford_cars_annotations(tmp_path: Path) -> None:
    makes = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    (tmp_path / "devkit").mkdir()
    kind = np.dtype([(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")])
    for split, count in (("train", 4), ("test", 2)):
        rows = np.empty((1, count), dtype=kind)
        for index in range(count):
            picture(tmp_path / f"cars_{split}/{index + 1:05d}.jpg", index + 10 * count)
            rows[0, index] = (1, 1, 9, 9, index % 2 + 1, f"{index + 1:05d}.jpg")
        file = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        scipy.io.savemat(tmp_path / file, {"annotations": rows})
    scipy.io.savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.array([makes], dtype=object)})
    dataset = load_dataset(f"cars:{tmp_path}")
    assert dataset.class_names == makes
    assert [int((dataset.split == split).sum()) for split in ("train", "test")] == [4, 2]


def cifar(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The archive's three pickles as Python 2 wrote them: protocol 2, texts as text."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for split, per_class in (("train", 4), ("test", 2)):
        fine = [label for label in range(4) for _ in range(per_class)]
        values = {
            "filenames": [f"{split}-{index}.png" for index in range(len(fine))],
            "batch_label": "batch",
            "fine_labels": fine,
            "coarse_labels": [label // 2 for label in fine],
            "data": draws.integers(0, 256, (len(fine), 3072), dtype=np.uint8),
            **(changes or {}),
        }
        (folder / split).write_bytes(pickle.dumps(values, protocol=2))
    meta = {"fine_label_names": ["apple", "bear", "clock", "dog"], "coarse_label_names": ["food", "animal"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def test_cifar_100_is_read_pixel_by_pixel_from_folder_and_archive(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "cifar-100-python")
    dataset = load_dataset(f"cifar100:{folder}")
    assert dataset.class_names == ["apple", "bear", "clock", "dog"]
    grouped = load_dataset(f"cifar100:{folder}?groups=coarse")
    assert dataset.groups is None and grouped.groups == ["food", "food", "animal", "animal"]
    values = pickle.loads((folder / "train").read_bytes())
    rows = np.flatnonzero(dataset.split == "train")
    found = dataset.decode(rows, 32).reshape(len(rows), -1).numpy()
    assert sorted(map(bytes, found)) == sorted(map(bytes, values["data"]))
    assert np.array_equal(np.sort(dataset.labels[rows]), np.sort(values["fine_labels"]))
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-100-python")
    assert load_dataset(f"cifar100:{tmp_path / 'cifar-100-python.tar.gz'}").digest == dataset.digest


def test_python_2s_texts_are_read() -> None:
    assert read_plain_pickle(b"\x80\x02}U\x03keyU\x02abs.", "short") == {"key": "ab"}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched-by-a-pickle"),))


@pytest.mark.parametrize("where", [{"data": Evil()}, {"fine_labels": [Evil()]}, {"more": np.array([Evil()])}])
def test_a_cifar_file_with_anything_else_in_it_is_refused_and_not_run(
    where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path / "cifar-100-python", where)
    with pytest.raises(ConfigError, match="train"):
        load_dataset(f"cifar100:{tmp_path}")
    assert not (tmp_path / "touched-by-a-pickle").exists()
    for cut in (0, 10, 200):
        (tmp_path / "cifar-100-python/train").write_bytes(pickle.dumps({"data": 1}, protocol=2)[:cut])
        with pytest.raises(ConfigError):
            load_dataset(f"cifar100:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("folder:", ["folder"]),
        ("folder:absent", ["absent"]),
        ("folder:birds?tests=val", ["tests"]),
        ("folder:empty", ["empty", "train"]),
        ("classes:birds/train?test=2", ["test=2", "between 0 and 1"]),
        ("cifar100:birds", ["birds"]),
        ("cars:birds/train", ["birds"]),
    ],
)
def test_what_is_wrong_is_named(spec: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layout(tmp_path / "birds")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_dataset(spec)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_image_that_cannot_be_decoded_is_named_by_its_path(tmp_path: Path) -> None:
    root = layout(tmp_path / "birds")
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    (root / "train/cat/cat-1.png").write_bytes(buffer.getvalue()[:30])
    with pytest.raises(ConfigError, match=r"train/cat/cat-1\.png"):
        load_dataset(f"folder:{root}")


def test_a_path_is_made_absolute_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("folder:birds?test=val") == f"folder:{tmp_path}/birds?test=val"
    assert absolute_spec("alphabets") == "alphabets"


def test_a_pickle_cannot_keep_the_reader_busy_without_end() -> None:
    """A key of 60 tuples, each of the one before it twice: a few hundred bytes, 2 ** 60 steps to hash."""
    pairs = b"".join(b"q" + bytes([depth]) + b"h" + bytes([depth]) + b"\x86" for depth in range(60))
    with pytest.raises(ConfigError, match="a tuple where a str belongs"):
        read_plain_pickle(b"\x80\x02}(K\x01" + pairs + b"K\x01u.", "endless")


def test_a_link_that_leads_back_does_not_multiply_images(tmp_path: Path) -> None:
    root = layout(tmp_path / "birds")
    (root / "train/cat/again").symlink_to("..")
    with pytest.raises(ConfigError, match=r"cat/again.*link"):
        load_dataset(f"folder:{root}")


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    root, linked = layout(tmp_path / "birds"), tmp_path / "linked"
    before = load_dataset(f"folder:{root}").digest
    (root / "train/cat").rename(linked)
    (root / "train/cat").symlink_to(linked)
    assert load_dataset(f"folder:{root}").digest == before


@pytest.mark.parametrize("label", [0, 3])
def test_a_car_of_a_class_without_a_name_is_named(label: int, tmp_path: Path) -> None:
    (tmp_path / "devkit").mkdir()
    rows = np.empty((1, 2), dtype=[("class", object), ("fname", object)])
    rows[0, 0], rows[0, 1] = (1, "00001.jpg"), (label, "00002.jpg")
    for file in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        scipy.io.savemat(tmp_path / file, {"annotations": rows})
    names = {"class_names": np.array([["Acura", "Audi"]], dtype=object)}
    scipy.io.savemat(tmp_path / "devkit/cars_meta.mat", names)
    with pytest.raises(ConfigError, match=f"00002.jpg has {label}") as caught:
        inspect(f"cars:{tmp_path}")
    assert len(caught.value.problems) == 2, "both lists are named at once"
