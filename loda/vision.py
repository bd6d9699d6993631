"""The one door to timm and torchvision.

The published torchvision wheel is a CUDA build; beside a CPU build of torch its import dies with
``operator torchvision::nms does not exist`` (pytorch/vision#9085). Declaring the two operator schemas
first lets it import; nothing here uses them. Machines whose torch has CUDA or HIP are left alone.
"""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # the declaration lives as long as this object


def _torchvision_build() -> str:
    """The build tag of the installed torchvision ("cu130", "cpu", "" ...), read without importing it."""
    spec = util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return ""
    version_file = Path(spec.origin).with_name("version.py")
    found = re.search(r"__version__\s*=\s*['\"][^'\"+]*\+([^'\"]+)", version_file.read_text(encoding="utf-8"))
    return found.group(1) if found else ""


def _declare_missing_operators() -> None:
    global _library
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    if not _torchvision_build().startswith(("cu", "rocm")):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_missing_operators()

import timm  # noqa: E402
from timm.layers import resample_abs_pos_embed  # noqa: E402

__all__ = ["resample_abs_pos_embed", "timm"]
