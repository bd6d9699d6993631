"""Settings of a run: what the numbers depend on, validated once, at the edge."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializeAsAny, field_validator

from loda.augment import AugmentationSettings
from loda.backbone import Precision
from loda.classifier import ClassifierKind
from loda.methods import method_settings
from loda.methods.base import MethodSettings
from loda.strict import StrictModel

Seed = Field(0, ge=0)


class Section(StrictModel):
    """One section of a study file."""


class StreamSettings(Section):
    """Which images, and how their classes are cut into tasks."""

    dataset: str = Field("alphabets", description="alphabets | parquet:PATH | a registered name")
    tasks: PositiveInt | None = Field(5, description="null: one task per natural group of the dataset")
    partition: Literal["auto", "natural", "random", "published"] = "auto"
    validation: float = Field(0.2, ge=0, lt=1, description="share of each class's training images held out")
    partition_seed: int = Seed
    resize: PositiveInt | None = Field(
        None, description="short side before the centre is cut out; null: the backbone's image size (published: 256)"
    )


class BackboneSettings(Section):
    """The frozen, pre-trained vision transformer and the linear layers that are adapted."""

    name: str = Field("alphabet_vit", description="the bundled alphabet_vit, or any timm name")
    weights: str | None = Field(None, description="a safetensors file; 'random' for a seeded random start")
    pretrained: bool = Field(False, description="fetch timm's published weights")
    image_size: PositiveInt | None = Field(None, description="null: the backbone's own")
    normalization: Literal["backbone", "none"] = Field(
        "backbone", description="mean and std of the backbone's config, or none (published LoDA runs)"
    )
    target: tuple[str, ...] = Field(("attn.qkv",), min_length=1, description="suffixes of the adapted linear layers")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")


class TrainingSettings(Section):
    """How each task is trained; defaults not given by the study file are the published ones where there are any."""

    epochs: PositiveInt = Field(5, description="published: 20")
    batch_size: PositiveInt = 48
    lr: PositiveFloat = 0.01
    head_lr: PositiveFloat | None = Field(None, description="null: lr, as published")
    weight_decay: float = Field(5e-4, ge=0)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    augmentation: AugmentationSettings = AugmentationSettings()
    seed: int = Seed


class HeadSettings(Section):
    """Heads, loss and the final classifier; every method has them alike."""

    start: Literal["random", "class_means"] = Field("random", description="published: random")
    scale: PositiveFloat = 20.0
    margin: float = Field(0.0, ge=0, lt=1)
    classifier: ClassifierKind = Field("trained", description="published: trained")
    shrinkage: float = Field(0.1, ge=0, le=1, description="of the shared covariance (classifier: lda)")
    drift: Literal["none", "linear"] = Field("none", description="published: none")
    drift_ridge: PositiveFloat = 0.1
    alignment: bool = Field(False, description="classifier alignment, the published option +CA")
    alignment_epochs: PositiveInt = 5
    alignment_samples: PositiveInt = 256
    logit_norm: PositiveFloat = 0.2


class ComputeSettings(Section):
    """What the bits depend on beside the settings: device, precision and threads."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt = Field(1, description="torch threads of a worker; more change the last bits")
    batch_size: PositiveInt = Field(256, description="images a forward pass without gradient")
    precision: Precision = Field("float32", description="of the backbone's products; weights stay float32")
    pixel_cache: str | None = Field(
        None, description="a directory of this machine for decoded images, shared by its workers; null: memory"
    )
    pixel_cache_gb: PositiveFloat | None = Field(None, description="most that they may take there, in 10^9 bytes")


class RunSettings(Section):
    """One setting of one method on one stream: all that a sequence of stages is a function of, but the order."""

    stream: StreamSettings = StreamSettings()
    backbone: BackboneSettings = BackboneSettings()
    method: SerializeAsAny[MethodSettings] = Field(default_factory=lambda: method_settings({"name": "loda"}))
    training: TrainingSettings = TrainingSettings()
    head: HeadSettings = HeadSettings()
    compute: ComputeSettings = ComputeSettings()

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return value if isinstance(value, MethodSettings) else method_settings(value)
