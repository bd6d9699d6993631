"""Low-rank branches beside a linear layer: attach, forward, detach."""

from __future__ import annotations

import operator
from collections.abc import Callable, ItemsView, ValuesView
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loda.fused import fused_branches


class Branch(nn.Module):
    """One branch ``scale · up(down(x))``, or ``scale · (up - anchor)(down(x))`` where B starts at an anchor.

    Args:
        down_rD: (r, d_in) down-projection A.
        up_Or: (d_out, r) up-projection B.
        scale: γ.
        train_down: whether A is trained beside B.
        train_up: whether B is trained.
        train_scale: whether γ is trained; it is a number else.
        anchor_Or: (d_out, r) B₀, where the weight under the branch was reset by ``-γ B₀ A``. Both come as one
            difference, which is exactly zero at the start.
    """

    def __init__(
        self,
        down_rD: Tensor,
        up_Or: Tensor,
        scale: float,
        train_down: bool,
        train_up: bool = True,
        train_scale: bool = False,
        anchor_Or: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down_rD.clone(), requires_grad=train_down)
        self.up = nn.Parameter(up_Or.clone(), requires_grad=train_up)
        self.scale: float | Tensor = nn.Parameter(up_Or.new_tensor(scale)) if train_scale else scale
        self.anchor = anchor_Or

    def moved_up(self) -> Tensor:
        """B, less its anchor."""
        return self.up if self.anchor is None else self.up - self.anchor

    @property
    def number(self) -> float:
        """γ as a number, trained or not."""
        return float(self.scale.detach()) if isinstance(self.scale, Tensor) else self.scale

    def delta(self) -> Tensor:
        """The branch as a weight change, (d_out, d_in)."""
        return self.scale * (self.moved_up() @ self.down)

    def scaled_up(self) -> Tensor:
        """``γ B`` (d_out, r), detached: with A the factors to merge."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        return scale * self.moved_up().detach()


class Branches(nn.ModuleDict):
    """Branches by name."""

    if TYPE_CHECKING:  # what ModuleDict returns, said more exactly

        def __getitem__(self, key: str) -> Branch: ...
        def values(self) -> ValuesView[Branch]: ...
        def items(self) -> ItemsView[str, Branch]: ...


class BranchedLinear(nn.Module):
    """A frozen linear layer with named branches: ``h = W x + Σ γ_k w_k(x) B_k A_k x``, all ``w_k = 1`` by default.

    The branches are stacked, ``A = [A_1; A_2]`` and ``B = [γ_1 B_1, γ_2 B_2]``: two thin products for any number.
    Where only the B_k are trained, layer and branches are one node of the graph (``loda.fused``), the same to the bit.
    A method that trains a change of full rank adds ``change`` (d_out, d_in) instead: ``h = (W + Δ) x + ...``.

    Attributes:
        weigh: gives the ``w_k`` of the layer's input (B, N, d_in), as (B or 1, branches): gates, routing.
        extra: a module whose output is added, for updates that are neither.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.branches = Branches()
        self.change: nn.Parameter | None = None
        self.weigh: Callable[[Tensor], Tensor] | None = None
        self.extra: nn.Module | None = None
        self._stacked: tuple[list[Tensor], list[int], Tensor] | None = None

    def add_change(self, change_OD: Tensor | None = None) -> None:
        """Attach a trained weight change of full rank; it starts at zero unless given."""
        weight = self.base.weight
        self.change = nn.Parameter(torch.zeros_like(weight) if change_OD is None else change_OD.to(weight).clone())

    def add(
        self,
        name: str,
        down_rD: Tensor,
        up_Or: Tensor | None = None,
        *,
        scale: float,
        train_down: bool,
        train_up: bool = True,
        train_scale: bool = False,
        anchor_Or: Tensor | None = None,
    ) -> None:
        """Attach a branch; ``up`` starts at zero unless given."""
        weight = self.base.weight
        if up_Or is None:
            up_Or = weight.new_zeros(self.base.out_features, down_rD.shape[0])
        if anchor_Or is not None:
            anchor_Or = anchor_Or.to(weight)
        self.branches[name] = Branch(
            down_rD.to(weight), up_Or.to(weight), scale, train_down, train_up, train_scale, anchor_Or
        )

    def trainable(self) -> list[Tensor]:
        """The tensors that are trained."""
        modules = [module for module in (self.weigh, self.extra) if isinstance(module, nn.Module)]
        own = [self.change] if self.change is not None else []
        tensors = [*self.branches.parameters(), *own, *(p for module in modules for p in module.parameters())]
        return [tensor for tensor in tensors if tensor.requires_grad]

    def _only_ups_are_trained(self) -> bool:
        return (
            self.change is None
            and self.weigh is None
            and self.extra is None
            and not any(b.down.requires_grad or isinstance(b.scale, Tensor) for b in self.branches.values())
        )

    def _frozen_down(self) -> Tensor:
        """All A_k, one under the other; stacked again only if one of them is another or has changed."""
        downs: list[Tensor] = [branch.down for branch in self.branches.values()]
        if len(downs) == 1:
            return downs[0]
        versions = [down._version for down in downs]
        if self._stacked is not None:
            of, at, stacked_rD = self._stacked
            if at == versions and len(of) == len(downs) and all(map(operator.is_, of, downs)):
                return stacked_rD
        with torch.inference_mode(False), torch.no_grad():  # a first pass without gradient mustn't mark it so for ever
            self._stacked = (downs, versions, torch.cat(downs))
        return self._stacked[2]

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and self._only_ups_are_trained():
            scales = [float(branch.scale) for branch in self.branches.values()]
            ups = [branch.moved_up() for branch in self.branches.values()]
            return fused_branches(x, self.base.weight, self.base.bias, self._frozen_down(), scales, ups)
        if self.change is None:
            base = self.base(x)
        else:
            base = F.linear(x, self.base.weight + self.change, self.base.bias)
        if self.extra is not None:
            base = base + self.extra(x)
        branches = list(self.branches.values())
        if not branches:
            return base
        if len(branches) == 1:
            down_rD: Tensor = branches[0].down
            up_Or = branches[0].scale * branches[0].moved_up()
        else:
            down_rD = torch.cat([branch.down for branch in branches])
            up_Or = torch.cat([branch.scale * branch.moved_up() for branch in branches], dim=1)
        narrow_BNr = F.linear(x, down_rD)
        if self.weigh is not None:
            ranks = torch.tensor([branch.down.shape[0] for branch in branches], device=x.device)
            weights_Br = self.weigh(x).repeat_interleave(ranks, dim=1, output_size=down_rD.shape[0])
            narrow_BNr = narrow_BNr * weights_Br[:, None]
        return base + F.linear(narrow_BNr, up_Or)


def attach(model: nn.Module, layers: list[str]) -> dict[str, BranchedLinear]:
    """Put a :class:`BranchedLinear` in the place of each named linear layer of ``model``."""
    attached = {}
    for name in layers:
        branched = BranchedLinear(model.get_submodule(name))  # type: ignore[arg-type]
        model.set_submodule(name, branched)
        attached[name] = branched
    return attached


def detach(model: nn.Module, attached: dict[str, BranchedLinear]) -> None:
    """Undo :func:`attach`: the model is a plain backbone again, its weights untouched."""
    for name, branched in attached.items():
        model.set_submodule(name, branched.base)
