"""The registry of methods: one file each, one interface (``loda.methods.base``)."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

from loda.methods.base import Method, MethodSettings
from loda.methods.bilora import BiLora
from loda.methods.coso import Coso
from loda.methods.expert_pool import ExpertPool
from loda.methods.gainlora import GainLora
from loda.methods.icmlora import IcmLora
from loda.methods.inflora import InfLora
from loda.methods.joint import Joint
from loda.methods.keeplora import KeepLora
from loda.methods.loda import Loda
from loda.methods.lora_pm import LoraPm
from loda.methods.mtllora import MtlLora
from loda.methods.olora import OLora
from loda.methods.ortholora import OrthoLora
from loda.methods.ranpac import RanPac
from loda.methods.sdlora import SdLora
from loda.methods.sequential import Sequential
from loda.methods.simplecil import SimpleCil
from loda.methods.slao import Slao
from loda.methods.thanora import ThanoRa

logger = logging.getLogger(__name__)

BUILT_IN: tuple[type[Method], ...] = (
    Loda,
    Sequential,
    Joint,
    SimpleCil,
    RanPac,
    InfLora,
    SdLora,
    OLora,
    KeepLora,
    Slao,
    Coso,
    LoraPm,
    GainLora,
    ExpertPool,
    OrthoLora,
    MtlLora,
    ThanoRa,
    BiLora,
    IcmLora,
)


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by name; third parties add theirs through the entry point group ``loda.methods``."""
    methods: dict[str, type[Method]] = {method.name: method for method in BUILT_IN}
    for entry in metadata.entry_points(group="loda.methods"):
        try:
            method = entry.load()
            if not (isinstance(method, type) and issubclass(method, Method)):
                raise TypeError(f"{entry.value} is not a subclass of loda.methods.base.Method")
        except Exception as error:  # a broken plug-in must not take the built-in methods with it
            logger.warning("method plug-in %r skipped: %s", entry.name, error)
            continue
        if method.name in methods:
            logger.warning("method plug-in %r skipped: the name %r is taken", entry.name, method.name)
            continue
        methods[method.name] = method
    return methods


def method_settings(values: Mapping[str, Any]) -> MethodSettings:
    """The settings object of the method that ``values['name']`` names.

    Raises:
        ValueError: unknown method; the nearest name is suggested.
        pydantic.ValidationError: unknown or wrong settings.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected a mapping with a key 'name', but got {values!r}")
    values = {str(key): value for key, value in values.items()}
    name = values.get("name", "loda")
    methods = registry()
    if not isinstance(name, str):
        raise ValueError(f"name: expected a method's name, but got {name!r} (known: {', '.join(sorted(methods))})")
    if name not in methods:
        near = difflib.get_close_matches(str(name), methods, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}{hint} (known: {', '.join(sorted(methods))})")
    return methods[name].Settings(**{**values, "name": name})


def preset(name: str) -> dict[str, Any]:
    """The values of a method's paper by key path, its name among them: what ``Study.with_values`` takes.

    They are the paper's where they differ from the defaults of a run; most papers used ViT-B/16 on ImageNet-21k.

    Raises:
        ValueError: unknown method.
    """
    method = registry()[method_settings({"name": name}).name]
    return {"method.name": method.name, **method.published}


def build_method(settings: MethodSettings) -> Method:
    """A fresh instance, with nothing remembered yet."""
    return registry()[settings.name](settings)


__all__ = ["Method", "MethodSettings", "build_method", "method_settings", "preset", "registry"]
