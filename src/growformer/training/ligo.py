"""LiGO (arXiv 2303.00980): a lift that is learned on the grown model's loss, from copies on.

Every grown tensor is a mix of the same tensor of all layers, with a matrix for each of its dims that grows:

    W'_l = E_out (sum over k of D[l, k] W_k) E_in^T        E: [new channel, old channel], D: [new layer, old layer]

There is one E for each axis and each way of standing by it (written, read, a norm's gain), for all layers and tensors
alike, and one D for each kind of tensor. E and D start as the copies of the plan, with its factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from growformer.algebra import Atom, Dim, Lift
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.optim.layout import Layout
from growformer.planning import Plan, TensorPlan
from growformer.planning.cover import stored_dims

if TYPE_CHECKING:
    import transformers

Part = Callable[[], torch.Tensor]
"""Makes the matrix of a dim from the learned ones: [new entries, old entries]."""


class Lifts:
    """The learned matrices of a growth, and the grown model's parameters that they make.

    Args:
        plan: of a growth whose every axis is learned.
        layout: of the grown model.
        source: the source's tensors, by name on disk.

    Attributes:
        matrices: by "axis.stand", with a number where the same axis starts with other factors elsewhere: [new channel,
            old channel]; by "layer: tensor's name pattern": [new layer, old layer].

    Raises:
        RequestError: an axis grows in another way, or a tensor is made in one that no matrices for its axes make.
    """

    def __init__(self, plan: Plan, layout: Layout, source: Mapping[str, torch.Tensor]) -> None:
        self.plan, self.source = plan, source
        self.family = FAMILIES[plan.family]
        self.matrices: dict[str, torch.nn.Parameter] = {}
        grown = {axis: entry for axis, entry in plan.axes.items() if entry["old"] != entry["new"]}
        other = [axis for axis in grown if plan.learned.get(axis) != "lift"]
        if other:
            raise RequestError(f"{plan.method}: {', '.join(other)} grow in another way; grow them before or after")
        self._sizes = {axis: (int(entry["old"]), int(entry["new"])) for axis, entry in plan.axes.items()}
        self._patterns = {name.text: (name, pattern) for name, pattern in self.family.patterns}
        self._made: dict[str, Callable[[], torch.Tensor]] = {}
        for parameter, disk in layout.within.items():
            tensors = [plan.by_name[name] for name in disk if name in plan.by_name]
            if not tensors:
                continue
            view = layout.views[disk[0]]
            if len(disk) != 1 or math.prod(view.shape) != math.prod(layout.shapes[parameter]):
                raise RequestError(f"{plan.method}: {parameter} holds {len(disk)} tensors, as experts do, and has no E")
            back = [dim for _, dim in sorted((-stride, dim) for dim, stride in enumerate(view.stride))]
            shape = layout.shapes[parameter]
            self._made[parameter] = self._tensor(tensors[0], back, shape)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The grown model's, by their names in memory, as functions of the matrices."""
        return {name: make() for name, make in self._made.items()}

    def _tensor(self, tensor: TensorPlan, back: Sequence[int], shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        name, pattern = self._patterns[tensor.pattern]
        if tensor.source is None:
            raise RequestError(f"{self.plan.method}: {tensor.name} is no copy of a tensor of the source")
        like = self.source[tensor.source]
        dims = stored_dims(name, pattern)
        found = [self._dim(tensor, dim, lift, like) for dim, lift in zip(dims, tensor.dims, strict=True)]
        mix = self._mix(tensor, like)

        def make() -> torch.Tensor:
            out = mix() + tensor.offset
            for i, part in enumerate(found):
                if part is not None:
                    out = torch.tensordot(part(), out, dims=([1], [i])).movedim(0, i)
            out = out - tensor.offset if tensor.offset else out
            return out.permute(*back).reshape(shape)

        return make

    def _mix(self, tensor: TensorPlan, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The tensor of one layer, from those of all."""
        name, _ = self._patterns[tensor.pattern]
        layers = [axis for axis in name.axes if axis in self.family.layers and axis in self.plan.learned]
        if not layers:
            return lambda: like
        (axis,) = layers
        old, new = self._sizes[axis]
        prefix = "" if name.match(tensor.name) is not None else self.family.prefix
        index = name.match(prefix + tensor.name) or {}
        names = [name.format({**index, axis: k}).removeprefix(prefix) for k in range(old)]
        if any(n not in self.source or self.source[n].shape != like.shape for n in names):
            raise RequestError(
                f"{self.plan.method}: {tensor.name} is not the same in every layer, and layers are mixed"
            )
        start = torch.zeros(new, old)
        for here, there in enumerate(self.plan.layers[axis]):
            start[here, there] = 1
        matrix = self._matrix(f"{axis}: {name.text}", start, like)
        everywhere = torch.stack([self.source[n] for n in names])
        return lambda: torch.tensordot(matrix()[index[axis]], everywhere, dims=1)

    def _dim(self, tensor: TensorPlan, dim: Dim, lift: Lift, like: torch.Tensor) -> Part | None:
        if lift.is_identity:
            return None
        dense = torch.zeros(lift.new, lift.old, dtype=torch.float64)
        for at, run in lift.spans():
            if run.old is None or run.mean or run.share is not None:
                raise RequestError(f"{self.plan.method}: {tensor.name} is made of more than copies")
            for i in range(run.count):
                dense[at + i, run.old + i] = float(run.factor)
        return self._part(tensor, dim, dense, like)

    def _part(self, tensor: TensorPlan, dim: Dim, dense: torch.Tensor, like: torch.Tensor) -> Part:
        """The matrix of a dim, by those of its axes: a product's is their Kronecker product, a concatenation's is in
        blocks."""
        if dim.atom is not None:
            return self._matrix(f"{dim.atom.axis}.{dim.atom.stand}", dense, like)
        sizes = [(part.size(self._old), part.size(self._new)) for part in dim.parts]
        if dim.kind == "concat":
            blocks, row, column = [], 0, 0
            for part, (old, new) in zip(dim.parts, sizes, strict=True):
                block = dense[row : row + new, column : column + old]
                blocks.append(self._part(tensor, part, block, like))
                row, column = row + new, column + old
            return lambda: torch.block_diag(*(block() for block in blocks))
        growing = [i for i, (old, new) in enumerate(sizes) if old != new]
        if not growing:
            held = dense.to(like)
            return lambda: held
        at = growing[0]
        outer = torch.eye(math.prod(old for old, _ in sizes[:at]), dtype=torch.float64)
        inner = torch.eye(math.prod(old for old, _ in sizes[at + 1 :]), dtype=torch.float64)
        (old, new), o, n = sizes[at], len(outer), len(inner)
        own = dense.reshape(o, new, n, o, old, n)[0, :, 0, 0, :, 0]
        if len(growing) > 1 or not torch.equal(torch.kron(outer, torch.kron(own.contiguous(), inner)), dense):
            raise RequestError(f"{self.plan.method}: {tensor.name} grows along several axes of one dim at once")
        grown = self._part(tensor, dim.parts[at], own, like)
        outer, inner = outer.to(like), inner.to(like)
        return lambda: torch.kron(outer, torch.kron(grown(), inner))

    def _matrix(self, name: str, start: torch.Tensor, like: torch.Tensor) -> Part:
        """The learned matrix of a name and a start, made at its first use."""
        start = start.to(like)
        number = 1
        while (found := self.matrices.get(said := name if number == 1 else f"{name}.{number}")) is not None:
            if torch.equal(found.detach(), start):
                return lambda: found
            number += 1
        made = self.matrices[said] = torch.nn.Parameter(start.clone())
        return lambda: made

    def _old(self, atom: Atom) -> int:
        return atom.axis if isinstance(atom.axis, int) else self._sizes[atom.axis][0]

    def _new(self, atom: Atom) -> int:
        return atom.axis if isinstance(atom.axis, int) else self._sizes[atom.axis][1]


def learn(
    lifts: Lifts,
    grown: transformers.PreTrainedModel,
    closure: Callable[[Callable[..., Any]], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> list[float]:
    """Learn the matrices, and write what they make into the grown model.

    Args:
        lifts: of the growth.
        grown: the grown model, whose parameters' values do not count.
        closure: given something to call as the grown model, its loss, with its graph.
        steps: of Adam.
        learning_rate: of it.

    Returns:
        The loss before each step.

    Raises:
        RequestError: the loss does not depend on what was called, or is no number.
    """
    if steps < 0:
        raise RequestError(f"steps={steps}: a number of steps is at least 0")
    matrices = list(lifts.matrices.values())
    adam = torch.optim.Adam(matrices, learning_rate)
    losses = []
    for _ in range(steps):
        with torch.enable_grad():
            weights = lifts.parameters()

            def forward(*args: Any, weights: Any = weights, **kwargs: Any) -> Any:
                return torch.func.functional_call(grown, weights, args, kwargs)

            loss = closure(forward)
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                raise RequestError(
                    f"{lifts.plan.method}: the closure should return the loss of what it is given to call"
                )
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RequestError(
                    f"{lifts.plan.method}: the loss is {losses[-1]} at step {len(losses)}; lower the rate"
                )
            gradients = torch.autograd.grad(loss, matrices, allow_unused=True)
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        adam.step()
    with torch.no_grad():
        for name, value in lifts.parameters().items():
            grown.get_parameter(name).copy_(value)
    return losses
