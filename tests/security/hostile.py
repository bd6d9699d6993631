"""What somebody who means harm would put into files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def armed_pickle(mark: Path, protocol: int = 4) -> bytes:
    """A pickle with the payload; the test that uses it shows that it works."""
    return pickle.dumps({"weight": Payload(mark)}, protocol=protocol)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """An entry of such a header; two float32 unless told otherwise."""
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets}
