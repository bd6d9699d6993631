"""Secrets stay where they are: in the environment, and in the addresses that are made of it to connect.

What is written or shown (logs, MLflow, results, reports, run folders) goes through :func:`redact`; a study names
secrets as ``${NAME}``, and only who connects asks for their values (:func:`expand`). Importing this is cheap.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from loda.errors import ConfigError

MARK = "***"
_SECRET_WORDS = "TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|PASS|PWD|KEYS?|CREDENTIALS?|AUTH|DSN|COOKIE"
_SECRET_NAME = re.compile(rf"(?:^|[_.-])(?:[A-Z0-9]*(?:PASSWORD|SECRET|TOKEN|APIKEY)|{_SECRET_WORDS})(?:$|[_.-])", re.I)
_NO_SECRETS = frozenset({"PWD", "OLDPWD"})  # working directories
_SHORTEST = 6  # characters; a shorter value would be found in ordinary words
_WORDS = frozenset({"disabled", "enabled", "default", "required", "optional", "ignore", "system", "keyring"})

_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Up to the last @ before the path: passwords hold unquoted ones, too.
_USER_INFORMATION = re.compile(r"(?<=://)([^/\s'\"?#<>]*)@")
_SECRET_QUERY = re.compile(
    r"([?&;](?:[^=&\s]*[_.-])?(?:password|passwd|pwd|token|secret|credential|signature|sig|auth|key|"
    r"[a-z]*(?:password|token|secret|apikey|accesskey|secretkey))=)([^&\s'\"]+)",
    re.I,
)
_ADVICE = (
    "it would be in run folders, in MLflow and in reports; write ${NAME} in its place, as in "
    "postgresql://me:${DB_PASSWORD}@host/db, and set that environment variable, which is read only to connect"
)


@cache
def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name is taken to hold a secret (``DB_PASSWORD``, ``HF_TOKEN``, ...)."""
    return name not in _NO_SECRETS and bool(_SECRET_NAME.search(name))


def secret_values(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Secrets of the environment by name: values of 6 characters or more that are no absolute paths of files here."""
    values = os.environ if environment is None else environment
    return {name: value for name, value in values.items() if is_secret_name(name) and _is_secret_value(value)}


@cache
def _is_secret_value(value: str) -> bool:
    if len(value) < _SHORTEST or value.lower() in _WORDS:
        return False
    try:
        return not (Path(value).is_absolute() and Path(value).exists())  # where a secret lies is none
    except (OSError, ValueError):  # too long for a path, or with a zero in it
        return True


@cache
def _forms(value: str) -> tuple[str, ...]:
    """A value as it stands in a text, an address, a JSON document and a page."""
    return tuple(dict.fromkeys((value, quote(value, safe=""), json.dumps(value)[1:-1], html.escape(value))))


def redact(text: str) -> str:
    """The text without secrets: values of the environment, user information and secret values of the query of URIs.

    ``${NAME}`` stays: it is no secret.
    """
    forms = [form for value in secret_values().values() for form in _forms(value)]
    for form in sorted(forms, key=len, reverse=True):  # a value may be part of another
        if form in text:
            text = text.replace(form, MARK)
    text = _USER_INFORMATION.sub(lambda found: f"{_without_password(found[1])}@", text)
    return _SECRET_QUERY.sub(lambda found: found[1] + (MARK if _NAME.sub("", found[2]) else found[2]), text)


def _without_password(user_information: str) -> str:
    user, colon, password = user_information.partition(":")
    # A user alone may be a token; beside a password that the environment holds it is a name.
    named = not _NAME.sub("", password) if colon and password else not _NAME.sub("", user)
    return user_information if named else MARK


def literal_secret(uri: str) -> str | None:
    """What is wrong with a URI that has a secret in it instead of ``${NAME}``, and what to do; None if it hasn't.

    The text never repeats the secret.
    """
    if any(_without_password(found[1]) == MARK for found in _USER_INFORMATION.finditer(uri)):
        return f"{redact(uri)}: a password or token stands in the address; {_ADVICE}"
    if any(_NAME.sub("", found[2]) for found in _SECRET_QUERY.finditer(uri)):
        return f"{redact(uri)}: a secret stands in the query of the address; {_ADVICE}"
    return None


def expand(uri: str, setting: str) -> str:
    """The address with each ``${NAME}`` replaced by that environment variable: to connect, never to write or show.

    In the user information values are percent-encoded, so that a password may hold any sign.

    Args:
        uri: an address; a plain path is left as it is.
        setting: whose value it is, for messages.

    Raises:
        ConfigError: a variable isn't set.
    """
    if "${" not in uri or ("://" not in uri and not _NAME.fullmatch(uri)):
        return uri
    missing = [name for name in _NAME.findall(uri) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{setting}: {redact(uri)} names environment variables that aren't set here: {', '.join(missing)}; "
            "set them for this process (on a cluster: for its nodes)"
        )
    uri = _USER_INFORMATION.sub(
        lambda found: _NAME.sub(lambda name: quote(os.environ[name[1]], safe=""), found[1]) + "@", uri
    )
    return _NAME.sub(lambda name: os.environ[name[1]], uri)


def secrets_in(values: Any, path: str = "") -> Iterator[str]:
    """Sentences about texts of a study that hold the value of a secret environment variable."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from secrets_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from secrets_in(value, f"{path}[{number}]")
    elif isinstance(values, str):
        for name, secret in secret_values().items():
            if len(secret) >= 8 and secret in values:
                yield f"{path}: holds the value of the environment variable {name}; {_ADVICE}"


def guard_logs() -> None:
    """From now on every log record and uncaught traceback of this process is redacted, whoever makes it."""
    before = logging.getLogRecordFactory()
    if getattr(before, "guards_secrets", False):
        return

    def guarded(*arguments: Any, **words: Any) -> logging.LogRecord:
        record = before(*arguments, **words)
        try:
            text = record.getMessage()
        except Exception:  # a record that can't be formatted is its maker's; logging reports it
            return record
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return record

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    guarded.guards_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(guarded)
    sys.excepthook = show
