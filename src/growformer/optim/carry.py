"""One parameter at a time through a growth: (old tensors, plan) -> new tensor, for weights and all that is like them.

Plans speak of tensors on disk, in-memory models of parameters; the layouts lie between. Front ends differ only in where
full tensors come from: a model's own parameters, or shards gathered one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from growformer.algebra import ONE, Factor
from growformer.errors import SourceError
from growformer.optim.dual import box, carry_moment, has_past
from growformer.optim.layout import Layout
from growformer.planning import Plan, TensorPlan, newness
from growformer.planning.apply import Applier
from growformer.planning.plan import Block

if TYPE_CHECKING:
    import torch

Whole = Callable[[str], "torch.Tensor"]
"""Gives a full tensor of the source by its name in memory. It is asked for the same name many times in a row, and in
the same order on every machine."""


@dataclass(frozen=True)
class Kind:
    """What a part of a grown parameter is.

    Attributes:
        new: it has no past: drawn, zero, a carried mean, or a copy that R leaves out.
        closed: new and zero.
        factor: what its old entries were multiplied by.
        shared: its old entries are parts of the source's that differ from entry to entry.
        offset: what the model adds to its stored numbers.
        back: what its gradient is, of the source's.
    """

    new: bool
    closed: bool = False
    factor: Factor = ONE
    shared: bool = False
    offset: int = 0
    back: Factor = ONE


class Carry:
    """A growth, parameter by parameter.

    Args:
        plan: the growth.
        old, new: the layouts of the source and of the grown model.

    Raises:
        SourceError: plan and layouts do not belong together, or a grown parameter continues several old ones.
    """

    def __init__(self, plan: Plan, old: Layout, new: Layout) -> None:
        self.plan = plan
        self.old = old
        self.new = new
        for tensor in plan.tensors:
            for name, shape, layout in (
                (tensor.name, tensor.shape, new),
                (tensor.source, tensor.source_shape, old),
                (tensor.fill.like, None, old),
            ):
                view = layout.views.get(name) if name is not None else None
                if name is not None and (view is None or shape not in (None, view.shape)):
                    found = "not there" if view is None else f"{list(view.shape)} in memory"
                    raise SourceError(f"{name}: {list(shape or ())} in the plan, {found}")
        planned = {view.name for disk, view in new.views.items() if disk in plan.by_name}
        self.names = tuple(name for name in new.shapes if name in planned)
        self._parts = {name: [(plan.by_name[d], new.views[d]) for d in new.within[name]] for name in self.names}

    def source(self, name: str) -> str | None:
        """The old parameter that a grown one continues; None where it is new as a whole."""
        found = {self.old.views[t.source].name for t, _ in self._parts[name] if t.source is not None}
        if len(found) > 1:
            raise SourceError(
                f"{name} would continue several parameters of the model ({', '.join(sorted(found))}); grow the saved "
                f"checkpoint instead (save_pretrained, then expand_checkpoint)"
            )
        return next(iter(found), None)

    def like(self, name: str) -> str | None:
        """The old parameter that a grown one continues, or that a new one is like: the neighbouring layer's."""
        found = self.source(name)
        likes = [tensor.fill.like for tensor, _ in self._parts[name] if tensor.fill.like is not None]
        return found or (self.old.views[likes[0]].name if likes else None)

    def reads(self, name: str) -> set[str]:
        """The old tensors that a grown one may be made from, by their names in memory."""
        disk = {x for tensor, _ in self._parts[name] for x in (tensor.source, tensor.fill.like)}
        disk |= {tensor.ahead for tensor, _ in self._parts[name]}
        disk |= {run.weigh for tensor, _ in self._parts[name] for dim in tensor.dims for run in dim.runs}
        return {self.old.views[x].name for x in disk if x}

    def continues(self, name: str) -> bool:
        """Whether it is what R reads back, and no mere copy of an old parameter."""
        return any(has_past(block) for tensor, _ in self._parts[name] for block in tensor.blocks())

    def unchanged(self, name: str) -> bool:
        """Whether it is an old parameter as it was, entry by entry."""
        for tensor, view in self._parts[name]:
            old = self.old.views.get(tensor.source or "")
            if old is None or (old.shape, old.stride, old.offset) != (view.shape, view.stride, view.offset):
                return False
            if not all(dim.is_identity for dim in tensor.dims):
                return False
        return self.new.shapes[name] == self.old.shapes[self.source(name) or ""]

    def applier(self, whole: Whole) -> Applier:
        """What makes weights from the source's parameters; kept by the caller, for it remembers what it measured."""

        def read(disk: str, rows: slice | None) -> torch.Tensor:
            view = self.old.views[disk]
            tensor = view.of(whole(view.name))
            return (tensor if rows is None else tensor[rows]).cpu()

        return Applier(self.plan, read)

    def weight(self, name: str, applier: Applier, out: torch.Tensor) -> None:
        """Write a grown parameter's weights into `out`, a contiguous tensor of its shape."""
        for tensor, view in self._parts[name]:
            there = view.of(out)
            for start, stop in applier.cuts(tensor):
                piece = applier.piece(tensor, start, stop)
                (there[start:stop] if tensor.shape else there).copy_(piece)

    def moment(self, name: str, whole: Whole, power: int, start: float = 0.0) -> torch.Tensor:
        """What lies beside a grown parameter, from what lies beside the old one (see `grow_moments`).

        Args:
            name: of the grown parameter, which continues an old one.
            whole: gives the old tensor, of the old parameter's shape.
            power: of the gradient: 1, 2, or 0 for what is only moved.
            start: the value of new entries.

        Returns:
            A tensor of the grown parameter's shape, in the dtype and on the device of the old one.
        """
        old = whole(self.source(name) or "")
        out = old.new_full(self.new.shapes[name], start)
        for tensor, view in self._parts[name]:
            if tensor.source is not None:
                carry_moment(tensor, self.old.views[tensor.source].of(old), power, view.of(out))
        return out

    def kinds(self, name: str) -> tuple[torch.Tensor, list[Kind]]:
        """See `kinds`."""
        return kinds(self.plan, self.new, name)


def kinds(plan: Plan, layout: Layout, name: str) -> tuple[torch.Tensor, list[Kind]]:
    """A uint8 tensor of a grown parameter's shape, and what its numbers say of the entries.

    Args:
        plan: the growth.
        layout: of the grown model.
        name: the parameter's, in memory.
    """
    import torch

    out = torch.zeros(layout.shapes[name], dtype=torch.uint8)
    found: dict[Kind, int] = {}
    for disk in layout.within[name]:
        tensor, there = plan.by_name[disk], layout.views[disk].of(out)
        for block in tensor.blocks():
            there[box(block)] = found.setdefault(_kind(tensor, block), len(found))
    return out, list(found)


def without_past(plan: Plan, layout: Layout, name: str) -> torch.Tensor:
    """Which entries of a grown parameter continue nothing that an optimizer knows: bool, of its shape."""
    index, meanings = kinds(plan, layout, name)
    out = index.bool().zero_()
    for number, kind in enumerate(meanings):
        if kind.new:
            out |= index == number
    return out


def new_entries(plan: Plan, layout: Layout) -> dict[str, torch.Tensor]:
    """Which entries of a grown model's parameters are new: by name in memory, bool, of their shapes.

    Of several copies that continue an old entry the first is the old one.
    """
    import torch

    of_disk = newness.new_entries(plan)
    out = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in layout.shapes.items()}
    for disk, mask in of_disk.items():
        view = layout.views[disk]
        view.of(out[view.name]).copy_(mask)
    return out


def _kind(tensor: TensorPlan, block: Block) -> Kind:
    if not has_past(block):
        return Kind(new=True, closed=block.source is None and not block.free)
    offset = tensor.offset if block.factor != ONE else 0
    return Kind(False, False, block.factor, block.part, offset, block.back or ONE)
