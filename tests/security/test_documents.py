"""Studies, search spaces, lists of orders and run folders that mean harm: one clear error, quickly, exit code 2."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from loda.errors import ConfigError
from loda.reading import (
    DOCUMENT_BYTES,
    ReadingError,
    inside,
    parse_json,
    parse_yaml,
    plain_name,
    read_bytes,
    read_yaml,
    relative_name,
)
from loda.run import load_run_settings
from orchestrate.catalogue import catalogue
from orchestrate.order_files import orders_from_file
from orchestrate.records import read_record, read_table
from orchestrate.session import read_command, read_run_study
from orchestrate.space import load_space, parse_space
from orchestrate.study import Study, load_study
from tests.e2e.studies import call
from tests.orchestrate.searching import PARAMETERS

LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {a: 1, b: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)
DOCUMENTS: dict[str, tuple[str, str]] = {
    "an object of Python": ("name: !!python/object/apply:os.mkdir [MARK]", "the tag 'python/object/apply:os.mkdir'"),
    "a module of Python": ("name: !!python/module:os", "the tag 'python/module:os'"),
    "a tag of its own": ("name: !secret x", "the tag '!secret'"),
    "binary": ("name: !!binary aGVsbG8=", "the tag 'binary'"),
    "a set": ("orders: !!set {a, b}", "the tag 'set'"),
    "billion laughs": (LAUGHS, "stands for more than 100,000 values, with aliases"),
    "billion laughs by merging": (MERGES, "stands for more than 100,000 values, with aliases"),
    "an alias of itself": ("name: &a [*a]", "an alias stands for what it is a part of"),
    "an alias of what is around it": ("&a name: {x: &b {y: [*b]}}", "an alias stands for what it is a part of"),
    "brackets without end": ("[" * 10_000, "nested deeper than 64 levels"),
    "dashes without end": ("- " * 10_000, "nested deeper than 64 levels"),
    "a number without end": ("name: " + "9" * 100_000, "a whole number of 100000 digits"),
    "a hexadecimal number": ("name: 0x" + "f" * 100, "a whole number of more than 128 bits"),
    "half a character": ('name: "\\ud800"', "half a character"),
    "more than its bound": ("#" * (DOCUMENT_BYTES + 1), "1,048,577 bytes, expected at most 1,048,576"),
    "a bool that is none": ("name: !!bool maybe", "not valid YAML"),
    "two documents": ("name: a\n---\nname: b", "not valid YAML"),
}


@pytest.mark.parametrize("what", DOCUMENTS)
def test_every_reader_of_yaml_refuses_it(tmp_path: Path, what: str) -> None:
    text, reason = DOCUMENTS[what]
    file = tmp_path / "hostile.yaml"
    file.write_text(text.replace("MARK", str(tmp_path / "mark")))
    readers = [load_study, load_run_settings, load_space, lambda f: orders_from_file(f, 3, 1, 1, None)]
    for read in readers:
        started = time.monotonic()
        with pytest.raises(ConfigError) as refused:
            read(file)
        assert reason in str(refused.value)
        assert "hostile.yaml" in str(refused.value)
        assert len(str(refused.value)) < 2000
        assert time.monotonic() - started < 8
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("command", ["plan", "run", "sweep", "doctor"])
def test_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "hostile.yaml").write_text(DOCUMENTS["an object of Python"][0].replace("MARK", str(tmp_path / "mark")))
    done = call(tmp_path, command, "hostile.yaml", patch=monkeypatch, capture=capsys)
    assert done.code == 2
    assert "hostile.yaml: line 1: the tag 'python/object/apply:os.mkdir' is not taken" in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.yaml"]


def test_the_option_set_takes_plain_values_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change = f"name=!!python/object/apply:os.mkdir [{tmp_path / 'mark'}]"
    done = call(tmp_path, "plan", "alphabets", "-s", change, patch=monkeypatch, capture=capsys)
    assert (done.code, (tmp_path / "mark").exists()) == (2, False)
    assert "is not a YAML value" in done.err


def test_more_values_than_the_bound_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ReadingError, match="more than 100,000 values"):
        parse_yaml("a: [" + "1," * 500_000 + "]")
    assert time.monotonic() - started < 20
    (tmp_path / "study.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"study\.yaml: not valid YAML"):
        load_study(tmp_path / "study.yaml")


def test_what_people_write_is_read_as_before() -> None:
    text = "a: &x {lr: 0.1, n: 1_000}\nb: {<<: *x, lr: 2e-3}\nc: [on, ~, 'a', 0x1F, .5, *x]\nd: 2026-02-30\n? 7\n: e\n"
    expected = yaml.safe_load(text.replace("2026-02-30", "'2026-02-30'"))
    assert parse_yaml(text) == expected
    assert parse_yaml(text.encode("utf-16")) == expected
    assert parse_yaml(json.dumps({"a": [1, 2.5, None, True, "ü\n"]})) == {"a": [1, 2.5, None, True, "ü\n"]}
    assert parse_yaml("") is None
    assert parse_yaml(yaml.safe_dump(Study().resolved())) == Study().resolved()


LARGE_SPACES: dict[str, tuple[dict[str, Any], str]] = {
    "choices": ({"a": {"type": "categorical", "choices": list(range(20_000))}}, "20000, expected at most 1000"),
    "parameters": (
        {f"p{n}": {"type": "categorical", "choices": [1]} for n in range(5000)},
        "5000, expected at most 200",
    ),
    "switches": ({f"p{n}": {"type": "categorical", "choices": [1, 2]} for n in range(40)}, "1099511627776 positions"),
    "a name": ({"x" * 100_000: {"type": "categorical", "choices": [1]}}, "a name of more than 200 characters"),
    "a condition": (
        {"a": {"type": "categorical", "choices": [1], "when": {"y" * 100_000: 1}}},
        "a name of more than 200 characters",
    ),
    "steps without end": (
        {"training.lr": {"type": "float", "low": -1e308, "high": 1e308, "step": 5e-324}},
        "can't be reached from low",
    ),
}


@pytest.mark.parametrize("what", LARGE_SPACES)
def test_a_search_space_that_would_take_for_ever(what: str) -> None:
    parameters, reason = LARGE_SPACES[what]
    started = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as refused:
        parse_space({"method": "loda", "parameters": parameters}, "space.yaml")
    assert len(str(refused.value)) < 3000
    assert time.monotonic() - started < 2


def test_points_without_end_and_values_that_are_folders_of_values() -> None:
    points = [{"training.lr": 0.01}] * 5000
    with pytest.raises(ConfigError, match="points: 5000, expected at most 1000"):
        parse_space({"method": "loda", "parameters": PARAMETERS, "points": points}, "space.yaml")
    for values in ({"method": ["loda"], "parameters": PARAMETERS}, {"method": "loda", "parameters": ["x" * 10**6]}):
        with pytest.raises(ConfigError) as refused:
            parse_space(values, "space.yaml")
        assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b", "..", "", "a\\b", ".hidden", "a\n", "x" * 200])
def test_a_study_name_stays_in_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": name}))
    with pytest.raises(ConfigError, match="name"):
        load_study(tmp_path / "study.yaml")


@pytest.mark.timeout(20)
def test_pipes_devices_and_folders_are_no_documents(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file, error in ((tmp_path / "pipe", ReadingError), (Path("/dev/zero"), ReadingError), (tmp_path, OSError)):
        with pytest.raises(error):
            read_yaml(file)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(ReadingError, match="a pipe, a socket or a device"):
        read_bytes(tmp_path / "link", 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ReadingError, match="11 bytes, expected at most 10"):
        read_bytes(tmp_path / "large", 10)
    (tmp_path / "other").symlink_to(tmp_path / "large")  # a link that the user made
    assert read_bytes(tmp_path / "other", 11) == b"x" * 11


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\\b", "a\0b", "a\nb", "é" * 128, 7, None, ["a"]])
def test_names_that_lead_out(name: Any) -> None:
    with pytest.raises(ReadingError, match="is no plain file name"):
        plain_name(name)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/a", "", "a/\0", 7, "a\\..\\b"])
def test_paths_that_lead_out(name: Any) -> None:
    with pytest.raises(ReadingError, match="is no path inside its folder"):
        relative_name(name)
    assert relative_name("figures/a.png") == "figures/a.png"
    assert plain_name("ünï code.png") == "ünï code.png"


def test_inside_follows_links(tmp_path: Path) -> None:
    (tmp_path / "root/deep").mkdir(parents=True)
    (tmp_path / "root/out").symlink_to(tmp_path)
    (tmp_path / "root/in").symlink_to(tmp_path / "root/deep")
    (tmp_path / "door").symlink_to(tmp_path / "root")
    for good in ("root/deep/x", "root/in/x", "door/deep", "root"):
        assert inside(tmp_path / "root", tmp_path / good) == tmp_path / good
    for bad in ("root/out/secret", "root/../secret", "secret", "rootless"):
        with pytest.raises(ReadingError, match="leads out of"):
            inside(tmp_path / "root", tmp_path / bad)


def test_json_within_bounds() -> None:
    assert parse_json('{"a": [1, -2.5, null, NaN]}')["a"][:3] == [1, -2.5, None]
    for text, reason in (("[" * 65 + "]" * 65, "64 levels"), ("9" * 40, "40 digits"), ("{", "not valid JSON")):
        with pytest.raises(ReadingError, match=reason):
            parse_json(text)
    with pytest.raises(ReadingError, match="NaN isn't JSON"):
        parse_json("[NaN]", constants=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(Study(name="tiny").to_yaml())
    return folder


def test_files_of_a_run_folder_that_lead_out_of_it(run: Path, tmp_path: Path) -> None:
    for name in ("study.yaml", "summary.json", "results.parquet", "command"):
        (tmp_path / "secret").write_text("{}")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"study\.yaml can't be read: .* leads out of"):
        read_run_study(run)
    with pytest.raises(ConfigError, match=r"summary\.json can't be read: .* leads out of"):
        read_record(run / "summary.json")
    with pytest.raises(ConfigError, match=r"results\.parquet can't be read: .* leads out of"):
        read_table(run / "results.parquet")
    with pytest.raises(ConfigError, match=r"command can't be read: .* leads out of"):
        read_command(run)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "expected a mapping"),
        ("{}", "it has no a_last"),
        ("[" * 10**5, "not valid JSON"),
        ("\x00", "not valid JSON"),
    ],
)
def test_records_that_are_none(run: Path, content: str, reason: str) -> None:
    (run / "summary.json").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        read_record(run / "summary.json", ("a_last",))
    with pytest.raises(ConfigError, match=r"summary\.json can't be read"):
        catalogue(run.parent)
