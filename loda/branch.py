"""Low-rank branches beside a linear layer: attach, forward, detach."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, ValuesView
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Branch(nn.Module):
    """One branch ``scale · up(down(x))``.

    Args:
        down_rD: (r, d_in) down-projection A.
        up_Or: (d_out, r) up-projection B.
        scale: γ.
        train_down: whether A is trained beside B.
    """

    def __init__(self, down_rD: Tensor, up_Or: Tensor, scale: float, train_down: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(down_rD.clone(), requires_grad=train_down)
        self.up = nn.Parameter(up_Or.clone())
        self.scale = scale

    def delta(self) -> Tensor:
        """The branch as a weight change, (d_out, d_in)."""
        return self.scale * (self.up @ self.down)


class Branches(nn.ModuleDict):
    """Branches by name."""

    if TYPE_CHECKING:  # what ModuleDict returns, said more exactly

        def __getitem__(self, key: str) -> Branch: ...
        def values(self) -> ValuesView[Branch]: ...
        def items(self) -> ItemsView[str, Branch]: ...


class BranchedLinear(nn.Module):
    """A frozen linear layer with named branches: ``h = W x + Σ γ_k w_k(x) B_k A_k x``, all ``w_k = 1`` by default.

    The branches are stacked, ``A = [A_1; A_2]`` and ``B = [γ_1 B_1, γ_2 B_2]``: two thin products for any number.

    Attributes:
        weigh: gives the ``w_k`` of the layer's input (B, N, d_in), as (B or 1, branches): gates, routing.
        extra: a module whose output is added, for updates that aren't sums of branches.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.branches = Branches()
        self.weigh: Callable[[Tensor], Tensor] | None = None
        self.extra: Callable[[Tensor], Tensor] | None = None

    def add(self, name: str, down_rD: Tensor, up_Or: Tensor | None = None, *, scale: float, train_down: bool) -> None:
        """Attach a branch; ``up`` starts at zero unless given."""
        weight = self.base.weight
        if up_Or is None:
            up_Or = weight.new_zeros(self.base.out_features, down_rD.shape[0])
        self.branches[name] = Branch(down_rD.to(weight), up_Or.to(weight), scale, train_down)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x) if self.extra is None else self.base(x) + self.extra(x)
        branches = list(self.branches.values())
        if not branches:
            return base
        if len(branches) == 1:
            down_rD: Tensor = branches[0].down
            up_Or = branches[0].scale * branches[0].up
        else:
            down_rD = torch.cat([branch.down for branch in branches])
            up_Or = torch.cat([branch.scale * branch.up for branch in branches], dim=1)
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
