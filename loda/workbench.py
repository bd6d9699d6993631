"""Everything that the stages of one run share in a process: backbone, images, tasks, splits, device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.datasets import ImageDataset, load_dataset
from loda.distributed import WorkerGroup
from loda.errors import ConfigError
from loda.methods import build_method
from loda.methods.base import Method
from loda.moments import LayerMoments, MomentRecorder, by_width
from loda.pixels import PixelCache, check_limit, open_pixels
from loda.settings import RunSettings
from loda.state import Artifact
from loda.stream import Task, partition_classes, split_indices
from loda.timm_models import build_backbone

# Part of every stage key: raise it when the shared numerics change.
NUMERICS_VERSION = 1


def canonical_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def resolve_device(name: str) -> str:
    """``auto`` is the accelerator if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device: 'cuda' asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@dataclass
class Workbench:
    """Built once a process by :func:`open_workbench`; stages set the backbone's weights as they need them."""

    settings: RunSettings
    dataset: ImageDataset
    tasks: tuple[Task, ...]
    splits: Mapping[str, np.ndarray]
    backbone: Backbone
    group: WorkerGroup
    root_key: str
    _decoded: dict[int, Tensor] = field(default_factory=dict)
    _pixels: list[PixelCache] = field(default_factory=list)  # none yet, or the one that is open
    frozen_probes: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def with_settings(self, settings: RunSettings) -> Workbench:
        """The same data and backbone under other settings.

        Raises:
            ConfigError: they ask for other data, another backbone or other computing.
        """
        for section in ("stream", "backbone", "compute"):
            if getattr(settings, section) != getattr(self.settings, section):
                raise ConfigError(f"{section}: differs from what this workbench was opened with; open another one")
        return dataclasses.replace(self, settings=settings)

    def indices(self, classes: Sequence[int], split: str) -> np.ndarray:
        """Rows of these classes in a split, in file order."""
        rows = self.splits[split]
        return rows[np.isin(self.dataset.labels[rows], classes)]

    def images(self, rows: np.ndarray) -> Tensor:
        """uint8 (n, C, S, S); each image is decoded once a process, or once a machine with ``compute.pixel_cache``."""
        directory, inputs = self.settings.compute.pixel_cache, self.backbone.inputs
        if directory is not None:
            if not self._pixels:  # only now: planning a study needs no pixels
                self._pixels.append(
                    open_pixels(
                        self.dataset,
                        inputs.image_size,
                        inputs.channels,
                        directory,
                        resize=self.settings.stream.resize,
                    )
                )
            return self._pixels[0].images(rows)
        missing = [int(row) for row in rows if int(row) not in self._decoded]
        if missing:
            batch = self.dataset.decode(
                np.asarray(missing), inputs.image_size, inputs.channels, self.settings.stream.resize
            )
            self._decoded.update(zip(missing, batch, strict=True))
        return torch.stack([self._decoded[int(row)] for row in rows])

    def labels(self, rows: np.ndarray, classes: Sequence[int]) -> Tensor:
        """Positions in ``classes`` of the rows' labels, (n,) int64."""
        position = {label: index for index, label in enumerate(classes)}
        return torch.tensor([position[int(label)] for label in self.dataset.labels[rows]], dtype=torch.int64)

    def tasks_of(self, method: Method, prefix: Sequence[int], rows: np.ndarray) -> Tensor | None:
        """Which task of the prefix each row's image is of, (n,) int64, where the method may know it; else None."""
        if not (method.knows_tasks or method.needs_task_id):
            return None
        task_of = {label: t for t, index in enumerate(prefix) for label in self.tasks[index].classes}
        return torch.tensor([task_of[int(label)] for label in self.dataset.labels[rows]], dtype=torch.int64)

    def rest(self, method: Method, factors: Sequence[Mapping[str, Tensor]]) -> None:
        """Bring the backbone to what the method predicts with after the tasks of these merged factors."""
        self.backbone.detach()
        self.backbone.load_merges(method.weights_at_rest(factors))
        method.attach_for_prediction(self.backbone)

    @torch.inference_mode()
    def pass_over(
        self,
        images_NCHW: Tensor,
        record_moments: bool = False,
        *,
        modules: Mapping[str, nn.Module] | None = None,
        tasks_N: Tensor | None = None,
    ) -> tuple[Tensor, LayerMoments | None]:
        """One forward pass without gradient: features (n, D) float32 on the CPU and, if asked, the layers' moments.

        Workers take a share of each batch; sums and features are exchanged at the end.

        Args:
            images_NCHW: uint8.
            record_moments: of the inputs of ``modules``, linear layers by name; None: of the adapted layers.
            modules: see ``record_moments``.
            tasks_N: each image's task, for methods that need it.
        """
        backbone = self.backbone
        recorder = None
        if record_moments:
            if modules is None:
                modules = {name: backbone.model.get_submodule(name) for name in backbone.layers}
            recorder = MomentRecorder(modules, by_width(modules), backbone.device)
        features_ND = torch.zeros(len(images_NCHW), backbone.feature_width, device=backbone.device)
        try:
            for batch in torch.arange(len(images_NCHW)).split(self.settings.compute.batch_size):
                share = self.group.share(batch)
                if len(share):
                    inputs = backbone.normalize(images_NCHW[share].to(backbone.device).float() / 255)
                    tasks = None if tasks_N is None else tasks_N[share].to(backbone.device)
                    features_ND[share.to(backbone.device)] = backbone.features(inputs, tasks)
        finally:
            if recorder is not None:
                recorder.close()
        self.group.sum_([features_ND])
        if recorder is None:
            return features_ND.cpu(), None
        for sums in recorder.sums.values():
            self.group.sum_([sums.sums_LDD, sums.tokens_L])
        return features_ND.cpu(), recorder.value()


MERGED = "merge/"


def merge_factors(artifact: Artifact) -> dict[str, Tensor]:
    """What a consolidated task adds to the weights."""
    return {name.removeprefix(MERGED): t for name, t in artifact.tensors.items() if name.startswith(MERGED)}


def memory_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """What the method remembers after a task."""
    return {name.removeprefix("memory/"): t for name, t in artifact.tensors.items() if name.startswith("memory/")}


def method_after(bench: Workbench, chain: Sequence[Artifact]) -> Method:
    """The run's method with what it remembers after these consolidated stages, first task first."""
    method = build_method(bench.settings.method)
    memory = memory_tensors(chain[-1]) if chain else {}
    if memory:
        method.load_state_tensors(memory, bench.backbone)
    return method


def memory_bytes(artifact: Artifact) -> int:
    """What the method keeps between tasks beside the merged weights, the heads and the class statistics."""
    return sum(tensor.nbytes for tensor in memory_tensors(artifact).values())


def open_workbench(
    settings: RunSettings, group: WorkerGroup | None = None, dataset: ImageDataset | None = None
) -> Workbench:
    """Load data and backbone and check that all settings fit together.

    Sets the number of torch threads of this process, which is one of the settings.

    Raises:
        ConfigError: every problem found, at once.
    """
    group = group or WorkerGroup.current()
    torch.set_num_threads(settings.compute.threads)
    problems: list[str] = []
    backbone: Backbone | None = None
    tasks: tuple[Task, ...] = ()
    try:
        device = resolve_device(settings.compute.device)
        backbone = build_backbone(**settings.backbone.model_dump(), device=device)
        problems += build_method(settings.method).problems(backbone.widths)
    except ConfigError as error:
        problems += error.problems
    try:
        dataset = dataset or load_dataset(settings.stream.dataset)
        stream = settings.stream
        tasks = partition_classes(dataset, stream.tasks, stream.partition_seed, stream.partition)
        problems += build_method(settings.method).stream_problems(len(tasks))
        splits = split_indices(dataset, stream.validation, stream.partition_seed)
    except ConfigError as error:
        problems += error.problems
    resize = settings.stream.resize
    if backbone is not None and resize is not None and resize < backbone.inputs.image_size:
        size = backbone.inputs.image_size
        problems.append(f"stream.resize: {resize} is less than the {size} pixels that the backbone takes")
    if problems or backbone is None or dataset is None:
        raise ConfigError(problems)
    backbone.precision = settings.compute.precision
    root: dict[str, Any] = {
        "numerics": NUMERICS_VERSION,
        "backbone": backbone.digest,
        "data": dataset.digest,
        "inputs": vars(backbone.inputs),
        "layers": backbone.layers,
        "splits": canonical_digest([splits["train"].tolist(), splits["validation"].tolist()]),
        "compute": {
            "device": backbone.device.type,
            "threads": settings.compute.threads,
            "workers": group.size,
            "batch": settings.compute.batch_size,
            # Keys were first given out when float32 was all there was.
            **({} if backbone.precision == "float32" else {"precision": backbone.precision}),
        },
    }
    if resize is not None:  # studies from before this setting keep their keys
        root["resize"] = resize
    if settings.compute.pixel_cache is not None and settings.compute.pixel_cache_gb is not None:
        limit = int(settings.compute.pixel_cache_gb * 1e9)
        check_limit(dataset, backbone.inputs.image_size, backbone.inputs.channels, limit)
    return Workbench(settings, dataset, tasks, splits, backbone, group, canonical_digest(root))
