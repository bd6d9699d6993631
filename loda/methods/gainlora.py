"""GainLoRA: InfLoRA branches that are kept apart, each behind a gate that stays shut for earlier tasks' images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from loda.backbone import Backbone
from loda.gates import Gate, Gates, off_span, random_gate
from loda.memory import SubspaceMemory
from loda.methods.base import Batch, Learner, Observation
from loda.methods.inflora import InfLora, InfLoraSettings
from loda.moments import LayerMoments
from loda.seeds import generator


class GainLoraSettings(InfLoraSettings):
    """As InfLoRA; the gate's memory holds 0.995 of its inputs' energy (published)."""

    name: Literal["gainlora"] = "gainlora"  # type: ignore[assignment]
    gate_hidden: PositiveInt = Field(100, description="width of the gate's hidden layer")
    gate_energy: float = Field(0.995, gt=0, le=1, description="share of the gate's inputs that a new gate ignores")
    gate_seed: int = Field(0, ge=0, description="draws the gates' start")


class GainLora(InfLora):
    """``h = W x + Σ_i g_i(x) B_i A_i x``, ``g = |2σ(b) - 1|`` of the image; branches as InfLoRA's; nothing is merged.

    The gate reads the mean of the frozen patch embedding through one hidden layer. A new gate's hidden layer starts as
    the last gate's, and its output layer starts random, less its part in the span of earlier tasks' hidden features: it
    is silent there. What training adds to each gate layer is kept off the span of that layer's earlier inputs, after
    every step (so momentum and weight decay can't leak into it): ``(G - G_start) M = 0``. Old branches and gates are
    frozen.

    Where new images' patch embeddings average to much what old ones' do, little is left for the gate to open on: on the
    bundled alphabets gates after the first stay below 0.01, so the later branches do next to nothing.

    Departure from the published code: it renormalises the gate's rows after projecting, which breaks that equation; we
    don't. Ours: one hidden layer of 100; the basis M is computed once a task from un-augmented training images.
    """

    name = "gainlora"
    summary = "a stack of InfLoRA branches, each behind a gate that is silent on earlier tasks"
    source = "Liang and Li 2025, GainLoRA (arXiv 2505.15424)"
    Settings = GainLoraSettings
    mergeable: ClassVar[bool] = False
    export_refusal: ClassVar[str] = "its branches are weighed image by image, which no single weight can do"
    prediction = "gated"
    memory_growth: ClassVar[Literal["constant", "bounded", "linear"]] = "linear"
    published: ClassVar[Mapping[str, Any]] = {"method.rank": 4, "method.gate_energy": 0.995}

    settings: GainLoraSettings

    def __init__(self, settings: GainLoraSettings) -> None:
        super().__init__(settings)
        self.gate_memory = SubspaceMemory(dual=False)
        self.stack: dict[str, Tensor] = {}  # <layer>/task<t>/<down|up>
        self.gates: list[list[Tensor]] = []  # each task's gate weights
        self.starts: list[Tensor] = []  # of the gate in training
        self.newest: Gate | None = None  # frozen, while the model is at rest after this task

    def adapt_reads(self, position: int) -> dict[str, Any]:
        read = self.settings
        return super().adapt_reads(position) | {"gate_hidden": read.gate_hidden, "gate_seed": read.gate_seed}

    def consolidate_reads(self, position: int) -> dict[str, Any]:
        return super().consolidate_reads(position) | {"gate_energy": self.settings.gate_energy}

    def begin_task(self, model: Backbone, observation: Observation) -> None:
        super().begin_task(model, observation)
        self._attach_old(model)
        for branched in model.attached.values():  # the newest branch last, as its gate is
            branched.branches[f"task{observation.position}"] = branched.branches.pop("inflora")
        draws = generator(self.settings.gate_seed, "gate", observation.position)
        hidden_HD, output_1H = random_gate(model.feature_width, self.settings.gate_hidden, draws)
        if self.gates:
            hidden_HD = self.gates[-1][0]
            output_1H = off_span(output_1H.to(model.device), self.gate_memory.protected("gate.1"))
        self.starts = [hidden_HD.to(model.device), output_1H.to(model.device)]
        Gates([*(_frozen(weights) for weights in self.gates), Gate(self.starts)]).attach(model)

    def _attach_old(self, model: Backbone) -> None:
        for name, branched in model.attached.items():
            for task in range(len(self.gates)):
                down_rD, up_Or = (self.stack[f"{name}/task{task}/{part}"] for part in ("down", "up"))
                branched.add(f"task{task}", down_rD, up_Or, scale=1.0, train_down=False, train_up=False)

    def training_step(self, learner: Learner, batch: Batch) -> Tensor:
        loss = super().training_step(learner, batch)
        if self.gates:
            with torch.no_grad():
                weights = _gate_in_training(learner.model).weights()
                for index, (weight, start) in enumerate(zip(weights, self.starts, strict=True)):
                    basis_Dk = self.gate_memory.protected(f"gate.{index}")
                    weight.copy_(start + off_span(weight - start, basis_Dk))
        return loss

    def finish_training(self, model: Backbone, observation: Observation) -> dict[str, Tensor]:
        weights = _gate_in_training(model).weights()
        return {f"gate.{index}": weight.detach() for index, weight in enumerate(weights)}

    def merged(self, model: Backbone, observation: Observation, adapted: LayerMoments | None) -> dict[str, Tensor]:
        task = f"task{observation.position}"
        for name, branched in model.attached.items():
            branch = branched.branches[task]
            self.stack[f"{name}/{task}/down"] = branch.down.detach()
            self.stack[f"{name}/{task}/up"] = branch.up.detach()
        self.gates.append([self.trained[f"gate.{index}"] for index in range(len(self.trained))])
        return {}

    def attach_for_prediction(self, model: Backbone) -> None:
        if not self.gates:
            return
        model.attach()
        self._attach_old(model)
        gates = [_frozen(weights) for weights in self.gates]
        self.newest = gates[-1]
        Gates(gates).attach(model)

    def recorded_modules(self, model: Backbone) -> Mapping[str, nn.Module]:
        assert self.newest is not None
        own = {f"gate.{index}": layer for index, layer in enumerate(self.newest.layers)}
        return {**super().recorded_modules(model), **own}

    def end_task(self, observation: Observation, adapted: LayerMoments | None, merged: LayerMoments | None) -> None:
        assert merged is not None
        layers: dict[int, tuple[str, ...]] = {}
        values: dict[int, Tensor] = {}
        for width, names in merged.names.items():
            for index, name in enumerate(names):
                if name.startswith("gate."):
                    self.gate_memory.grow(name, merged.values[width][index], self.settings.gate_energy)
                    self.facts.setdefault("gate_memory", {})[name] = int(self.gate_memory.protected(name).shape[1])
            kept = [index for index, name in enumerate(names) if not name.startswith("gate.")]
            if kept:
                layers[width], values[width] = tuple(names[index] for index in kept), merged.values[width][kept]
        super().end_task(observation, adapted, LayerMoments(layers, values))

    def state_tensors(self) -> dict[str, Tensor]:
        gates = {
            f"weights/{task}.{index}": weight
            for task, weights in enumerate(self.gates)
            for index, weight in enumerate(weights)
        }
        memories = {"layers": self.memory, "gates": self.gate_memory}
        return {
            **{f"stack/{name}": tensor for name, tensor in self.stack.items()},
            **gates,
            **{f"{kind}/{n}": t for kind, memory in memories.items() for n, t in memory.state_tensors().items()},
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor], model: Backbone) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t.to(model.device) for n, t in tensors.items() if n.startswith(prefix)}

        self.stack, weights = part("stack/"), part("weights/")
        tasks = 1 + max(int(name.partition(".")[0]) for name in weights)
        layers = len(weights) // tasks
        self.gates = [[weights[f"{task}.{index}"] for index in range(layers)] for task in range(tasks)]
        self.memory.load_state_tensors(part("layers/"), model.device)
        self.gate_memory.load_state_tensors(part("gates/"), model.device)


def _frozen(weights: list[Tensor]) -> Gate:
    gate = Gate(weights)
    gate.requires_grad_(False)
    return gate


def _gate_in_training(model: Backbone) -> Gate:
    gates = model.shared["gates"]
    assert isinstance(gates, Gates)
    gate = gates.gates[-1]
    assert isinstance(gate, Gate)
    return gate
