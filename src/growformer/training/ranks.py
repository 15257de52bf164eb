"""The parameters of a growth in rank: pairs that hold a weight, or what is added to one, as a product."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from growformer.optim.carry import Carry
from growformer.optim.fade import Behind
from growformer.optim.layout import Layout, View
from growformer.planning import Plan
from growformer.training.changes import Changes
from growformer.training.rest import require_at_rest, require_swappable


class RankGraft:
    """Parameters that grow in place, built beforehand; what an optimizer's growth asks of its model's (`Grafted`).

    Args:
        plan: the growth.
        held: the live parameters, by their names in the plan: each with its name in memory.

    Attributes:
        carry: the growth, parameter by parameter.
        before: the live parameters, by their names in memory.
        after: the same objects, which will hold the grown ones.
        values: the grown parameters, by name; one that stays as it is has none.

    Raises:
        RequestError: the model is in the middle of a step.
    """

    def __init__(self, plan: Plan, held: Mapping[str, tuple[str, torch.nn.Parameter]]) -> None:
        self.before: dict[str, torch.Tensor] = dict(held.values())
        require_at_rest(self.before)
        names = {disk: name for disk, (name, _) in held.items()}
        shapes = {disk: tuple(parameter.shape) for disk, (_, parameter) in held.items()}
        grown = {disk: plan.by_name[disk].shape for disk in held}
        self.carry = Carry(plan, _layout(names, shapes), _layout(names, grown))
        applier = self.carry.applier(lambda name: self.before[name].detach())
        self.after: dict[str, torch.Tensor] = dict(self.before)
        self.values: dict[str, torch.Tensor] = {}
        for name in self.carry.names:
            if not self.carry.unchanged(name):
                old = self.before[name]
                made = torch.empty(self.carry.new.shapes[name], dtype=old.dtype, device=old.device)
                self.carry.weight(name, applier, made)
                self.values[name] = torch.nn.Parameter(made, requires_grad=old.requires_grad)

    @property
    def behind(self) -> dict[str, Behind]:
        """What fades in: nothing, for what is drawn is seen through a factor that is zero."""
        return {}

    def require_swappable(self) -> None:
        """Refuse parameters that something else holds on to; what was compiled with them is forgotten first."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        require_swappable((name, p) for name, p in self.after.items() if isinstance(p, torch.nn.Parameter))

    def commit(self, changes: Changes) -> None:
        """Put everything in place."""
        for name, value in self.values.items():
            vars(value).update(vars(self.after[name]))
            changes.swap(self.after[name], value)


def _layout(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    views = {
        disk: View(name, shapes[disk], tuple(torch.empty(shapes[disk], device="meta").stride()), 0)
        for disk, name in names.items()
    }
    return Layout(views, {name: shapes[disk] for disk, name in names.items()})
