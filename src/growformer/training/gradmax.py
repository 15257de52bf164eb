"""GradMax (arXiv 2201.05125): new units whose first gradient is as large as their size allows.

New units are closed where they are written, so that growth changes nothing, and only their writers get a gradient at
first. With x what an MLP reads, delta the loss's gradient at what it adds, d_j the column that reads unit j, and s_j
the slope of the unit in what is zero of it (of act(u x) the slope at 0, of act(g x) (u x) the gate's act(g_j x)), it is

    dL/du_j = d_j^T G_j,    G_j = sum over tokens of s_j delta x^T        [hidden written, hidden read]

Over columns of length r that are at right angles the sum of its squares is largest for the left singular vectors of
the largest singular values; without a gate all G_j are one matrix. With gates, which are drawn, each unit takes the
largest of its own G_j at right angles to the units before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from growformer.algebra import GATE
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.optim.layout import Layout
from growformer.planning import Plan, TensorPlan

if TYPE_CHECKING:
    import transformers

Closure = Callable[[], torch.Tensor]
"""Gives the loss of the model, with its graph, on batches of its own choice."""


def readers(read: torch.Tensor, gradient: torch.Tensor, slope: torch.Tensor, count: int, length: float) -> torch.Tensor:
    """The columns that read new units, such that the gradient of what writes them is largest.

    Args:
        read: [token, hidden read]: x.
        gradient: [token, hidden written]: delta.
        slope: [token, unit], or [token, 1] where all units have the same: s.
        count: of units.
        length: of every column.

    Returns:
        float64 [hidden written, unit]. Where there are more units than directions, directions come again.
    """
    x, delta, s = read.double(), gradient.double(), slope.double()
    most = min(x.shape[1], delta.shape[1])
    if s.shape[1] == 1:
        left = torch.linalg.svd((delta * s).T @ x, full_matrices=False)[0]
        return length * left[:, [j % most for j in range(count)]]
    columns: list[torch.Tensor] = []
    for j in range(count):
        turn = columns[j - j % most :]  # those that this one is at right angles to
        found = (delta * s[:, j : j + 1]).T @ x
        for _ in range(2):  # a second time for what rounding left
            for column in turn:
                found = found - torch.outer(column, column @ found)
        columns.append(torch.linalg.svd(found, full_matrices=False)[0][:, 0])
    return length * torch.stack(columns, 1)


def fill_readers(
    model: transformers.PreTrainedModel,
    plan: Plan,
    layout: Layout,
    made: Sequence[Callable[[str], torch.Tensor]],
    closure: Closure,
) -> None:
    """Write the columns of a growth by GradMax into the grown model's weights.

    Each has the mean length of the old columns beside it.

    Args:
        model: the model before it grows, between two steps; its gradients stay as they are.
        plan: the growth, of nothing but units of MLPs.
        layout: of the model.
        made: give the grown weights of a tensor, by its name on disk, to be written to: the model's, and those of
            averages that get the same columns.
        closure: the loss.

    Raises:
        RequestError: the MLP is not written and read by matrices of their own, its units have no slope at zero, or the
            loss has no graph.
    """
    units = [_Units(model, layout, made, *found) for found in _found(plan)]
    with ExitStack() as stack, torch.enable_grad():
        for each in units:
            each.watch(stack)
        loss = closure()
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise RequestError(f"{plan.method}: the closure should return a loss that has a graph, not yet backward")
        outs = [out for each in units for out in each.outs]
        deltas = iter(torch.autograd.grad(loss, outs, retain_graph=True, allow_unused=True))
        for each in units:
            each.fill([next(deltas) for _ in each.outs])


def require_units(plan: Plan) -> float:
    """Refuse, from the plan alone, what `fill_readers` cannot fill.

    Returns:
        FLOPs for each token of the closure's batches that the matrices G_j take, beside the passes; the singular
        vectors, which take as much for any batch, are not in it.

    Raises:
        RequestError: more than units of MLPs grows, or they are not written and read by matrices of their own.
    """
    total = 0
    for reader, writer, gates in _found(plan):
        along = _along(reader)
        units = reader.dims[along].new - reader.dims[along].old if gates else 1
        total += 2 * units * reader.dims[1 - along].old * writer.dims[1 - _along(writer)].old
    return float(total)


def _found(plan: Plan) -> list[tuple[TensorPlan, TensorPlan, list[TensorPlan]]]:
    """Of every MLP that grows, the tensor that reads its units, the one that writes them, and those of its gate."""
    family = FAMILIES[plan.family]
    axis = next(iter(plan.learned))
    grown = [name for name, entry in plan.axes.items() if entry["old"] != entry["new"]]
    if grown != [axis]:
        said = f"{axis} grows alone by it, and {', '.join(grown)} grow; do one, then the other"
        raise RequestError(f"{plan.method}: {said}")
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    patterns = {name.text: (name, pattern) for name, pattern in family.patterns}
    for tensor in plan.tensors:
        name, pattern = patterns[tensor.pattern]
        mine = [atom for atom in pattern.atoms() if atom.axis == axis]
        if not mine:
            continue
        index = name.match(tensor.name) or name.match(family.prefix + tensor.name) or {}
        here = found.setdefault(tuple(index.values()), {"read": [], "write": [], "gate": []})
        flat = len(tensor.dims) == 1
        if mine[0].stand == "read":
            here["read"].append(tensor)
        elif mine[0].role == GATE:
            here["gate"].append(tensor)
        elif not flat:
            here["write"].append(tensor)
        if len(mine) > 1 or any(a.role for a in pattern.atoms() if isinstance(a.axis, int)):
            raise RequestError(f"{plan.method}: {tensor.name} holds a unit's gate beside it; mlp=paper works")
    out = []
    for here in found.values():
        if len(here["read"]) != 1 or len(here["write"]) != 1:
            raise RequestError(f"{plan.method}: {family.name} has no one matrix that writes its units; mlp=paper works")
        out.append((here["read"][0], here["write"][0], here["gate"]))
    return out


@dataclass
class _Units:
    """The new units of one MLP, as a pass of the old model sees them."""

    model: Any
    layout: Layout
    targets: Sequence[Callable[[str], torch.Tensor]]
    reader: TensorPlan
    writer: TensorPlan
    gates: Sequence[TensorPlan]
    reads: list[torch.Tensor] = field(default_factory=list)
    outs: list[torch.Tensor] = field(default_factory=list)
    units: list[torch.Tensor] = field(default_factory=list)
    leaves: list[torch.Tensor] = field(default_factory=list)

    @property
    def made(self) -> Callable[[str], torch.Tensor]:
        return self.targets[0]

    def watch(self, stack: ExitStack) -> None:
        """Add the new units, at zero, to every pass, and keep what goes in and out."""
        down, up = self._module(self.reader), self._module(self.writer)
        old, new = self._sizes(self.reader)

        def read(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
            self.reads.append(args[0].detach())
            zeros = out.new_zeros(*out.shape[:-1], new - old, requires_grad=True)
            self.leaves.append(zeros)
            return torch.cat([out, zeros], -1)

        def taken(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.units.append(args[0][..., old:])
            return (args[0][..., :old], *args[1:])

        def written(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
            self.outs.append(out)

        hooks = [up.register_forward_hook(read), down.register_forward_pre_hook(taken)]
        hooks.append(down.register_forward_hook(written))
        if self.gates:
            hooks.append(self._module(self.gates[0]).register_forward_hook(self._gated(old)))
        for hook in hooks:
            stack.callback(hook.remove)

    def _gated(self, old: int) -> Callable[..., torch.Tensor]:
        weight = self._new(next(t for t in self.gates if len(t.dims) > 1))
        biases = [self.made(t.name)[old:] for t in self.gates if len(t.dims) == 1]

        def gate(module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
            more = args[0] @ weight.to(args[0])
            return torch.cat([out, more + biases[0].to(more) if biases else more], -1)

        return gate

    def _new(self, tensor: TensorPlan, made: Callable[[str], torch.Tensor] | None = None) -> torch.Tensor:
        """The new entries of a grown matrix: [what is read or written, unit]."""
        whole, dim = (made or self.made)(tensor.name), _along(tensor)
        return whole.narrow(dim, tensor.dims[dim].old, whole.shape[dim] - tensor.dims[dim].old).movedim(dim, -1)

    def _sizes(self, tensor: TensorPlan) -> tuple[int, int]:
        lift = tensor.dims[_along(tensor)]
        return lift.old, lift.new

    def _module(self, tensor: TensorPlan) -> Any:
        view = self.layout.views[tensor.source or ""]
        if self.layout.within[view.name] != [tensor.source] or len(tensor.dims) != 2:
            raise RequestError(f"{view.name} is more than one matrix of one MLP, which GradMax cannot tell apart")
        return self.model.get_submodule(view.name.rpartition(".")[0])

    def fill(self, deltas: Sequence[torch.Tensor | None]) -> None:
        """Write the columns, with the gradients at what the MLP adds in every pass."""
        if not deltas or any(delta is None for delta in deltas):
            raise RequestError(f"the closure's loss does not depend on what {self.reader.name} writes")
        slopes = torch.autograd.grad([unit.sum() for unit in self.units], self.leaves, retain_graph=True)
        x, delta, slope = (
            torch.cat([part.detach().flatten(0, -2) for part in parts if part is not None])
            for parts in (self.reads, deltas, slopes)
        )
        if not bool(slope.any()):
            raise RequestError(
                f"{self.reader.name}: its units have no slope at zero (a ReLU's), so that what writes new ones would "
                f"never learn; mlp=paper works"
            )
        whole, dim = self.made(self.reader.name), _along(self.reader)
        old, new = self._sizes(self.reader)
        length = float(whole.narrow(dim, 0, old).double().norm(dim=1 - dim).mean())
        found = readers(x, delta, slope if self.gates else slope[:, :1], new - old, length)
        with torch.no_grad():
            for target in self.targets:
                self._new(self.reader, target).copy_(found)


def _along(tensor: TensorPlan) -> int:
    """The dim that grows."""
    return next(dim for dim, lift in enumerate(tensor.dims) if not lift.is_identity)
