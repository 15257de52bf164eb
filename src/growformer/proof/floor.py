"""Variants of the source for the noise floor: what its own storage dtype does to it when nothing is grown."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from growformer.algebra import OUTSIDE, WILD, Atom, Dim, Family
from growformer.planning.cover import stored_dims
from growformer.planning.sizes import size_of
from growformer.proof.difference import compare_logits
from growformer.proof.outputs import Outputs

__all__ = ["DRAWS", "Layout", "Order", "in_order", "orders", "permuted"]

DRAWS = 8
"""Permutations drawn for the floor (design, section 6)."""

Order = Mapping[str, torch.Tensor]
"""For each permuted axis, the old channel that stands at each place."""


class Layout:
    """The dims of a checkpoint's tensors, and which of their axes may stand in any order.

    Args:
        family: the model family.
        config: the source's, with the class's defaults filled in.
        shapes: of every tensor, by name on disk.
        prefix: what patterns have before names that a bare backbone's checkpoint leaves out.
    """

    def __init__(
        self, family: Family, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], prefix: str = ""
    ) -> None:
        # Which layer is of which kind is the config's to say, and a grown one says otherwise than its source.
        self.family, self.config, self.shapes = family.of(config), config, shapes
        self._prefix = prefix

    def dims(self, name: str) -> list[Dim]:
        """The dims of the stored tensor."""
        pattern_name, pattern, _ = self.family.find(self.family.full_name(name, self._prefix))
        return stored_dims(pattern_name, pattern)

    def size(self, atom: Atom) -> int:
        """How many channels an atom has in the source."""
        return atom.axis if isinstance(atom.axis, int) else size_of(self.family.axes[atom.axis], self.config)

    def groups(self) -> list[tuple[str, ...]]:
        """Axes whose channels may be put in any order, each with those that must have the same order.

        What is written and read inside the model, and has no order of its own: the residual stream, the MLPs, a
        pooler or a latent. Heads and their channels have one (groups, rotary pairs), experts are compared by index, and
        an axis that nothing reads is an output, one that nothing writes an input. An axis whose stored tensors are not
        as large as the config says (layers of different widths) stays as it is; so does one in a dim of unknown size.
        """
        family = self.family
        ordered = {*OUTSIDE, *family.layers, WILD, *([family.experts.axis] if family.experts else [])}
        for attention in family.attentions:
            ordered |= {attention.heads, attention.value, *attention.key}
            ordered |= {axis for axis in (attention.kv_heads, attention.group) if axis}
        stands: dict[str, set[str]] = {}
        for name, shape in self.shapes.items():
            for dim, stored in zip(self.dims(name), shape, strict=True):
                axes = {str(atom.axis) for atom in dim.atoms() if not isinstance(atom.axis, int)}
                if WILD in axes or dim.size(self.size) != stored:
                    ordered |= axes
                for atom in dim.atoms():
                    if atom.index:
                        ordered.add(str(atom.axis))
                    stands.setdefault(str(atom.axis), set()).add(atom.stand)
        free = [axis for axis in family.axes if axis not in ordered and {"read", "write"} <= stands.get(axis, set())]
        return self._tied(free, ordered)

    def _tied(self, free: Sequence[str], ordered: set[str]) -> list[tuple[str, ...]]:
        """One group an axis, but for what a head reads and the embedding in its place writes."""
        tied = self.family.tied
        if tied is None or tied.head in self.shapes:
            return [(axis,) for axis in free]
        places = [
            {str(atom.axis) for atom in self.family.find(name)[1].atoms()} - set(OUTSIDE)
            for name in (tied.head, tied.embedding)
        ]
        both = tuple(axis for axis in self.family.axes if axis in places[0] | places[1])
        alone: list[tuple[str, ...]] = [(axis,) for axis in free if axis not in both]
        return alone if set(both) & ordered or not set(both) & set(free) else [both, *alone]


def orders(layout: Layout, groups: Sequence[Sequence[str]], draws: int = DRAWS) -> list[Order]:
    """Random orders of the channels of each group of axes, the same on every machine."""
    out: list[Order] = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        order: dict[str, torch.Tensor] = {}
        for group in groups:
            sizes = {size_of(layout.family.axes[axis], layout.config) for axis in group}
            order |= dict.fromkeys(group, torch.randperm(max(sizes), generator=generator))
        out.append(order)
    return out


def permuted(
    layout: Layout, source: Mapping[str, torch.Tensor], draws: Sequence[Order]
) -> Iterator[dict[str, torch.Tensor]]:
    """The source with channels in another order: the same function, other sums.

    Args:
        layout: the dims of its tensors.
        source: its tensors by name on disk.
        draws: from `orders`.

    Yields:
        One whole checkpoint a draw, in the source's shapes and dtypes.
    """
    for order in draws:
        out = {}
        for name, tensor in source.items():
            for number, dim in enumerate(layout.dims(name)):
                if any(atom.axis in order for atom in dim.atoms()):
                    tensor = tensor.index_select(number, _places(dim, order, layout.size))
            out[name] = tensor
        yield out


def _places(dim: Dim, order: Order, size: Callable[[Atom], int]) -> torch.Tensor:
    """The source index at each place of a dim."""
    if dim.atom is not None:
        found = order.get(str(dim.atom.axis))
        return torch.arange(size(dim.atom)) if found is None else found
    parts = [_places(part, order, size) for part in dim.parts]
    out = parts[0]
    for part in parts[1:]:
        out = torch.cat([out, part + len(out)]) if dim.kind == "concat" else (out[:, None] * len(part) + part).flatten()
    return out


def in_order(base: Outputs, found: Outputs, order: Order) -> dict[str, torch.Tensor]:
    """The outputs of a permuted source, in the source's order where they live on an axis that was permuted.

    Which of them do is measured: of the orders of the right size, the one nearest to the source's output is it. A
    draw that is another function comes out far away in all of them.
    """
    out = {}
    for name, value in found.items():
        ways = [value]
        for places in order.values():
            if len(places) == value.shape[-1]:
                ways.append(value[..., places.argsort()])
        out[name] = min(ways, key=lambda way: compare_logits(base[name], way).rms)
    return out
