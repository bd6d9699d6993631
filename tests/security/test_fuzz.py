"""Whatever a study, a search space, a list of orders or a manifest holds: a value or a clear error, in bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loda.errors import ConfigError, StageError
from loda.reading import ReadingError, parse_json, parse_safetensors, parse_yaml
from loda.run import load_run_settings
from loda.state import META_FILE, TENSORS_FILE, Artifact
from orchestrate.manifest import DamagedEntryError, load_artifact, load_manifest, load_meta, make_manifest
from orchestrate.operations import checked_operation
from orchestrate.order_files import orders_from_file
from orchestrate.space import load_space, parse_space
from orchestrate.study import Study, load_study, parse_study
from tests.orchestrate.searching import PARAMETERS

SECONDS = 8.0  # for one input of a few hundred kilobytes at most; usually milliseconds
FUZZ = settings(
    max_examples=120, deadline=SECONDS * 1000, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
KEY = "ab" * 32

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**63, 2**64, 10**30, 1e308, -1e308, 5e-324]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(["loda", "sequential", "float", "int", "categorical", "training.lr", "..", "a/b", "\x00", "[x"]),
)
SECTIONS = list(Study.model_fields)
KEYS = ["parameters", "points", "type", "low", "high", "log", "step", "choices", "when", "otherwise", "training.lr"]
OTHER_KEYS = ["method.gao", "tune", "evaluate", "lr", "epochs", "uri", "store", "options", "seed", "space"]
WORDS = st.sampled_from(SECTIONS + KEYS + OTHER_KEYS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(WORDS, st.text(max_size=6)), inner, max_size=5)
    ),
    max_leaves=25,
)
OBJECTS = st.dictionaries(st.one_of(WORDS, st.text(max_size=6)), VALUES, max_size=6)


@st.composite
def grafted(draw: st.DrawFn, sound: dict[str, Any]) -> Any:
    """A sound document with a value, anywhere in it, replaced by any other."""
    copy = json.loads(json.dumps(sound))
    place: Any = copy
    while True:
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        inner = place[key]
        if not inner or not isinstance(inner, dict | list) or draw(st.booleans()):
            place[key] = draw(VALUES)
            return copy
        place = inner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def refused_or_read(read: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """The value, None if it was refused as it should be; any other exception fails the test."""
    started = time.monotonic()
    try:
        return read()
    except refusals as error:
        assert str(error)
        assert len(str(error)) < 1_000_000
        return None
    finally:
        assert time.monotonic() - started < SECONDS


def read_documents(folder: Path, content: bytes) -> None:
    """All readers of YAML documents on one content."""
    file = folder / "document.yaml"
    file.write_bytes(content)
    study = refused_or_read(lambda: load_study(file), ConfigError)
    if study is not None:
        assert isinstance(study.digest, str)
        assert parse_study(parse_yaml(study.to_yaml()), "again") == study
    refused_or_read(lambda: load_run_settings(file), ConfigError)
    space = refused_or_read(lambda: load_space(file), ConfigError)
    if space is not None:
        refused_or_read(lambda: space.problems(Study()) + space.outside(Study()), ConfigError)
    refused_or_read(lambda: orders_from_file(file, 3, 1, 1, ["a", "b", "c"]), ConfigError)


@FUZZ
@given(content=st.binary(max_size=400))
def test_any_bytes(folder: Path, content: bytes) -> None:
    read_documents(folder, content)
    for parse in (parse_yaml, parse_json, parse_safetensors):
        refused_or_read(lambda parse=parse: parse(content), ReadingError)  # type: ignore[misc]


_SIGNS = ["- ", ": ", "\n", "\n  ", "[", "]", "{", "}", ", ", "? ", "&a ", "*a", "<<: ", "> ", "| ", "# ", "---\n"]
_PLAIN = ["a", "lr", "tune", "''", "=", "~", "\t", "\x00", "\ufeff", "_", "+", "%YAML 9.9\n"]
_TAGS = ["int", "float", "bool", "null", "seq", "set", "binary", "timestamp", "merge", "python/object/apply:os.system"]
_NUMBERS = ["1:2:3", "1:99.5", "1e999", ".nan", "-.inf", "2024-13-45", "0o9", "0b", "1_000"]
_TEXTS = ['"\\ud800"', '"\\U00110000"', "2024-01-01 25:00:00", "9" * 5000, "0x" + "f" * 900, "!x ", "!<", "| "]
PIECES = st.sampled_from(_SIGNS + _PLAIN + [f"!!{tag} " for tag in _TAGS] + _NUMBERS + _TEXTS)


@FUZZ
@given(pieces=st.lists(PIECES, max_size=14))
def test_pieces_of_yaml(folder: Path, pieces: list[str]) -> None:
    read_documents(folder, "".join(pieces).encode("utf-8", "surrogatepass"))


@FUZZ
@given(value=st.one_of(VALUES, OBJECTS))
def test_any_nested_value(folder: Path, value: Any) -> None:
    read_documents(folder, yaml.safe_dump(value).encode())
    refused_or_read(lambda: parse_study(value, "study"), ConfigError)
    refused_or_read(lambda: parse_space(value, "space"), ConfigError)


SOUND_STUDY = Study().resolved()
SOUND_SPACE = {"method": "loda", "description": "d", "parameters": PARAMETERS, "points": [{"training.lr": 0.01}]}


@FUZZ
@given(values=grafted(SOUND_STUDY))
def test_a_study_with_a_value_replaced(folder: Path, values: Any) -> None:
    read_documents(folder, yaml.safe_dump(values).encode())


@FUZZ
@given(values=grafted(SOUND_SPACE))
def test_a_search_space_with_a_value_replaced(folder: Path, values: Any) -> None:
    read_documents(folder, yaml.safe_dump(values).encode())


class Held:
    """Entries that hold one manifest and two files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def read(self, key: str, name: str, limit: int) -> bytes:
        return self.files[name][: limit + 1]


ARTIFACT = Artifact({}, {"correct": [1, 2]}, {"seconds": 1.5}).to_files()
MANIFEST = json.loads(make_manifest(KEY, "adapt", json.loads(ARTIFACT[META_FILE])["digest"], ARTIFACT, {"torch": "2"}))
MANIFEST["created"] = "2026-01-01T00:00:00.000+00:00"  # the same examples at every run


def read_entry(manifest: bytes, files: dict[str, bytes]) -> None:
    entries: Any = Held({**files, "manifest.json": manifest})
    found = refused_or_read(lambda: load_manifest(entries, KEY), DamagedEntryError)
    if found is not None:
        refused_or_read(lambda: load_meta(entries, KEY, found), DamagedEntryError)
        refused_or_read(lambda: load_artifact(entries, KEY, found), DamagedEntryError)


def sealed(values: Any) -> bytes:
    """A manifest with the checksum that its author would give it."""
    from loda.state import canonical_json
    from orchestrate.manifest import _sha256

    rest = {name: value for name, value in values.items() if name != "sha256"}
    try:
        return json.dumps({**rest, "sha256": _sha256(canonical_json(rest))}).encode()
    except ValueError:
        return json.dumps(values).encode()


@FUZZ
@given(content=st.binary(max_size=300), values=grafted(MANIFEST))
def test_any_manifest(content: bytes, values: Any) -> None:
    read_entry(content, ARTIFACT)
    read_entry(json.dumps(values).encode(), ARTIFACT)
    read_entry(sealed(values), ARTIFACT)


@FUZZ
@given(values=grafted(json.loads(ARTIFACT[META_FILE])), tensors=st.one_of(st.binary(max_size=80), st.just(None)))
def test_any_facts_and_tensors_under_a_sound_manifest(values: Any, tensors: bytes | None) -> None:
    meta = json.dumps(values).encode()
    files = {META_FILE: meta, TENSORS_FILE: ARTIFACT[TENSORS_FILE] if tensors is None else tensors}
    digest = values.get("digest") if isinstance(values, dict) else ""
    read_entry(make_manifest(KEY, "adapt", digest if isinstance(digest, str) else "", files, {}), files)
    refused_or_read(lambda: Artifact.from_files(files), StageError)


SOUND_OPERATION = {
    "do": "run", "key": "digest/trial-1", "parent": "digest", "name": "n", "tags": {"a": "b"}, "params": {"c": "d"},
    "time": 1,
}  # fmt: skip


@FUZZ
@given(value=st.one_of(VALUES, grafted(SOUND_OPERATION)))
def test_any_line_of_a_spool(folder: Path, value: Any) -> None:
    refused_or_read(lambda: checked_operation(value, folder), ReadingError)
