"""SimpleCIL: the frozen backbone with a classifier from class statistics; nothing is trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from loda.backbone import Backbone
from loda.methods.base import Method, MethodSettings, Observation


class SimpleCilSettings(MethodSettings):
    """Which classifier the frozen features get."""

    name: Literal["simplecil"] = "simplecil"
    classifier: Literal["class_means", "lda"] = "class_means"


class SimpleCil(Method):
    """Cosine to the class means of frozen features; ``classifier: lda`` is the stronger frozen floor (ours to offer).

    The result doesn't depend on the order of tasks.
    """

    name = "simplecil"
    summary = "frozen backbone, class means; no training"
    source = "Zhou et al. 2023, SimpleCIL (arXiv 2303.07338)"
    Settings = SimpleCilSettings
    trains: ClassVar[bool] = False

    settings: SimpleCilSettings

    def adapt_reads(self, position: int) -> dict[str, Any]:
        return {}

    def classifier(self) -> str:
        return self.settings.classifier

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        return {}
