"""Secrets of the environment and of addresses: known by their names, and never in what is shown or written."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import fs

from loda.errors import ConfigError
from orchestrate.redaction import expand, guard_logs, is_secret_name, literal_secret, redact, secret_values, secrets_in
from orchestrate.storage import open_filesystem
from orchestrate.study import load_study, parse_study

SECRET = 'pa55/wo"rd&ü@x'  # with every sign that some notation writes otherwise


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", SECRET)


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "PGPASSWORD",
        "KEY", "API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS",
        "RAY_AUTH_TOKEN", "x.passwd",
        "WANDB_API_KEY", "SSH_PASSPHRASE", "github_token", "SENTRY_DSN", "MYSQL_PWD", "CLIENT_SECRET", "OPENAI_APIKEY",
    ],
)  # fmt: skip
def test_names_that_look_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["PWD", "OLDPWD", "PATH", "HOME", "KEYBOARD", "TOKENIZERS_PARALLELISM", "MONKEY", "COMPASS", "AUTHOR", "LANG"],
)
def test_names_that_do_not(name: str) -> None:
    assert not is_secret_name(name)


def test_values_that_are_no_secrets(tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.touch()
    environment = {
        "A_TOKEN": "abc",
        "B_KEY": "default",
        "GOOGLE_APPLICATION_CREDENTIALS": str(file),
        "C_SECRET": "longer!",
    }
    assert secret_values(environment) == {"C_SECRET": "longer!"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p%40ss@host/db", "postgresql://***@host/db"),
        ("http://host/x?token=abc&run=1", "http://host/x?token=***&run=1"),
        ("http://:pw@host and https://a:b@c", "http://***@host and https://***@c"),
        ("postgresql://me:p@ss@host/db", "postgresql://***@host/db"),
        ("https://ghp_0123456789@host/x", "https://***@host/x"),
        ("s3://bucket/x?region=eu&secret_key=a%2Fb&endpoint_override=127.0.0.1:9000",
         "s3://bucket/x?region=eu&secret_key=***&endpoint_override=127.0.0.1:9000"),
        ("https://x.blob/a?sv=1&sig=abc%3D", "https://x.blob/a?sv=1&sig=***"),
        ("postgresql://me:${DB_PASSWORD}@host/db", "postgresql://me:${DB_PASSWORD}@host/db"),
        ("postgresql://${USER_NAME}:${DB_PASSWORD}@host/db", "postgresql://${USER_NAME}:${DB_PASSWORD}@host/db"),
        ("http://host/x?token=${HF_TOKEN}", "http://host/x?token=${HF_TOKEN}"),
        ("http://127.0.0.1:5000/#/x?orderByKey=metrics.objective", "http://127.0.0.1:5000/#/x?orderByKey=metrics.objective"),
        ("method.rank: 4, a@b", "method.rank: 4, a@b"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_secrets(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize("form", ["plain", "json", "quoted", "html"])
def test_values_of_the_environment_in_every_notation(form: str) -> None:
    import html
    import json
    from urllib.parse import quote

    written = {
        "plain": SECRET, "json": json.dumps(SECRET), "quoted": quote(SECRET, safe=""), "html": html.escape(SECRET)
    }[form]  # fmt: skip
    assert redact(f"before {written} after").replace('"', "") == "before *** after"


def test_of_two_secrets_the_longer_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdef")
    monkeypatch.setenv("B_TOKEN", "abcdef-and-more")
    assert redact("x abcdef-and-more y abcdef") == "x *** y ***"


@pytest.mark.parametrize(
    ("setting", "uri"),
    [
        ("tracking.uri", "postgresql://me:hunter22@host/db"),
        ("tracking.uri", "https://host/?api_key=hunter22"),
        ("tracking.uri", "https://hunter22@host"),
        ("tracking.uri", "postgresql://me:${A}hunter22@host/db"),
        ("resources.store", "s3://AKIAKEY:hunter22@bucket/x"),
        ("resources.store", "s3://bucket/x?secret_key=hunter22"),
        ("resources.address", "ray://me:hunter22@host:10001"),
    ],
)
def test_a_literal_secret_in_a_study_is_refused_with_advice(tmp_path: Path, setting: str, uri: str) -> None:
    section, key = setting.split(".")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({section: {key: uri}}))
    with pytest.raises(ConfigError) as refused:
        load_study(tmp_path / "study.yaml")
    (problem,) = refused.value.problems
    assert setting in problem
    assert "write ${NAME} in its place" in problem
    assert "hunter22" not in problem
    with pytest.raises(ConfigError, match=setting):
        parse_study({}, "study").with_values({setting: uri})


TAKEN = """
postgresql://me:${DB_PASSWORD}@host/db  postgresql://host/db  http://127.0.0.1:5000  sqlite:////x/y@z/mlflow.db
s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:9000  s3://${A_KEY}:${B_KEY}@bucket/x  stages  /a/b@c
"""


@pytest.mark.parametrize("uri", TAKEN.split())
def test_addresses_without_a_literal_secret_are_taken_and_kept_as_written(uri: str) -> None:
    assert literal_secret(uri) is None
    study = parse_study({"resources": {"store": uri}}, "study")
    assert study.resources.store == uri
    assert parse_study(yaml.safe_load(redact(study.to_yaml())), "again") == study


def test_names_are_expanded_only_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_USER", "me")
    monkeypatch.setenv("MLFLOW_ADDRESS", "http://127.0.0.1:5000")
    quoted = "pa55%2Fwo%22rd%26%C3%BC%40x"
    assert expand("postgresql://${DB_USER}:${DB_PASSWORD}@host/db", "x") == f"postgresql://me:{quoted}@host/db"
    assert expand("${MLFLOW_ADDRESS}", "x") == "http://127.0.0.1:5000"
    assert expand("sqlite:////x/${DB_USER}/mlflow.db", "x") == "sqlite:////x/me/mlflow.db"
    assert expand("stages/${DB_USER}", "x") == "stages/${DB_USER}"  # a path is a path
    with pytest.raises(ConfigError, match=r"tracking\.uri: .* aren't set here: ABSENT_A, ABSENT_B; set them"):
        expand("postgresql://${ABSENT_A}:${ABSENT_B}@host/${DB_USER}", "tracking.uri")


def test_the_store_connects_with_the_expanded_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_KEY_ID", "AKIAKEY")
    uri = "s3://${STORE_KEY_ID}:${DB_PASSWORD}@bucket/stages?scheme=http&endpoint_override=127.0.0.1:9&region=eu"
    filesystem, path = open_filesystem(uri)
    assert path == "bucket/stages"
    expected = fs.S3FileSystem(
        access_key="AKIAKEY", secret_key=SECRET, scheme="http", endpoint_override="127.0.0.1:9", region="eu"
    )
    assert filesystem.equals(expected)
    with pytest.raises(ConfigError) as refused:
        open_filesystem("ftp://${STORE_KEY_ID}:${DB_PASSWORD}@host/x")
    assert SECRET not in str(refused.value)
    assert "pa55" not in str(refused.value)


def test_a_study_that_holds_the_value_of_a_secret_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    values: dict[str, Any] = {
        "stream": {"dataset": "plug:hf_0123456789"},
        "backbone": {"target": ["a", "hf_0123456789"]},
    }
    found = list(secrets_in(values))
    assert [problem.split(":")[0] for problem in found] == ["stream.dataset", "backbone.target[1]"]
    assert all("HF_TOKEN" in problem and "hf_0123456789" not in problem for problem in found)


LOGS = f"""
import logging
from orchestrate.redaction import guard_logs
logging.basicConfig(level="INFO")
guard_logs()
guard_logs()
logging.getLogger("any.library").warning("connect to %s as %s", "http://u:hunter22@host", {SECRET!r})
logging.info("%d", "not a number")
try:
    raise OSError("no answer from http://u:hunter22@host")
except OSError:
    logging.exception("failed")
raise RuntimeError("at http://u:hunter22@host with " + {SECRET!r})
"""


def test_logs_and_tracebacks_of_all_libraries_are_redacted() -> None:
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True)
    assert done.returncode == 1
    written = done.stdout + done.stderr
    assert "connect to http://***@host as ***" in written
    assert "OSError: no answer from http://***@host" in written
    assert "RuntimeError: at http://***@host with ***" in written
    assert "hunter22" not in written.replace(LOGS, "")
    assert SECRET not in written


def test_a_record_without_secrets_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory(), sys.excepthook
    try:
        guard_logs()
        logging.getLogger("x").warning("trial %s of %d", "a", 3)
        assert caplog.records[-1].args == ("a", 3)
    finally:
        logging.setLogRecordFactory(before[0])
        sys.excepthook = before[1]
