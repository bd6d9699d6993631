"""Write the tables of docs/study-file.md from the settings' own models: ``python docs/study_keys.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loda.methods import BUILT_IN, Method
from orchestrate.study import Study

PAGE = Path(__file__).with_name("study-file.md")
BEGIN, END = "<!-- keys: written by docs/study_keys.py -->", "<!-- end of keys -->"

# What the models' own descriptions leave to say.
TEXTS = {
    "name": "name of the study: of its results, its MLflow experiment and its Optuna study",
    "stream.partition": "how classes become tasks: natural groups of the dataset, or random; auto takes groups if any",
    "stream.partition_seed": "draws which classes form a task",
    "training.epochs": "passes over a task's training images",
    "training.batch_size": "images an optimiser step",
    "training.lr": "learning rate of the branches at the start of the cosine schedule",
    "training.weight_decay": "of branches and heads",
    "training.optimizer": "of branches and heads; Adam's other values are torch's defaults",
    "training.momentum": "of SGD",
    "training.seed": "draws batches, views and the method's own choices",
    "head.scale": "factor on the cosines in the loss",
    "head.margin": "CosFace margin on the true class's cosine",
    "head.drift_ridge": "ridge of the linear drift map",
    "head.alignment_epochs": "passes over the drawn features",
    "head.alignment_samples": "drawn features a class",
    "head.logit_norm": "alignment: factor on the mean norm by which logits are divided",
    "compute.device": "where stages are computed",
    "orders.design": "how task orders are chosen",
    "orders.tune": "orders that a setting is searched on",
    "orders.evaluate": "other orders that the chosen setting is judged on; not read by all, tree, kind: class",
    "orders.seed": "draws the orders",
    "search.trials": "settings to try",
    "search.sampler": "Optuna's sampler",
    "search.seed": "of the sampler",
    "search.objective.metric": "what an order is scored by, on validation images",
    "search.objective.across_orders": "how the orders' scores become one",
    "resources.cpus_per_worker": "CPUs that Ray sets aside for a worker",
    "resources.gpus_per_worker": "GPUs that Ray sets aside for a worker; fractions share one",
    "tracking.register_model": "register the chosen setting's merged model",
    "method.name": "which method",
    "method.rank_general": "directions of the general branch",
    "method.rank_isolated": "directions of the isolated branch",
    "method.energy_isolated": "as energy_general, by generalised eigenvalues",
    "method.gao": "gradient-aligned optimisation: two steps a batch across halves of its classes",
    "method.rho_max": "longest look ahead of a gradient-aligned step",
    "method.recalibration": "of the general branch before it is merged",
    "method.gamma_m": "weight of the new task in the recalibration",
    "method.rank": "directions of the LoRA pair",
    "method.start_seed": "draws the down-projection's start",
    "method.projection_seed": "draws the random projection, and which images choose the ridge",
    "method.classifier": "cosine to class means, or shared-covariance discriminant analysis",
}
# He et al. 2026 (arXiv 2603.00191): ViT-B/16, ImageNet-21k; several values are those of different benchmarks.
PUBLISHED = {
    "stream.tasks": "10 (ImageNet-R: 20)",
    "stream.validation": "0: none held out",
    "backbone.name": "vit_base_patch16_224.augreg_in21k",
    "backbone.image_size": "224",
    "backbone.normalization": "none",
    "backbone.target": "attn.qkv",
    "training.epochs": "20",
    "training.batch_size": "48",
    "training.lr": "0.005 to 0.02",
    "training.head_lr": "as lr",
    "training.weight_decay": "0.0005 (ImageNet-R: 0)",
    "training.optimizer": "sgd",
    "training.momentum": "0.9",
    "training.augmentation.crop_scale": "0.05",
    "training.augmentation.flip": "true",
    "head.start": "random",
    "head.scale": "20",
    "head.margin": "0 to 0.15",
    "head.classifier": "trained",
    "head.drift": "none",
    "head.alignment": "false; true as +CA",
    "head.alignment_epochs": "5",
    "head.alignment_samples": "256",
    "head.logit_norm": "0.1 to 0.3",
    "method.rank_general": "32 (ImageNet-R also 64)",
    "method.rank_isolated": "32 (ImageNet-R also 64)",
    "method.energy_general": "null",
    "method.energy_isolated": "null",
    "method.gao": "true",
    "method.rho_max": "0.3 (Cars 0.5, ImageNet-R 0.7)",
    "method.rho_scale": "absolute",
    "method.recalibration": "diagonal",
    "method.gamma_m": "3",
    "method.old_count": "2",
}


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def choices(field: FieldInfo) -> str:
    """The values of a setting that has only a few."""
    found: list[str] = []

    def collect(annotation: Any) -> None:
        if get_origin(annotation) is Literal:
            found.extend(f"`{value}`" for value in get_args(annotation))
        else:
            for inner in get_args(annotation):
                collect(inner)

    collect(field.annotation if get_args(field.annotation) else None)
    return ", ".join(found) if len(found) > 1 else ""


def rows(model: type[BaseModel], prefix: str, own: Mapping[str, str] = {}) -> list[tuple[str, str]]:
    """Key path and table row of every setting of a section, sub-sections included.

    ``own`` are a method's published values, which go before LoDA's.
    """
    found = []
    for key, field in model.model_fields.items():
        path = f"{prefix}{key}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += rows(inner, f"{path}.")
            continue
        default = json.loads(json.dumps(field.get_default(call_default_factory=True)))
        parts = [TEXTS.get(path, ""), choices(field), field.description or ""]
        text = "; ".join(part for part in parts if part).replace("|", "\\|")
        published = own.get(path, PUBLISHED.get(path, ""))
        found.append((path, f"| `{path}` | {shown(default)} | {text or '?'} | {published} |"))
    return found


def own(method: type[Method]) -> dict[str, str]:
    """A method's published values; those of LoDA are said in more words above."""
    if method.name == "loda":
        return {}
    blank = {f"method.{key}": "" for key in method.Settings.model_fields}
    return blank | {path: json.dumps(value) for path, value in method.published.items()}


HEADER = "| key | default | what it does | published |\n|---|---|---|---|"


def tables() -> dict[str, list[tuple[str, str]]]:
    """Rows by section; the settings of each method are a section of their own."""
    found: dict[str, list[tuple[str, str]]] = {"Name": []}
    for key, field in Study.model_fields.items():
        inner = field.annotation
        if key == "method":
            for method in BUILT_IN:
                found[f"`method` with `name: {method.name}`: {method.summary}"] = rows(
                    method.Settings, "method.", own(method)
                )
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            found[f"`{key}`"] = rows(inner, f"{key}.")
        else:
            text = f"| `{key}` | {shown(field.default)} | {TEXTS[key]} | |"
            found["Name"].append((key, text))
    return found


def render() -> str:
    """All tables, as they stand between the two marks of the page."""
    parts = [f"### {title}\n\n{HEADER}\n" + "\n".join(row for _, row in found) for title, found in tables().items()]
    return "\n\n".join(parts)


def written(page: str) -> str:
    """The page with fresh tables."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
