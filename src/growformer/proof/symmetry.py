"""Copies that never part: channels that every tensor writes alike and reads alike stay so under any optimizer.

Two such channels get equal gradients in every step, so that a model of twice the width learns what one of half the
width could (HyperCloning's default, arXiv 2409.12903).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from growformer.algebra.pattern import Atom, Dim
from growformer.proof.axes import Axis
from growformer.proof.facts import Facts
from growformer.proof.layers import Placed
from growformer.proof.reading import Tensors


def inseparable(facts: Facts, tensors: Sequence[Placed], target: Tensors) -> dict[str, tuple[int, int]]:
    """For each axis with copies, how many channels are copies that nothing tells from another, of how many.

    Channels of the residual stream are one set for the whole model; those of any other axis are one in each layer.

    Args:
        facts: the receipt's axes under the family.
        tensors: the target's, under their patterns.
        target: their values.
    """
    copied = copied_axes(facts)
    together = bool(copied) and _turned(facts, tensors, target)
    out = {}
    for axis in copied:
        shared = axis.name in facts.family.streams
        pairs = _pairs(axis)
        alike: dict[tuple[tuple[str, int], ...], Tensor] = {}
        named = {(t.at.text, *t.index.items()): t.name for t in tensors if axis.name in t.index}
        for tensor in tensors:
            layer = () if shared else tuple((a, i) for a, i in tensor.index.items() if a in facts.layers)
            for place in _places(tensor.dims, axis.name):
                held = alike.setdefault(layer, torch.ones(len(pairs), dtype=torch.bool))
                if bool(held.any()) and not together:
                    held &= _equal(_view(target.read(tensor.name), tensor.dims, place, facts), pairs, held)
            if axis.name not in tensor.index or together:
                continue
            # One tensor for each channel: an expert's.
            held = alike.setdefault(layer, torch.ones(len(pairs), dtype=torch.bool))
            for k in held.nonzero().flatten().tolist():
                j, i = pairs[k].tolist()
                if j == tensor.index[axis.name]:
                    name = named[tensor.at.text, *{**tensor.index, axis.name: i}.items()]
                    held[k] = torch.equal(target.read(tensor.name), target.read(name))
        found = sum(len(set(pairs[held, 0].tolist())) for held in alike.values())
        out[axis.name] = (found, axis.new * len(alike))
    return {name: counts for name, counts in out.items() if counts[0]}


def copied_axes(facts: Facts) -> list[Axis]:
    """The axes with copies that are all read, each by a part of what read the old channel.

    Key/value heads are told apart by the heads that read them, and copies that nobody reads by their positions.
    """
    return [
        axis
        for axis in facts.axes.values()
        if axis.copied
        and not facts.attending.sharing(axis.name)
        and all(back is not None for back, i in zip(axis.backs, axis.source.tolist(), strict=True) if i >= 0)
    ]


def _turned(facts: Facts, tensors: Sequence[Placed], target: Tensors) -> bool:
    """Whether the model stays the same when every copy, on all axes at once, takes the place of the next.

    A model beside itself has no two channels that all tensors treat alike, and two halves that learn the same.
    """
    turns = {axis.name: _turn(axis) for axis in facts.axes.values() if axis.copied}
    if any(axis in turns for tensor in tensors for axis in tensor.index):
        return False  # which tensor takes whose place is not worked out
    for tensor in tensors:
        value = target.read(tensor.name)
        moved = value
        for d, dim in enumerate(tensor.dims):
            if any(atom.axis in turns for atom in dim.atoms()):
                moved = moved.index_select(d, _order(dim, turns, facts))
        if moved is not value and not torch.equal(moved, value):
            return False
    return True


def _turn(axis: Axis) -> Tensor:
    """[new] For each channel the next copy of the same old one, the first after the last."""
    places: dict[int, list[int]] = {}
    for j, i in enumerate(axis.source.tolist()):
        places.setdefault(i if i >= 0 else -2 - j, []).append(j)
    out = torch.arange(axis.new)
    for copies in places.values():
        out[copies] = torch.tensor([*copies[1:], copies[0]])
    return out


def _order(dim: Dim, turns: Mapping[str, Tensor], facts: Facts) -> Tensor:
    """The order of a dim's indices when the channels of its axes are turned."""
    if dim.atom is not None:
        axis = dim.atom.axis
        if isinstance(axis, int):
            return torch.arange(axis)
        return turns[axis] if axis in turns else torch.arange(facts.axes[axis].size)
    parts = [_order(part, turns, facts) for part in dim.parts]
    out = parts[-1]
    for part in reversed(parts[:-1]):
        joined = dim.kind == "concat"
        out = torch.cat([part, out + len(part)]) if joined else (part[:, None] * len(out) + out[None, :]).flatten()
    return out


def _pairs(axis: Axis) -> Tensor:
    """[pair, 2] Every channel that is a copy, with each earlier copy of the same old one."""
    seen: dict[int, list[int]] = {}
    out: list[tuple[int, int]] = []
    for j, i in enumerate(axis.source.tolist()):
        if i >= 0:
            earlier = seen.setdefault(i, [])
            out += [(j, other) for other in earlier]
            earlier.append(j)
    return torch.tensor(out, dtype=torch.int64).reshape(-1, 2)


def _equal(view: Tensor, pairs: Tensor, held: Tensor) -> Tensor:
    """[pair] Whether the slabs [channel, ...] of the two are equal; False where they were not before."""
    out = torch.zeros_like(held)
    for k in held.nonzero().flatten().tolist():
        j, i = pairs[k].tolist()
        out[k] = torch.equal(view[j], view[i])
    return out


def _places(dims: Sequence[Dim], axis: str) -> Iterator[tuple[int, ...]]:
    """The way to every place of an axis in a tensor's dims: the dim, then parts within it."""

    def walk(dim: Dim, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if dim.atom is not None and dim.atom.axis == axis:
            yield path
        for i, part in enumerate(dim.parts):
            yield from walk(part, (*path, i))

    for d, dim in enumerate(dims):
        yield from walk(dim, (d,))


def _view(tensor: Tensor, dims: Sequence[Dim], place: tuple[int, ...], facts: Facts) -> Tensor:
    """The tensor with the axis at `place` as its first dim, on its own."""

    def size(atom: Atom) -> int:
        return atom.axis if isinstance(atom.axis, int) else facts.axes[atom.axis].size

    d, *path = place
    view, dim = tensor.movedim(d, 0), dims[d]
    for i in path:
        sizes = [part.size(size) for part in dim.parts]
        if dim.kind == "concat":
            view = view.narrow(0, sum(sizes[:i]), sizes[i])
        else:
            view = view.reshape(*sizes, *view.shape[1:]).movedim(i, 0)
            view = view.reshape(sizes[i], -1)
        dim = dim.parts[i]
    return view
