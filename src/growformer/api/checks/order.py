"""Another order of channels, the same function: finds patterns that have the right shape and the wrong layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra import OUTSIDE, Attention, Family, lookup
from growformer.checkpoint import TensorFiles, read_config
from growformer.checkpoint.stock import full_config
from growformer.planning.sizes import size_of

if TYPE_CHECKING:
    import torch

    from growformer.proof.floor import Order


class Orders:
    """Orders of channels that a family's facts say the function does not see.

    Args:
        family: as the config has it.
        folder: a checkpoint.

    Attributes:
        by_group: for each group of axes that move together, where each channel goes.
        fixed: for each axis that has an order of its own, why.
    """

    def __init__(self, family: Family, folder: Path) -> None:
        from growformer.proof.floor import Layout

        self.family, self.folder = family, folder
        self.raw = read_config(folder)
        self.full = full_config(self.raw)[0]
        with TensorFiles.open(folder) as files:
            self.source = {name: files.read(name) for name in files.names}
        shapes = {name: tuple(x.shape) for name, x in self.source.items()}
        bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in shapes)
        self.layout = Layout(family, self.full, shapes, family.prefix if bare else "")
        self.sizes = {axis: size_of(size, self.full) for axis, size in family.axes.items()}
        self.by_group: dict[str, dict[str, torch.Tensor]] = {}
        self.fixed: dict[str, str] = {}
        self._seed = 0
        self._plain()
        for attention in family.attentions:
            self._attention(attention)
        self._experts()
        self._rest()

    def _draw(self, size: int) -> torch.Tensor:
        """A random order that is not the given one."""
        import torch

        while True:
            generator = torch.Generator().manual_seed(self._seed)
            self._seed += 1
            order = torch.randperm(size, generator=generator)
            if size < 2 or not torch.equal(order, torch.arange(size)):
                return order

    def _put(self, axes: Mapping[str, torch.Tensor]) -> None:
        if all(len(order) < 2 for order in axes.values()):
            self.fixed |= dict.fromkeys(axes, "it has one channel")
            return
        self.by_group[", ".join(axes)] = dict(axes)

    def _plain(self) -> None:
        ordered = {axis: frozen.reason for frozen in self.family.frozen if frozen.ordered for axis in frozen.axes}
        self.fixed |= {axis: f"its channels have an order: {ordered[axis]}" for axis in ordered}
        for group in (g for g in self.layout.groups() if not set(g) & ordered.keys()):
            order = self._draw(max(self.sizes[axis] for axis in group))
            self._put(dict.fromkeys(group, order))

    def _attention(self, attention: Attention) -> None:
        import torch

        heads = self.sizes[attention.heads]
        if attention.alibi is not None:
            self.fixed[attention.heads] = "linear biases tie a head to its number"
        elif attention.kv_heads is None or attention.kv_heads == attention.heads:
            self._put({attention.heads: self._draw(heads)})
        else:
            pairs, group = self.sizes[attention.kv_heads], heads // self.sizes[attention.kv_heads]
            outer, inner = self._draw(pairs), self._draw(group)
            axes = {attention.heads: (outer[:, None] * group + inner).flatten(), attention.kv_heads: outer}
            self._put(axes | ({attention.group: inner} if attention.group else {}))
        if attention.value not in attention.key:
            self._put({attention.value: self._draw(self.sizes[attention.value])})
        rotary = attention.rotary
        for axis in attention.key:
            size = self.sizes[axis]
            turned = 0
            if rotary is not None and rotary.axis == axis:
                turned = self._turned(attention, size)
            if size - turned < 2:
                self.fixed[axis] = "rotary pairs have an order"
                continue
            if turned:
                self.fixed[f"{axis}, the first {turned}"] = "rotary pairs have an order"
            self._put({axis: torch.cat([torch.arange(turned), turned + self._draw(size - turned)])})

    def _turned(self, attention: Attention, size: int) -> int:
        rotary = attention.rotary
        assert rotary is not None
        if rotary.turned:
            value = lookup(self.full, rotary.turned)
            return size if value is None else int(value)
        if rotary.partial:
            stated = (self.full.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
            return int(size * stated)
        return size

    def _experts(self) -> None:
        experts = self.family.experts
        if experts is None or experts.axis not in self.sizes:
            return
        size = self.sizes[experts.axis]
        groups = int(lookup(self.full, experts.groups[0])) if experts.groups else 1
        outer, inner = self._draw(groups), self._draw(size // groups)
        self._put({experts.axis: (outer[:, None] * (size // groups) + inner).flatten()})

    def _rest(self) -> None:
        done = {axis for axes in self.by_group.values() for axis in axes} | set(self.fixed)
        for axis in self.family.axes:
            if axis in done:
                continue
            if axis in OUTSIDE:
                self.fixed[axis] = "the inputs index it"
            elif axis in self.family.layers:
                self.fixed[axis] = "depth has an order"
            else:
                self.fixed[axis] = "no tensor of the sample writes it and another reads it"

    def moved(self, order: Order) -> dict[str, torch.Tensor]:
        """The source with its channels in that order."""
        from growformer.proof.floor import permuted

        (tensors,) = permuted(self.layout, self.source, [order])
        out = {}
        for name, tensor in tensors.items():
            pattern, _, index = self.family.find(self.family.full_name(name, self.layout._prefix))
            moved = {axis: int((order[axis] == i).nonzero()) if axis in order else i for axis, i in index.items()}
            if moved != index:
                name = pattern.format(moved).removeprefix(self.layout._prefix)
            out[name] = tensor
        return out


def differences(orders: Orders, only: set[str] | None = None) -> dict[str, float]:
    """For each group of axes, the relative difference in true float64 after its channels were put in another order.

    Args:
        orders: of one checkpoint, under the family that is tried.
        only: leave out groups without any of these axes.
    """
    from growformer.proof.float64 import build64_from
    from growformer.proof.floor import in_order
    from growformer.proof.functional import compare_outputs, outputs64, worst
    from growformer.proof.inputs import probe_inputs

    inputs = probe_inputs(orders.folder, batch=3, length=16, seed=0).batches[:1]
    base = outputs64(orders.folder, inputs)
    out = {}
    for group, order in orders.by_group.items():
        if only is not None and not only & set(order):
            continue
        moved = orders.moved(order)
        found = outputs64(lambda moved=moved: build64_from(orders.raw, moved), inputs)  # type: ignore[misc]
        out[group] = worst(compare_outputs(base, in_order(base, found, order))).relative
    return out


def difference_of(family: Family, folder: Path, only: set[str]) -> dict[str, Any]:
    """`differences` of a checkpoint under a family that may be wrong."""
    return differences(Orders(family, folder), only)
