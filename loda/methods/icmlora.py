"""ICM-LoRA: a generator of the tasks' LoRAs; each image gets the one of the task whose vector is nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.generator import LoraGenerator, Scaling, trained_generator
from loda.gradients import LossGradients
from loda.methods.base import Batch, Learner, Observation
from loda.methods.pairs import PairMethod, PairSettings


class IcmLoraSettings(PairSettings):
    """Published: rank 4, latent 256, KL weight 0.005; LoRA on q and v, where ours is on the run's target layers."""

    name: Literal["icmlora"] = "icmlora"  # type: ignore[assignment]
    rank: PositiveInt = Field(4, description="of each task's LoRA")
    snapshots: PositiveInt = Field(4, description="LoRAs a task that the generator learns from: after its last steps")
    latent: PositiveInt = Field(256, description="width of the generator's latent code")
    kl_weight: float = Field(0.005, ge=0, description="of the generator's Kullback-Leibler term")
    generator_steps: PositiveInt = Field(300, description="Adam steps of the generator after each task")
    generator_lr: PositiveFloat = Field(1e-3, description="of the generator")
    generator_seed: int = Field(0, ge=0, description="draws the generator's start and noise")


class IcmLora(PairMethod):
    """Each task trains a LoRA of its own on the frozen backbone; a conditional variational autoencoder generates them.

    A task's vector c_t is the mean class token of its training images in the frozen backbone. The generator learns
    z-scored, flattened LoRAs with c_t as condition, and ``decode(0, c_t)`` is what predicts for task t: an image's
    class token in the frozen backbone is compared with all c_t, and the nearest one's LoRA is used (two passes an
    image). Head and class statistics are those of the other methods.

    Ours, where the rule leaves it open: the LoRAs of a task are those after its last four steps; they are kept, and
    the generator is trained anew on all of them after each task, so that it forgets none; conditions are standardised
    over tasks; distances are Euclidean.
    """

    name = "icmlora"
    summary = "a generator conditioned on task vectors gives each task's LoRA; images go to the nearest task"
    source = "Shao et al. 2025, IJCAI, ICM-LoRA (arXiv 2501.17635)"
    Settings = IcmLoraSettings
    mergeable: ClassVar[bool] = False
    export_refusal: ClassVar[str] = "each image is sent to its nearest task's LoRA, which no single weight can do"
    prediction = "routed"
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"
    published: ClassVar[Mapping[str, Any]] = {"method.rank": 4, "method.latent": 256, "method.kl_weight": 0.005}

    settings: IcmLoraSettings

    def __init__(self, settings: IcmLoraSettings) -> None:
        super().__init__(settings)
        self.snapshots: list[Tensor] = []  # (K, P), each task's
        self.vectors: list[Tensor] = []  # (D,) float64
        self.generated: list[Tensor] = []  # (P,)
        self.recent: list[Tensor] = []  # while training
        self.vector: Tensor | None = None

    def adapt_reads(self, position: int) -> dict[str, Any]:
        return self.settings.model_dump(include={"rank", "scale", "start_seed", "snapshots"})

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return self.settings.model_dump(exclude={"name", "rank", "scale", "start_seed", "snapshots"})

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        assert observation.gradients is not None
        model.detach()
        self.vector = mean_feature(observation.gradients)
        super().begin_task(model, observation)

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        loss = super().training_step(learner, batch)
        self.recent = [*self.recent, _flat(learner.model)][-self.settings.snapshots :]
        return loss

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        assert self.vector is not None
        missing = self.settings.snapshots - len(self.recent)
        return {"snapshots": torch.stack([self.recent[0]] * missing + self.recent), "vector": self.vector}

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        self.snapshots.append(self.trained["snapshots"])
        self.vectors.append(self.trained["vector"])
        fitted, scaling, condition_TD = self.fit()
        with torch.no_grad():
            code_TZ = torch.zeros(len(condition_TD), self.settings.latent)
            generated_TP = scaling.undo(fitted.decode(code_TZ, condition_TD)).float()
        distances_TT = torch.cdist(generated_TP.double(), torch.stack(self.snapshots).mean(1).double().cpu())
        self.facts["generated_nearest_to"] = distances_TT.argmin(1).tolist()
        self.generated = [lora_P.to(model.device) for lora_P in generated_TP]
        return {}

    def fit(self) -> tuple[LoraGenerator, Scaling, Tensor]:
        """The generator of all tasks' LoRAs so far, their scaling, and the tasks' conditions (T, D)."""
        read = self.settings
        samples_NP = torch.cat(self.snapshots).cpu()
        scaling = Scaling.of(samples_NP)
        condition_TD = standardised(torch.stack(self.vectors).cpu())
        fitted = trained_generator(
            scaling.apply(samples_NP),
            condition_TD.repeat_interleave(read.snapshots, dim=0),
            latent=read.latent,
            kl_weight=read.kl_weight,
            steps=read.generator_steps,
            lr=read.generator_lr,
            seed=read.generator_seed,
        )
        return fitted, scaling, condition_TD

    def attach_for_prediction(self, model: Backbone) -> None:
        if not self.generated:
            return
        model.attach()
        for task, lora_P in enumerate(self.generated):
            start = 0
            for branched in model.attached.values():
                d_in, d_out = branched.base.in_features, branched.base.out_features
                rank, sizes = self.settings.rank, (self.settings.rank * d_in, self.settings.rank * d_out)
                down_P, up_P = lora_P[start : start + sum(sizes)].split(sizes)
                branched.add(
                    f"task{task}",
                    down_P.view(rank, d_in),
                    up_P.view(d_out, rank),
                    scale=self.settings.scale,
                    train_down=False,
                    train_up=False,
                )
                start += sum(sizes)
        NearestTask(torch.stack(self.vectors)).attach(model)

    def weights_at_rest(self, factors: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        return ()

    def state_tensors(self) -> dict[str, Tensor]:
        if not self.generated:
            return {}
        parts = {"snapshots": self.snapshots, "vectors": self.vectors, "generated": self.generated}
        return {name: torch.stack(tensors) for name, tensors in parts.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.snapshots, self.vectors, self.generated = (
            list(tensors[name].to(model.device)) for name in ("snapshots", "vectors", "generated")
        )


class NearestTask:
    """Sends each image to the task whose vector is nearest to its class token in the frozen backbone.

    Args:
        vectors_TD: one a task, in the order of every layer's branches.
    """

    def __init__(self, vectors_TD: Tensor) -> None:
        self.vectors_TD = vectors_TD
        self.weights_BT: Tensor | None = None

    def attach(self, model: Backbone) -> None:
        """Weigh the branches that are attached to ``model``: one for the nearest task, zero for the others."""

        def route(images_BCHW: Tensor) -> None:
            self.weights_BT = images_BCHW.new_zeros(len(images_BCHW), len(self.vectors_TD))
            frozen_BD = model.model(images_BCHW)  # with no branch at work
            nearest_B = torch.cdist(frozen_BD.double(), self.vectors_TD).argmin(1)
            self.weights_BT = torch.nn.functional.one_hot(nearest_B, len(self.vectors_TD)).to(images_BCHW)

        def weigh(x: Tensor) -> Tensor:
            assert self.weights_BT is not None
            return self.weights_BT

        model.route = route
        for branched in model.attached.values():
            branched.weigh = weigh


def standardised(vectors_TD: Tensor) -> Tensor:
    """Task vectors less their mean, over their root mean square: what tells tasks apart, at the scale of one."""
    centred_TD = vectors_TD.double() - vectors_TD.double().mean(0)
    size = centred_TD.square().mean().sqrt()
    return (centred_TD / size if float(size) > 0 else centred_TD).float()


@torch.no_grad()
def mean_feature(images: LossGradients) -> Tensor:
    """(D,) float64 mean class token of a task's training images with the backbone as it stands."""
    model = images.model
    total_D = torch.zeros(model.feature_width, dtype=torch.float64, device=model.device)
    for batch in torch.arange(len(images.labels_N)).split(images.batch_size):
        share = images.group.share(batch)
        if len(share):
            inputs = model.normalize(images.images_NCHW[share].to(model.device).float() / 255)
            total_D += model.features(inputs).double().sum(0)
    images.group.sum_([total_D])
    return total_D / len(images.labels_N)


def _flat(model: Backbone) -> Tensor:
    """All trained pairs in one vector, layer after layer, A then B."""
    pairs = [branched.branches["lora"] for branched in model.attached.values()]
    return torch.cat([part.detach().flatten() for pair in pairs for part in (pair.down, pair.up)])
