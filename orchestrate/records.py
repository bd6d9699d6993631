"""Documents and tables of a run folder, read back: bounded, and only what lies in the folder itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from loda.errors import ConfigError
from loda.reading import ReadingError, inside, read_frame, read_json


def read_record(file: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """A JSON document of a run folder.

    Args:
        file: in the folder; a link that leads out of it is refused.
        keys: that it must have.

    Raises:
        ConfigError: it can't be read, or lacks a key.
    """
    try:
        values = read_json(inside(file.parent, file))
        if not isinstance(values, dict):
            raise ReadingError(f"expected a mapping, but it is a {type(values).__name__}")
        if missing := [key for key in keys if key not in values]:
            raise ReadingError(f"it has no {', '.join(missing)}")
    except (ReadingError, OSError) as error:
        raise ConfigError(f"{file} can't be read: {error}; remove it, and run its command again") from error
    return values


def read_table(file: Path, columns: Collection[str] = ()) -> pd.DataFrame:
    """A Parquet file of a run folder, with at least these columns unless it is empty; raises as :func:`read_record`."""
    try:
        table = read_frame(inside(file.parent, file))
        if len(table) and (missing := [name for name in columns if name not in table]):
            raise ReadingError(f"it has no column {', '.join(missing)}")
    except (ReadingError, OSError) as error:
        raise ConfigError(f"{file} can't be read: {error}; remove it, and run the study's command again") from error
    return table
