"""Weights and stages that aren't what they seem: refused before anything is executed or allocated."""

from __future__ import annotations

import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from loda.errors import ConfigError, StageError
from loda.reading import ReadingError, check_archive, load_safetensors, parse_safetensors
from loda.reading.tensors import HEADER_BYTES
from loda.state import META_FILE, TENSORS_FILE, Artifact
from loda.timm_models import build_backbone
from tests.conftest import TINY_VIT
from tests.security.hostile import Payload, armed_pickle, safetensors_bytes, tensor

GOOD = {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "none": torch.empty(0, 3), "one": torch.ones(())}


def test_what_is_sound_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "good.safetensors", metadata={"format": "pt"})
    for found in (load_safetensors(tmp_path / "good.safetensors"), parse_safetensors(save(GOOD))):
        assert set(found) == set(GOOD)
        assert all(torch.equal(found[name], GOOD[name]) for name in GOOD)
    assert parse_safetensors(save({})) == {}


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32]
MORE_DTYPES = [torch.uint32, torch.int64, torch.uint64, torch.float64, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES + MORE_DTYPES, ids=str)
def test_every_type_that_safetensors_stores_is_taken(dtype: torch.dtype) -> None:
    assert parse_safetensors(save({"a": torch.zeros(3, dtype=dtype)}))["a"].dtype == dtype


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_under_the_name_of_safetensors_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    file, mark = tmp_path / "model.safetensors", tmp_path / "mark"
    file.write_bytes(armed_pickle(mark, protocol))
    with pytest.raises(
        ConfigError, match=r"model\.safetensors.*a pickle.*nothing in it was executed; save the tensors"
    ):
        build_backbone(**{**TINY_VIT, "weights": str(file)})
    with pytest.raises(StageError, match="a pickle"):
        Artifact.from_files({**Artifact({}).to_files(), TENSORS_FILE: file.read_bytes()})
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()  # it would have worked


def test_an_archive_of_torch_under_the_name_of_safetensors(tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / "model.safetensors")
    with pytest.raises(ReadingError, match=r"an archive of torch\.save"):
        load_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
def test_a_payload_in_a_state_saved_with_torch_is_not_run(tmp_path: Path, suffix: str) -> None:
    file, mark = tmp_path / f"model{suffix}", tmp_path / "mark"
    torch.save({"weight": Payload(mark)}, file)
    with pytest.raises(ConfigError, match="doesn't fit the backbone"):
        build_backbone(**{**TINY_VIT, "weights": str(file)})
    assert not mark.exists()


HUGE = 10**9
HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "a billion dimensions": ({"a": tensor(shape=[1] * 100_000, offsets=(0, 4))}, b"1234", "100,000 dimensions"),
    "a billion values": (
        {"a": tensor(shape=(HUGE, HUGE), offsets=(0, 4))},
        b"1234",
        "takes 4,000,000,000,000,000,000 bytes, but 4",
    ),
    "a dimension of 10^18 beside a zero": ({"a": tensor(shape=(0, 10**18, 10), offsets=(0, 0))}, b"", "more values"),
    "more than its bytes": ({"a": tensor(shape=(HUGE,), offsets=(0, 4 * HUGE))}, b"1234", "declares 4,000,000,000"),
    "a shape that isn't its bytes": ({"a": tensor(shape=(3,))}, b"12345678", "takes 12 bytes, but 8"),
    "a negative side": ({"a": tensor(shape=(-2,))}, b"12345678", "whole numbers from 0"),
    "a side that is true": ({"a": tensor(shape=[True, 2])}, b"12345678", "whole numbers from 0"),
    "an unknown type": ({"a": tensor(dtype="OBJECT")}, b"12345678", "dtype 'OBJECT'"),
    "overlapping tensors": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"123456789012", "one after another"),
    "a hole": ({"a": tensor(offsets=(8, 16))}, b"1" * 16, "one after another"),
    "bytes that nobody declared": ({"a": tensor()}, b"1" * 99, "declares 8 bytes of tensors, but it holds 99"),
    "offsets the wrong way": ({"a": tensor(offsets=(8, 0))}, b"12345678", "takes 8 bytes, but -8"),
    "offsets of another kind": ({"a": tensor(offsets=["0", "8"])}, b"12345678", "data_offsets"),
    "an entry of another kind": ({"a": 7}, b"", "expected dtype, shape and data_offsets"),
    "a list": (b"{}[]"[2:], b"", "no header"),
    "a name given twice": (b'{"a": {}, "a": {}}', b"", "given twice"),
    "brackets without end": (b'{"a": ' + b"[" * 200_000, b"", "nested too deeply"),
    "a header that is cut": (b'{"a": {"dty', b"", "can't be read"),
    "half a character": (b'{"\xff": 1}', b"", "can't be read"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, what: str) -> None:
    header, data, reason = HEADERS[what]
    content = safetensors_bytes(header, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ReadingError, match=reason):
        parse_safetensors(content)
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        build_backbone(**{**TINY_VIT, "weights": str(tmp_path / "bad.safetensors")})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB: nothing was made of it


def test_a_header_longer_than_its_bound_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "long.safetensors"
    with file.open("wb") as out:
        out.write((HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
        out.truncate(HEADER_BYTES + 100)  # zeros that take no space
    with pytest.raises(ReadingError, match="header declares 16,777,217 bytes, expected at most 16,777,216"):
        load_safetensors(file)
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ReadingError, match="no header of 9,223,372,036,854,775,808 bytes in a file of 10"):
        load_safetensors(file)


def test_a_stage_whose_facts_are_of_another_kind() -> None:
    files = Artifact({"a": torch.ones(2)}, {"x": 1}).to_files()
    for facts in (
        b'{"digest": "", "meta": [], "timings": {}}',
        b'{"digest": 1, "meta": {}, "timings": {}}',
        b"[" * 9999,
    ):
        with pytest.raises(StageError, match=META_FILE):
            Artifact.from_files({**files, META_FILE: facts})
    for seconds in ("1e999", "true, null", '"x"', "[]", "9" * 400):
        facts = f'{{"digest": "", "meta": {{}}, "timings": {{"seconds": {seconds}}}}}'.encode()
        with pytest.raises(StageError):
            Artifact.from_files({**files, META_FILE: facts})


def test_an_archive_of_arrays_that_unpacks_to_too_much(tmp_path: Path) -> None:
    file = tmp_path / "weights.npz"
    np.savez_compressed(file, a=np.zeros(40_000_000))
    assert file.stat().st_size < 400_000
    with pytest.raises(ConfigError, match=r"weights\.npz.*is refused.*320,000,\d+ bytes in all, expected at most"):
        build_backbone(**{**TINY_VIT, "weights": str(file)})


def npy_header(shape: str, kind: str = "<f8") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy_header("(1000000000000,)"), "isn't what it holds"),
        (npy_header("(1,)", "|O"), "Python objects"),
        (npy_header("(-1,)"), "isn't what it holds"),
        (npy_header("__import__('os')"), "damaged archive"),
        (b"\x93NUMPY\x09\x00", "version"),
        (b"", "damaged archive"),
    ],
)
def test_arrays_of_objects_or_of_more_than_they_hold(tmp_path: Path, content: bytes, reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ReadingError, match=reason):
        check_archive(tmp_path / "weights.npz")


def test_sound_archives_pass(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.ones((2, 3)), b=np.zeros(0), c=np.float32(1))
    torch.save(GOOD, tmp_path / "weights.pth")
    (tmp_path / "other.bin").write_bytes(b"neither")
    for name in ("weights.npz", "weights.pth", "other.bin"):
        check_archive(tmp_path / name)


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg_overlay", "pretrained_cfg", "cache_dir"])
def test_a_study_can_not_smuggle_a_file_in_by_an_option_of_the_model(tmp_path: Path, option: str) -> None:
    options = {**TINY_VIT["options"], option: {"file": str(tmp_path / "model.pth")}}
    with pytest.raises(ConfigError, match=rf"backbone\.options: {option}: not for a study"):
        build_backbone(**{**TINY_VIT, "options": options})
