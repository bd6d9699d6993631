"""The strict form of what waits for MLflow on disk: a spool is replayed only as far as it says what we could have said.

Whoever can write a run folder could otherwise have any file of this machine uploaded to a server, or a file written
anywhere, when the study is next resumed.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from loda.reading import ReadingError, inside, plain_name, relative_name

Key = Annotated[str, Field(pattern=r"^[\w.\-/]+$", max_length=1000)]  # of a run; it stands in a filter, between quotes
Milliseconds = Annotated[int, Field(ge=0, lt=2**53)]


class _Operation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    key: Key


class Run(_Operation):
    """A run to be made or found."""

    do: Literal["run"]
    parent: Key | None
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    time: Milliseconds


class Describe(_Operation):
    """A description; the empty key is the experiment."""

    do: Literal["describe"]
    key: Key | Literal[""]  # type: ignore[assignment]
    text: str


class Metrics(_Operation):
    """Rows of name, value, time and step."""

    do: Literal["metrics"]
    metrics: list[Annotated[list[str | float | int], Field(min_length=4, max_length=4)]]

    @field_validator("metrics")
    @classmethod
    def _rows(cls, rows: list[list[Any]]) -> list[list[Any]]:
        for name, value, time, step in rows:
            if not isinstance(name, str) or isinstance(value, str) or type(time) is not int or type(step) is not int:
                raise ValueError("expected rows of name, value, time and step")
        return rows


class Files(_Operation):
    """Small files by name, in base 64."""

    do: Literal["files"]
    folder: str | None
    files: dict[str, str]

    @field_validator("folder")
    @classmethod
    def _folder(cls, folder: str | None) -> str | None:
        return folder if folder is None else relative_name(folder)

    @field_validator("files")
    @classmethod
    def _files(cls, files: dict[str, str]) -> dict[str, str]:
        for name, content in files.items():
            plain_name(name)
            try:
                base64.b64decode(content, validate=True)
            except binascii.Error as error:
                raise ValueError(f"{name}: {error}") from error
        return files


class Data(_Operation):
    """A dataset as a run's input."""

    do: Literal["data"]
    name: str
    digest: str
    source: str
    context: str


class Best(_Operation):
    """The trial that is the best of a study."""

    do: Literal["best"]
    trial: Key


class End(_Operation):
    """A run's end."""

    do: Literal["end"]
    status: Literal["FINISHED", "FAILED", "KILLED"]
    metrics: dict[str, float]
    tags: dict[str, str]
    time: Milliseconds


class Register(_Operation):
    """A model's files, in a folder beside the spool."""

    do: Literal["register"]
    directory: str
    name: Annotated[str, Field(pattern=r"^[\w.\- ]+$", max_length=200)]  # it stands in a filter, between quotes
    alias: str
    tags: dict[str, str]


_form: TypeAdapter[Any] = TypeAdapter(
    Annotated[Run | Describe | Metrics | Files | Data | Best | End | Register, Field(discriminator="do")]
)


def checked_operation(value: Any, folder: Path) -> dict[str, Any]:
    """The operation as it was, if it has the form of one that :class:`orchestrate.tracking.Tracker` writes.

    Args:
        value: read from a spool.
        folder: where the spool lies; a model to be registered must lie in it, links followed.

    Raises:
        ReadingError: another form, a name that leads out of a folder, or files from elsewhere.
    """
    try:
        found = _form.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:3])
        raise ReadingError(f"no operation of ours: {where + ': ' if where else ''}{first['msg']}") from error
    if isinstance(found, Register):
        directory = inside(folder, found.directory)
        for path in directory.rglob("*"):
            inside(folder, path)
    return value
