"""Artifacts: what is kept, what changes the digest, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from loda.errors import StageError
from loda.state import META_FILE, TENSORS_FILE, Artifact

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
]


def example(**changes: Any) -> Artifact:
    parts: dict[str, Any] = {
        "tensors": {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor([1, 2])},
        "meta": {"task": 3, "name": "é", "nested": {"list": [1, 2.5, None, True]}},
        "timings": {"seconds": 1.5},
    }
    return Artifact(**{**parts, **changes})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(math.prod(shape)).reshape(shape) * 0.3).to(dtype)
    artifact = Artifact({"x": tensor, "y": torch.ones(3)})
    back = Artifact.from_files(artifact.to_files())
    assert back.tensors["x"].dtype == dtype
    assert back.tensors["x"].shape == tensor.shape
    assert torch.equal(back.tensors["x"], tensor)
    assert back.digest == artifact.digest


def test_nan_infinity_and_negative_zero_in_tensors_keep_their_bits() -> None:
    tensor = torch.tensor([math.nan, -math.inf, -0.0, 1e-45])
    back = Artifact.from_files(Artifact({"x": tensor}).to_files())
    assert torch.equal(back.tensors["x"].view(torch.int32), tensor.view(torch.int32))


def test_meta_and_timings_come_back_equal() -> None:
    artifact = example()
    back = Artifact.from_files(artifact.to_files())
    assert back.meta == artifact.meta == {"task": 3, "name": "é", "nested": {"list": [1, 2.5, None, True]}}
    assert back.timings == {"seconds": 1.5}


def test_an_artifact_may_hold_nothing() -> None:
    back = Artifact.from_files(Artifact({}, {}).to_files())
    assert (back.tensors, back.meta, back.nbytes) == ({}, {}, 0)


def test_nbytes_counts_all_tensors() -> None:
    assert example().nbytes == 6 * 4 + 2 * 8


def test_views_and_shared_buffers_become_own_contiguous_tensors() -> None:
    buffer = torch.arange(12.0).reshape(3, 4)
    artifact = Artifact({"whole": buffer, "turned": buffer.T, "row": buffer[1], "grad": torch.nn.Parameter(buffer)})
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in artifact.tensors.values())
    back = Artifact.from_files(artifact.to_files())
    assert torch.equal(back.tensors["turned"], buffer.T)
    assert torch.equal(back.tensors["row"], buffer[1])


def test_training_on_after_construction_changes_nothing() -> None:
    weight, facts = torch.ones(3), {"list": [1]}
    artifact = Artifact({"weight": weight}, facts)
    weight.add_(1)
    facts["list"].append(2)
    assert torch.equal(artifact.tensors["weight"], torch.ones(3))
    assert artifact.meta == {"list": [1]}
    assert artifact.digest == Artifact({"weight": torch.ones(3)}, {"list": [1]}).digest


def test_the_digest_is_pinned() -> None:
    """Stored stages outlive releases: a change of the digest's definition must be a decision."""
    assert example().digest == "842db50e1078172f348ffa64efb10f45c9a43971397091e6bc62ff39ce09667b"


def test_every_single_bit_of_a_tensor_matters() -> None:
    content = bytes(range(16))
    digests = {Artifact({"x": torch.frombuffer(bytearray(content), dtype=torch.uint8)}).digest}
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        digests.add(Artifact({"x": torch.frombuffer(flipped, dtype=torch.uint8)}).digest)
    assert len(digests) == 1 + 8 * len(content)


def test_dtype_shape_name_and_meta_matter() -> None:
    zeros = torch.zeros(4, dtype=torch.int32)
    variants = [
        Artifact({"x": zeros}),
        Artifact({"x": zeros.float()}),  # the same sixteen bytes
        Artifact({"x": zeros.reshape(2, 2)}),
        Artifact({"x": zeros.reshape(4, 1)}),
        Artifact({"y": zeros}),
        Artifact({"x": zeros[:2], "y": zeros[:2]}),
        Artifact({"x": zeros, "y": zeros[:0]}),
        Artifact({"x": zeros, "y": zeros[:0].reshape(0, 2)}),
        Artifact({"x": zeros}, {"x": 1}),
        Artifact({"x": zeros}, {"x": 1.0}),
        Artifact({"x": zeros}, {"x": "1"}),
        Artifact({"x": zeros}, {"x": True}),
        Artifact({"x": zeros}, {"x": None}),
        Artifact({"x": zeros}, {"x": [1]}),
        Artifact({"x": zeros}, {"x": {}}),
    ]
    assert len({variant.digest for variant in variants}) == len(variants)


def test_swapping_two_tensors_names_matters() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert Artifact({"a": one, "b": two}).digest != Artifact({"a": two, "b": one}).digest


def test_timings_order_and_tuples_dont_matter() -> None:
    artifact = example()
    assert example(timings={"seconds": 99.0, "loading": 0.1}).digest == artifact.digest
    assert example(tensors=dict(reversed(artifact.tensors.items()))).digest == artifact.digest
    assert example(meta=dict(reversed(artifact.meta.items()))).digest == artifact.digest
    assert Artifact({}, {"x": (1, 2)}).digest == Artifact({}, {"x": [1, 2]}).digest


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"a": {"b": [0.0, math.nan]}}, r"meta\.a\.b\[1\] is nan"),
        ({"a": math.inf}, r"meta\.a is inf"),
        ({"a": {1: 2}}, r"meta\.a has the key 1 of type int"),
        ({"a": np.int64(3)}, r"meta\.a is a int64"),
        ({"a": torch.tensor(3)}, r"meta\.a is a Tensor"),
        ({"a": {3, 4}}, r"meta\.a is a set"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_path(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Artifact({}, meta)


def test_bad_tensors_and_timings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tensor 's'"):
        Artifact({"s": torch.eye(3).to_sparse()})
    with pytest.raises(ValueError, match="tensor 'n'"):
        Artifact({"n": np.zeros(3)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="__metadata__"):
        Artifact({"__metadata__": torch.zeros(1)})
    with pytest.raises(ValueError, match="timings"):
        Artifact({}, {}, {"seconds": math.nan})


def test_files_with_other_contents_than_their_digest_are_refused() -> None:
    files, other = example().to_files(), example(meta={"task": 4}).to_files()
    with pytest.raises(StageError, match="digest"):
        Artifact.from_files({**files, TENSORS_FILE: Artifact({"a": torch.zeros(2)}).to_files()[TENSORS_FILE]})
    with pytest.raises(StageError, match="digest"):
        Artifact.from_files({**files, META_FILE: other[META_FILE].replace(b'"task":4', b'"task":5')})


@pytest.mark.parametrize("name", [TENSORS_FILE, META_FILE])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"null", b"\xff" * 40], ids=repr)
def test_missing_and_unreadable_files_are_stage_errors(name: str, content: bytes | None) -> None:
    files = example().to_files()
    if content is None:
        del files[name]
    else:
        files[name] = content
    with pytest.raises(StageError):
        Artifact.from_files(files)
