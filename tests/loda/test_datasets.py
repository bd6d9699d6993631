"""Data sources: what they read, and how they refuse what they can't."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from loda.datasets import ImageDataset, absolute_spec, load_dataset
from loda.errors import ConfigError


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def columns(classes: int = 3, train: int = 2, test: int = 1) -> dict[str, list[Any]]:
    """Grey 8 x 8 images whose value is 10 x class + number; two classes a task."""
    table: dict[str, list[Any]] = {key: [] for key in ("image", "label", "label_name", "split", "task")}
    for label in range(classes):
        for number in range(train + test):
            image = np.full((8, 8, 3), 10 * label + number, dtype=np.uint8)
            table["image"].append({"bytes": png(image), "path": f"images/{label}/{number}.png"})
            table["label"].append(label)
            table["label_name"].append(f"class {label}")
            table["split"].append("train" if number < train else "test")
            table["task"].append(f"group {label // 2}")
    return table


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def _write(table: dict[str, list[Any]] | pa.Table, name: str = "mine.parquet") -> str:
        pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), tmp_path / name)
        return f"parquet:{tmp_path / name}"

    return _write


def problems_of(spec: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_dataset(spec)
    return caught.value.problems


def test_parquet_gives_labels_names_splits_groups_and_pixels(write: Callable[..., str]) -> None:
    dataset = load_dataset(write(columns()))
    assert (len(dataset), dataset.classes) == (9, 3)
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset.class_names == ["class 0", "class 1", "class 2"]
    assert dataset.groups == ["group 0", "group 0", "group 1"]
    assert dataset.split.tolist() == ["train", "train", "test"] * 3
    pixels = dataset.decode([8, 0, 4], image_size=8)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 8, 8)
    assert [p.unique().tolist() for p in pixels] == [[22], [0], [11]]


def test_plain_binary_no_task_and_categorical_text_are_accepted(write: Callable[..., str]) -> None:
    table = columns()
    plain = load_dataset(
        write(
            pa.table(
                {
                    "image": [row["bytes"] for row in table["image"]],
                    "label": pa.array(table["label"], pa.uint8()),
                    "label_name": pa.array(table["label_name"], pa.large_string()),
                    "split": pa.array(table["split"]).dictionary_encode(),
                }
            )
        )
    )
    assert plain.groups is None and plain.paths is None
    full = load_dataset(write({k: v for k, v in table.items() if k != "task"}, "full.parquet"))
    assert plain.digest == full.digest


@pytest.mark.parametrize("row_group_size", [1, 4, 100])
def test_digest_does_not_depend_on_file_layout_or_place(tmp_path: Path, row_group_size: int) -> None:
    table = columns()
    moved = [{**image, "path": "elsewhere"} for image in table["image"]]
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    pq.write_table(pa.table({**table, "image": moved}), tmp_path / "b.parquet", row_group_size=row_group_size)
    digests = {load_dataset(f"parquet:{tmp_path}/{name}.parquet").digest for name in "ab"}
    assert len(digests) == 1 and len(digests.pop()) == 64


@pytest.mark.parametrize("column", ["image", "label", "label_name", "split", "task"])
def test_digest_sees_every_column(write: Callable[..., str], column: str) -> None:
    table = columns()
    before = load_dataset(write(table)).digest
    if column == "image":
        table["image"][4] = {"bytes": png(np.full((8, 8, 3), 99, dtype=np.uint8)), "path": "images/1/1.png"}
    elif column == "label":
        table["label"] = [{0: 1, 1: 0, 2: 2}[label] for label in table["label"]]
        table["label_name"] = [f"class {label}" for label in table["label"]]  # names, groups stay in label order
    elif column == "split":
        table["split"][:3] = ["test", "train", "train"]
    else:
        table[column][:3] = ["other"] * 3
    assert load_dataset(write(table)).digest != before


def test_missing_file_and_file_that_is_no_parquet(tmp_path: Path) -> None:
    (problem,) = problems_of(f"parquet:{tmp_path}/none.parquet")
    assert "none.parquet" in problem and "parquet:PATH" in problem
    (tmp_path / "text.parquet").write_text("hello")
    (problem,) = problems_of(f"parquet:{tmp_path}/text.parquet")
    assert "text.parquet" in problem and "can't be read as Parquet" in problem
    (problem,) = problems_of("parquet:")
    assert "names no file" in problem


def test_missing_and_wrong_columns_come_in_one_message(write: Callable[..., str]) -> None:
    table = columns()
    problems = problems_of(write({"image": table["label_name"], "label": table["split"], "split": table["split"]}))
    assert len(problems) == 3
    text = "\n".join(problems)
    assert "column 'image'" in text and "column 'label'" in text and "no column 'label_name'" in text
    assert "struct {bytes" in text and "but is string" in text


def test_all_problems_of_the_contents_come_in_one_message(write: Callable[..., str]) -> None:
    table = columns(classes=5)
    table["label"] = [label + (label == 4) for label in table["label"]]  # 0 1 2 3 5
    table["label_name"][1] = "another"
    table["task"][4] = "elsewhere"
    table["split"][6] = "val"  # leaves class 2 with one training image
    table["split"][11] = "train"  # class 3 has no test image
    table["split"][12:15] = ["test"] * 3  # class 5 has no training image
    problems = problems_of(write(table))
    text = "\n".join(problems)
    assert len(problems) == 6, text
    assert "from 0 to 4 without a gap" in text and "missing: 4; too many: 5" in text
    assert "label 0 has names 'class 0', 'another'" in text
    assert "label 1 has tasks 'group 0', 'elsewhere'" in text
    assert "row 6 has 'val'" in text
    assert "class without training images: 5" in text
    assert "class without test images: 3 (class 3)" in text


@pytest.mark.parametrize("column", ["label", "label_name", "split", "task"])
def test_empty_cells_are_named(write: Callable[..., str], column: str) -> None:
    table = columns()
    table[column][5] = None
    (problem,) = problems_of(write(table))
    assert f"column {column!r} is empty in row 5" in problem


def test_image_without_bytes_is_named(write: Callable[..., str]) -> None:
    table = columns()
    table["image"][2] = {"bytes": None, "path": "images/0/2.png"}
    table["image"][4] = None
    (problem,) = problems_of(write(table))
    assert "image without bytes: row 2 (images/0/2.png), row 4" in problem


def test_undecodable_images_are_named_by_row_and_path_before_any_work(write: Callable[..., str]) -> None:
    table = columns()
    table["image"][3]["bytes"] = b"not an image"
    table["image"][7]["bytes"] = table["image"][7]["bytes"][:40]
    spec = write(table)
    problems = problems_of(spec)
    assert len(problems) == 2
    assert "row 3 (images/1/0.png)" in problems[0] and "row 7 (images/2/1.png)" in problems[1]


def test_many_undecodable_images_are_counted(write: Callable[..., str]) -> None:
    table = columns(classes=10)
    for row in range(30):
        table["image"][row]["bytes"] = b"broken"
    problems = problems_of(write(table))
    assert len(problems) == 21 and "10 more" in problems[-1]


def test_damage_behind_an_intact_header_is_named_when_decoding(write: Callable[..., str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    table = columns()
    table["image"][4]["bytes"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]  # JPEG headers have no checksum
    dataset = load_dataset(write(table))
    with pytest.raises(ConfigError, match=r"row 4 \(images/1/1.png\) can't be decoded"):
        dataset.decode([0, 4], image_size=8)


def test_verify_of_a_sample_reads_only_that_many_rows(write: Callable[..., str]) -> None:
    table = columns()
    table["image"][3]["bytes"] = b"not an image"
    dataset = load_dataset(write(table), verify=False)
    dataset.verify(sample=2)  # first and last
    with pytest.raises(ConfigError):
        dataset.verify(sample=9)


def dataset_of(*images: bytes) -> ImageDataset:
    """One class; the images, then one to test on."""
    rows = [*images, png(np.zeros((4, 4), dtype=np.uint8))]
    split = np.array(["train"] * len(images) + ["test"])
    return ImageDataset("made", rows, np.zeros(len(rows), dtype=np.int64), ["one"], split)


def test_short_side_is_resized_and_the_centre_cut_out() -> None:
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8), (60, 1))  # 60 high, 120 wide
    pixels = dataset_of(png(ramp)).decode([0], image_size=30, channels=1)[0, 0]
    # 120 x 60 becomes 60 x 30; columns 15..44 of it are left, each the mean of two columns of the ramp.
    expected = torch.arange(15, 45, dtype=torch.float32) * 4 + 1
    assert (pixels.float() - expected).abs().max() <= 1.5
    tall = dataset_of(png(ramp.T.copy())).decode([0], image_size=30, channels=1)[0, 0]
    assert torch.equal(tall, pixels.T)


def test_one_bit_images_become_grey_before_resizing() -> None:
    stripes = np.zeros((32, 32), dtype=bool)
    stripes[:, ::2] = True
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert image.mode == "1"
    dataset = dataset_of(buffer.getvalue())
    centre = dataset.decode([0], image_size=8)[0, :, 2:6, 2:6]
    assert ((centre > 100) & (centre < 155)).all()  # grey, neither ink nor paper
    full = dataset.decode([0], image_size=32)[0]
    assert torch.equal(full, torch.from_numpy(stripes).mul(255).to(torch.uint8).expand(3, -1, -1))


def test_modes_become_rgb_or_grey() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (8, 8), dtype=np.uint16)
    dataset = dataset_of(png(rgb), png(rgb, "L"), png(rgb, "RGBA"), png(rgb[:, :, 0], "P"), png(deep))
    colour = dataset.decode(range(5), image_size=8)
    assert torch.equal(colour[0], torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(colour[2], colour[0])
    assert torch.equal(colour[3], torch.from_numpy(rgb[:, :, 0]).expand(3, -1, -1))
    assert torch.equal(colour[4, 0], torch.from_numpy((deep >> 8).astype(np.uint8)))
    grey = dataset.decode([0, 1], image_size=8, channels=1)
    assert grey.shape == (2, 1, 8, 8) and torch.equal(grey[0], grey[1]) and torch.equal(colour[1, :1], grey[1])


def test_decode_refuses_rows_and_channels_that_do_not_exist() -> None:
    dataset = dataset_of(png(np.zeros((4, 4), dtype=np.uint8)))
    with pytest.raises(IndexError):
        dataset.decode([-1], image_size=4)
    with pytest.raises(ValueError, match="channels"):
        dataset.decode([0], image_size=4, channels=2)


def test_lengths_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 images, but 3 labels"):
        ImageDataset("made", [b"a", b"b"], np.zeros(3, dtype=np.int64), ["one"], np.array(["train", "test"]))


def test_bundled_alphabets_are_whole() -> None:
    dataset = load_dataset("alphabets")
    assert dataset.groups is not None and len(set(dataset.groups)) >= 5
    assert "Brenden Lake" in dataset.licence
    counts = np.stack([np.bincount(dataset.labels[dataset.split == split]) for split in ("train", "test")])
    assert (counts == [[15], [5]]).all()
    pixels = dataset.decode(range(0, len(dataset), 97), image_size=28, channels=1)
    assert pixels.float().mean() > 180  # dark ink on white, as in the file
    assert all(image.min() < 128 for image in pixels)


def test_unknown_name_gets_the_nearest_one() -> None:
    (problem,) = problems_of("alphabet")
    assert "did you mean 'alphabets'" in problem and "parquet:PATH" in problem
    (problem,) = problems_of("alphabets:5")
    assert "no argument" in problem


def test_absolute_spec_follows_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("parquet:a/b.parquet") == f"parquet:{tmp_path}/a/b.parquet"
    assert absolute_spec("alphabets") == "alphabets"
