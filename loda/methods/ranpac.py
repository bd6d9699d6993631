"""RanPAC: ridge regression on random features of the frozen backbone; no layer is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from loda.backbone import Backbone
from loda.energy import pack_symmetric, unpack_symmetric
from loda.methods.base import Method, MethodSettings, Observation
from loda.seeds import generator

RIDGES = tuple(10.0**power for power in range(-8, 9))  # published
TRAIN_SHARE = 0.8  # published: the ridge is chosen on the other fifth of the task's training images


class RanPacSettings(MethodSettings):
    """Published: 10000 random features; their Gram matrix then takes 400 MB between tasks, with 2000 it takes 16 MB."""

    name: Literal["ranpac"] = "ranpac"
    projection: PositiveInt = Field(2000, description="random features; published: 10000")
    ridge: PositiveFloat | None = Field(None, description="null: chosen from 1e-8 to 1e8 on held-out training images")
    projection_seed: int = Field(0, ge=0)


class RanPac(Method):
    """``h = relu(z W_r)``, W_r Gaussian; classes are scored by ``h (HᵀH + λI)⁻¹ HᵀY`` over all images seen.

    ``HᵀH`` and ``HᵀY`` are sums over images, in float64: with λ fixed the result doesn't depend on the order of tasks.
    λ is chosen anew after each task, by the squared error on a fifth of that task's training images, fitted on the
    other four. Left out: the optional adaptation of the backbone on the first task.
    """

    name = "ranpac"
    summary = "frozen backbone, ridge regression on random features; no training"
    source = "McDonnell et al. 2023, NeurIPS, RanPAC (arXiv 2307.02251)"
    Settings = RanPacSettings
    trains: ClassVar[bool] = False
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"  # a column of HᵀY a class
    export_refusal: ClassVar[str] = "its classifier isn't linear in the features, but in random features of them"
    published: ClassVar[Mapping[str, Any]] = {"method.projection": 10000}

    settings: RanPacSettings

    def __init__(self, settings: RanPacSettings) -> None:
        super().__init__(settings)
        self.gram_MM = torch.zeros(settings.projection, settings.projection, dtype=torch.float64)
        self.products_MC = torch.zeros(settings.projection, 0, dtype=torch.float64)
        self.ridge = torch.zeros(1, dtype=torch.float64)

    def adapt_reads(self, position: int) -> dict[str, Any]:
        return {}

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return self.settings.model_dump(exclude={"name"})

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        model.attach()

    def merged(self, model: Backbone, observation: Observation, adapted: Any) -> dict[str, Tensor]:
        return {}

    def classifier(self) -> str:
        return "ranpac"

    def random_features(self, features_ND: Tensor) -> Tensor:
        """(N, M) float64."""
        draws = generator(self.settings.projection_seed, "ranpac projection", features_ND.shape[1])
        projection_DM = torch.randn(features_ND.shape[1], self.settings.projection, generator=draws)
        return F.relu(features_ND.double() @ projection_DM.double())

    def learn_classifier(self, features_ND: Tensor, labels_N: Tensor) -> None:
        h_NM = self.random_features(features_ND)
        y_NC = F.one_hot(labels_N).double()
        gram_MM = h_NM.mT @ h_NM
        self.gram_MM = self.gram_MM + (gram_MM + gram_MM.mT) / 2  # symmetric to the last bit, as it is stored
        self.products_MC = torch.cat([self.products_MC, h_NM.mT @ y_NC], dim=1)
        ridge = self.settings.ridge or self._chosen_ridge(h_NM, y_NC)
        self.ridge = torch.tensor([ridge], dtype=torch.float64)
        self.facts["ridge"] = ridge

    def _chosen_ridge(self, h_NM: Tensor, y_NC: Tensor) -> float:
        """The ridge with the least squared error on held-out images; one eigendecomposition serves all of them."""
        draws = generator(self.settings.projection_seed, "ranpac held out", len(h_NM))
        fitted, held_out = torch.randperm(len(h_NM), generator=draws).tensor_split([int(TRAIN_SHARE * len(h_NM))])
        if len(fitted) == 0 or len(held_out) == 0:  # a handful of images: nothing to choose by
            return 1.0
        train_nM, test_mM = h_NM[fitted], h_NM[held_out]
        # (HᵀH + λI)⁻¹Hᵀ = Hᵀ(HHᵀ + λI)⁻¹: the smaller of the two matrices is decomposed.
        kernel = len(fitted) <= h_NM.shape[1]
        gram = train_nM @ train_nM.mT if kernel else train_nM.mT @ train_nM
        values, vectors = torch.linalg.eigh(gram)
        left = (test_mM @ train_nM.mT if kernel else test_mM) @ vectors
        right = vectors.mT @ (y_NC[fitted] if kernel else train_nM.mT @ y_NC[fitted])
        errors = [float(F.mse_loss((left / (values.clamp_min(0) + ridge)) @ right, y_NC[held_out])) for ridge in RIDGES]
        return RIDGES[errors.index(min(errors))]

    def logits(self, features_ND: Tensor) -> Tensor:
        eye_MM = torch.eye(len(self.gram_MM), dtype=torch.float64)
        weight_MC = torch.linalg.solve(self.gram_MM + self.ridge * eye_MM, self.products_MC)
        return torch.cat([self.random_features(part_BD) @ weight_MC for part_BD in features_ND.split(1000)])

    def state_tensors(self) -> dict[str, Tensor]:
        return {"gram": pack_symmetric(self.gram_MM[None])[0], "products": self.products_MC, "ridge": self.ridge}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        self.gram_MM = unpack_symmetric(tensors["gram"][None])[0]
        self.products_MC, self.ridge = tensors["products"], tensors["ridge"]
