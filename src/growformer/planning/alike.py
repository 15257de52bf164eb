"""Copies that nothing in the model tells from their originals: they get equal gradients, and learn the same.

In exact arithmetic such a growth adds parameters and FLOPs, and nothing that the small model could not learn
(docs/results.md measures it). Whether copies are alike follows from the plan: a tensor tells two channels apart where
it makes their entries in two ways, or draws them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from growformer.algebra import Atom, Dim, Family, Lift, Run
from growformer.planning.cover import stored_dims
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.moves import field
from growformer.planning.plan import Block, TensorPlan

Turns = Mapping[str, Sequence[int]]
"""By axis, for each channel the next copy of the same old one, the first after the last."""

Pair = tuple[Run, Run | None, bool]
"""How an index of a dim is made; how the one is that takes its place, None: of another source; whether it stays."""


def alike(family: Family, growth: Growth, tensors: Sequence[TensorPlan]) -> list[str]:
    """Sentences that name the axes whose copies nothing tells from their originals; none where there are none.

    Says less rather than more. What has a size for each layer, experts, and three copies of which only two are alike
    are left to the proof, which looks at the grown numbers.

    Args:
        family, growth: of the target.
        tensors: every target tensor.
    """
    indices = {axis for name, _ in family.patterns for axis in name.axes}
    copied = [axis for axis in growth if _repeats(axis)]
    if not copied or any(axis.scope or axis.axis in indices for axis in copied):
        return []
    shared = {a for x in family.attentions for a in (x.kv_heads, x.group) if a != x.heads}
    turns = {axis.axis: _turn(axis) for axis in copied}
    told = [axis for axis in copied if axis.heard and axis.axis not in shared]
    together = bool(told) and _unchanged(family, growth, tensors, turns)

    def alone(axis: str) -> bool:
        # But for streams, a new layer has channels of its own, and none of them is a copy.
        mine = [t for t in tensors if t.source is not None or axis in family.streams]
        return _unchanged(family, growth, mine, {axis: turns[axis]})

    found = [axis for axis in told if together or alone(axis.axis)]
    kinds = ([a for a in found if a.shares.fresh is fresh] for fresh in (False, True))
    return [_said(family, axes) for axes in kinds if axes]


def _said(family: Family, axes: Sequence[AxisGrowth]) -> str:
    grown = ", ".join(f"{field(family, a.axis) or a.axis} {a.old} -> {a.new}" for a in axes)
    what = f"{grown}: nothing tells the copies from their originals"
    if axes[0].shares.fresh:
        return f"{what} but an optimizer that forgets them, as it does where a run grows with its optimizer"
    return (
        f"{what}, so that in exact arithmetic they learn the same and add nothing; lemon, halves and matrix-split "
        f"share unequally, and paper draws new channels"
    )


def _repeats(axis: AxisGrowth) -> bool:
    """Whether an old channel stands more than once."""
    old = [i for i in axis.sources if i is not None]
    return len(old) > len(set(old))


def _turn(axis: AxisGrowth) -> list[int]:
    """[new] For each channel the next copy of the same old one, the first after the last."""
    places: dict[int, list[int]] = {}
    out = list(range(axis.new))
    for j, i in enumerate(axis.sources):
        if i is not None:
            places.setdefault(i, []).append(j)
    for copies in places.values():
        for one, following in zip(copies, [*copies[1:], copies[0]], strict=True):
            out[one] = following
    return out


def _unchanged(family: Family, growth: Growth, tensors: Iterable[TensorPlan], turns: Turns) -> bool:
    """Whether every tensor stays as it is when each copy of these axes takes the place of the next."""
    dims = {name.text: stored_dims(name, pattern) for name, pattern in family.patterns}
    known: dict[tuple[Dim, Lift], Collection[Pair]] = {}
    for tensor in tensors:
        here = dims[tensor.pattern]
        if not any(atom.axis in turns for dim in here for atom in dim.atoms()):
            continue
        pairs = []
        for dim, lift in zip(here, tensor.dims, strict=True):
            if (dim, lift) not in known:
                order = _order(dim, growth, turns) if any(atom.axis in turns for atom in dim.atoms()) else None
                known[dim, lift] = _pairs([run for _, run in lift.spans()], order)
            pairs.append(known[dim, lift])
        if not all(_same(tensor, parts) for parts in itertools.product(*pairs)):
            return False
    return True


def _order(dim: Dim, growth: Growth, turns: Turns) -> list[int]:
    """The order of a dim's indices when the channels of its axes are turned."""
    if dim.atom is not None:
        axis = dim.atom.axis
        return list(turns.get(str(axis), range(_size(dim.atom, growth))))
    parts = [_order(part, growth, turns) for part in dim.parts]
    out = parts[-1]
    for part in reversed(parts[:-1]):
        if dim.kind == "concat":
            out = [*part, *(len(part) + i for i in out)]
        else:
            out = [i * len(out) + j for i in part for j in out]
    return out


def _size(atom: Atom, growth: Growth) -> int:
    return atom.axis if isinstance(atom.axis, int) else growth.at(atom.axis).new


def _pairs(runs: Sequence[Run], order: Sequence[int] | None) -> Collection[Pair]:
    """Every sort of index of a dim with the sort of the one that takes its place; None: each stays."""
    sorts = [_sort(run) for run in runs]
    if order is None:
        return {(sort, sort, True) for sort in sorts}
    made = [
        (k, None if run.old is None else run.old + (0 if run.mean else i))
        for k, run in enumerate(runs)
        for i in range(run.count)
    ]
    places = {(made[p][0], made[q][0], made[p][1] == made[q][1], p == q) for p, q in enumerate(order)}
    return {(sorts[k], sorts[other] if one else None, stays) for k, other, one, stays in places}


def _sort(run: Run) -> Run:
    """What is alike of all channels of a run, moments aside."""
    return replace(run, count=1, old=None if run.old is None else 0, back=None, fresh=False)


def _same(tensor: TensorPlan, parts: Sequence[Pair]) -> bool:
    """Whether entries are made as those are that take their places."""
    if all(stays for _, _, stays in parts):
        return True
    here = [(0, one) for one, _, _ in parts]
    there = [(0, other) for _, other, _ in parts if other is not None]
    if len(there) < len(here):
        return False
    block = tensor.block(here)
    return block == tensor.block(there) and not _drawn(tensor, block)


def _drawn(tensor: TensorPlan, block: Block) -> bool:
    """Whether entries of a block differ from each other by a draw."""
    if block.source is None:
        return block.free and tensor.fill.kind == "normal"
    return any(block.shares) or bool(block.noise)
