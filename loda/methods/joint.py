"""Joint training: one stage over all classes, the usual upper bound."""

from __future__ import annotations

from typing import ClassVar, Literal

from loda.methods.sequential import Sequential, SequentialSettings


class JointSettings(SequentialSettings):
    """As sequential LoRA."""

    name: Literal["joint"] = "joint"  # type: ignore[assignment]


class Joint(Sequential):
    """LoRA on all classes at once. Not continual: the order of tasks and how classes are cut don't matter to it."""

    name = "joint"
    summary = "one LoRA pair on all classes at once (upper bound)"
    source = "Hu et al. 2022, LoRA (arXiv 2106.09685)"
    Settings = JointSettings
    joint: ClassVar[bool] = True
