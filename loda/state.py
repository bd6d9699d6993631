"""What a step of a stage leaves behind: named tensors, JSON facts, timings, and one digest over the first two."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import safetensors.torch
import torch

from loda.errors import StageError
from loda.reading import ReadingError, parse_json, parse_safetensors

TENSORS_FILE = "tensors.safetensors"
META_FILE = "meta.json"


@dataclass(frozen=True, eq=False)
class Artifact:
    """An immutable result, equal to another one exactly when their digests are equal.

    Construction takes its own contiguous CPU copy of every tensor, wherever and however it is stored: parameters that
    train on, views of one buffer and accelerator tensors are all safe to pass, and the digest can't go stale unseen.

    Args:
        tensors: any dtype that safetensors stores (bfloat16 included), any shape, empty ones too.
        meta: JSON values; tuples become lists. NumPy integers and tensors are refused: convert them first.
        timings: seconds by name. Not part of the digest, since no two runs take equally long.

    Raises:
        ValueError: a value that JSON can't hold exactly (NaN, infinity, a key that isn't a string, another type), named
            by its key path; a sparse or quantised tensor; the tensor name ``__metadata__``, which the format reserves.
    """

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {_checked_name(name): _own_copy(name, tensor) for name, tensor in self.tensors.items()}
        self._set(own, _as_json(self.meta, "meta"), _as_seconds(self.timings))

    def _set(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any], timings: dict[str, float]) -> None:
        for name, value in (("tensors", tensors), ("meta", meta), ("timings", timings)):
            object.__setattr__(self, name, value)  # the one way in: the class is frozen

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, over the tensors' names, dtypes, shapes and bytes and over ``meta``.

        What is hashed: the length of a canonical JSON header as 8 little-endian bytes, that header (names, dtypes and
        shapes sorted by name, and ``meta``), then the raw bytes in that order. The header fixes how many bytes each
        tensor has, so no two different artifacts give the same input.
        """
        names = sorted(self.tensors)
        described = [[name, str(self.tensors[name].dtype), list(self.tensors[name].shape)] for name in names]
        header = canonical_json({"tensors": described, "meta": self.meta})
        sha = hashlib.sha256(len(header).to_bytes(8, "little"))
        sha.update(header)
        for name in names:
            sha.update(_raw_bytes(self.tensors[name]))
        return sha.hexdigest()

    def part(self, prefix: str) -> Artifact:
        """Only the tensors whose names start so, shared with this artifact and not copied; its digest is its own."""
        part = type(self).__new__(type(self))
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        part._set(tensors, self.meta, self.timings)
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to_files(self) -> dict[str, bytes]:
        """File contents by name: one safetensors file and one JSON file (``meta``, ``timings``, ``digest``)."""
        document = {"digest": self.digest, "meta": self.meta, "timings": self.timings}
        return {TENSORS_FILE: safetensors.torch.save(self.tensors), META_FILE: canonical_json(document)}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Artifact:
        """The artifact that ``to_files`` wrote.

        Raises:
            StageError: a file is missing or unreadable, or the contents don't have the digest written beside them.
        """
        try:
            document = parse_meta(files[META_FILE])
            tensors = parse_safetensors(files[TENSORS_FILE])
            artifact = cls.__new__(cls)  # the tensors were just made for this object: no second copy
            artifact._set(tensors, _as_json(document["meta"], "meta"), _as_seconds(document["timings"]))
        except KeyError as error:
            raise StageError(f"{error.args[0]} is missing; expected {TENSORS_FILE} and {META_FILE}") from error
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise StageError(f"{TENSORS_FILE} or {META_FILE} can't be read: {error}") from error
        if artifact.digest != document["digest"]:
            raise StageError(f"digest {artifact.digest} differs from {document['digest']}, written in {META_FILE}")
        return artifact


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and ASCII only: equal values give equal bytes.

    Raises:
        ValueError: NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_meta(content: bytes) -> dict[str, Any]:
    """The parts of a ``meta.json``: ``meta``, ``timings`` and ``digest``.

    Raises:
        StageError: not a JSON object with these three keys.
    """
    try:
        document = parse_json(content)
    except ReadingError as error:
        raise StageError(f"{META_FILE} can't be read: {error}") from error
    if not isinstance(document, dict) or set(document) != {"digest", "meta", "timings"}:
        raise StageError(f"{META_FILE} must be an object with the keys digest, meta and timings")
    if not isinstance(document["meta"], dict) or not isinstance(document["timings"], dict):
        raise StageError(f"{META_FILE} must have mappings under meta and timings")
    if not isinstance(document["digest"], str):
        raise StageError(f"{META_FILE} must have a text under digest")
    return document


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"tensor name {name!r}: expected a string other than '__metadata__'")
    return name


def _own_copy(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"tensor {name!r}: expected a dense torch.Tensor, got {type(tensor).__name__}")
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())


def _raw_bytes(tensor: torch.Tensor) -> memoryview | bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # NumPy has no bfloat16, bytes it has


def _as_seconds(timings: Mapping[str, float]) -> dict[str, float]:
    seconds = {name: float(value) for name, value in timings.items()}
    for name, value in seconds.items():
        if not math.isfinite(value):
            raise ValueError(f"timings[{name!r}] is {value}: expected finite seconds")
    return seconds


def _as_json(value: Any, path: str) -> Any:
    """A private copy in plain JSON types, so that what is read back equals what was given."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}: JSON has no such number; leave the key out or use null")
        return float(value)
    if isinstance(value, list | tuple):
        return [_as_json(item, f"{path}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{path} has the key {key!r} of type {type(key).__name__}: expected a string")
        return {str.__str__(key): _as_json(item, f"{path}.{key}") for key, item in value.items()}
    raise ValueError(f"{path} is a {type(value).__name__}: expected null, bool, int, float, str, list or dict")
