"""LoDA and the methods it is compared with: class-incremental learning with low-rank adaptation, without replay.

The names below load on first use, so that light-weight parts (errors, metrics) don't pay for timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ConfigError": "loda.errors",
    "RunSettings": "loda.settings",
    "StageError": "loda.errors",
    "load_run_settings": "loda.run",
    "run_sequence": "loda.run",
}
_MODULES = (
    "alignment",
    "backbone",
    "branch",
    "classifier",
    "datasets",
    "energy",
    "gao",
    "gradients",
    "head",
    "memory",
    "methods",
    "metrics",
    "moments",
    "recalibration",
    "sketch",
    "stage",
    "state",
    "stream",
    "subspace",
)

__all__ = sorted([*_EXPORTS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"loda.{name}")
    raise AttributeError(f"module 'loda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
