"""Pairs: new channels that are written alike and read with opposite signs, compared tensor by tensor.

With a_i = a_j, for every tensor that writes them has equal entries there, what reads them adds w a_i - w a_j = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from growformer.algebra.family import OUTSIDE, Family
from growformer.algebra.pattern import Dim
from growformer.proof.axes import NONE, Axis
from growformer.proof.reading import Tensors

PIECE = 1 << 20
"""Entries that are compared at once."""


def check_pairs(axes: Mapping[str, Axis], dims: Sequence[Dim], target: Tensors, name: str) -> str | None:
    """What is wrong with a target tensor's entries at pairs of channels; None where nothing is.

    Args:
        axes: the receipt's.
        dims: the tensor's.
        target, name: the tensor.
    """
    for d, dim in enumerate(dims):
        partner, sign, _ = _partners(dim, axes)
        second = (partner >= 0) & (partner < torch.arange(len(partner)))
        places = second.nonzero().flatten().tolist()
        shape = target.shape(name)
        step = max(1, PIECE // max(1, torch.Size(shape[1:]).numel()))
        for rows in _rows(shape[0], step):
            piece = target.read(name, rows)
            mine = [j for j in places if d or rows.start <= j < rows.stop]
            if not mine:
                continue
            index, other = torch.tensor(mine), partner[mine]
            here = piece.index_select(d, index) if d else piece[index - rows.start]
            there = piece.index_select(d, other) if d else _gathered(target, name, other)
            signs = sign[index].to(piece.dtype).reshape([-1 if e == d else 1 for e in range(piece.dim())])
            bad = here != there * signs
            if bool(bad.any()):
                at = bad.nonzero()[0].tolist()
                found, wanted = float(here[tuple(at)]), float((there * signs)[tuple(at)])
                at[d] = mine[at[d]]
                at[0] += rows.start if d else 0
                return f"{name}{at}: found {found!r}; required {wanted!r}, as its partner demands"
    return None


def check_inside(axes: Mapping[str, Axis], dims: Sequence[Dim], target: Tensors, name: str) -> str | None:
    """What is wrong with a tensor of a new layer whose channels all stand in pairs; None where nothing is.

    Args:
        axes: those of the layer's inside (see `inside`).
        dims: the tensor's.
        target, name: the tensor.
    """
    value = target.read(name)
    if not bool(value.isfinite().all()):
        return f"{name}: found a number that is not finite"
    for d, dim in enumerate(dims):
        partner, sign, _ = _partners(dim, axes)
        alone = ((partner == NONE) & (sign < 0)).nonzero().flatten()
        if len(alone) and bool((value.index_select(d, alone) != 0).any()):
            return f"{name}: found a unit without a partner that is read; required zero"
    return check_pairs(axes, dims, target, name)


def inside(family: Family, axes: Mapping[str, Axis]) -> dict[str, Axis]:
    """The axes of a new layer, most of them in pairs: the second half is the first's; heads go by what they read.

    Raises:
        ValueError: more than sums stand between these channels and the stream.
    """
    if any(norm.output in ("added", "stream") for norm in family.norms.values()):
        raise ValueError("norms stand between what a layer makes and the stream, so that it is not closed by pairs")
    out = {}
    grouped = {axis for a in family.attentions for axis in (a.heads, a.kv_heads, a.group, *a.key, a.value)}
    for axis in axes.values():
        special = axis.name in (*family.streams, *OUTSIDE, *grouped) or axis.name in family.copied
        experts = family.experts is not None and axis.name == family.experts.axis
        if not special and not experts and family.norm_over(axis.name) is None:
            out[axis.name] = _halved(axis, range(axis.new))
    for attention in family.attentions:
        if attention.alibi is not None:
            raise ValueError("heads differ by their slopes, and have no pairs")
        heads = axes[attention.heads]
        shared = axes[attention.kv_heads or attention.heads]
        out[shared.name] = whole = _halved(shared, range(shared.new))
        group, partner = heads.new // shared.new, torch.full((heads.new,), NONE)
        assert whole.partner is not None
        for j, other in enumerate(whole.partner.tolist()):
            mine = torch.arange(j * group, (j + 1) * group)
            within = _halved(heads, mine.tolist()).partner
            assert within is not None
            partner[mine] = mine + (other - j) * group if other >= 0 else within[mine]
        if heads.name != shared.name:
            out[heads.name] = replace(_halved(heads, []), partner=partner)
    return {name: replace(axis, partner=None) for name, axis in axes.items()} | out


def _halved(axis: Axis, places: Sequence[int]) -> Axis:
    """An axis of new channels, of which those at some places stand in pairs, first half and second."""
    partner, half = torch.full((axis.new,), NONE), len(places) // 2
    for i in range(half):
        partner[places[i]], partner[places[half + i]] = places[half + i], places[i]
    return replace(axis, source=torch.full((axis.new,), NONE), partner=partner)


def _rows(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _gathered(target: Tensors, name: str, rows: Tensor) -> Tensor:
    return torch.stack([target.read(name, slice(int(row), int(row) + 1))[0] for row in rows])


def _partners(dim: Dim, axes: Mapping[str, Axis]) -> tuple[Tensor, Tensor, Tensor]:
    """[new] For each index of a dim its partner, or NONE; the sign by which the two differ; whether it is new."""
    if dim.atom is not None:
        axis = axes.get(str(dim.atom.axis))
        if axis is None:
            size = dim.atom.axis if isinstance(dim.atom.axis, int) else 0
            return torch.full((size,), NONE), torch.ones(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        partner = torch.full((axis.new,), NONE) if axis.partner is None else axis.partner
        opposite = dim.atom.stand == "read" and axis.partner is not None
        return partner, torch.full((axis.new,), -1 if opposite else 1), axis.source == NONE
    parts = [_partners(part, axes) for part in dim.parts]
    partner, sign, new = parts[-1]
    for outer, outer_sign, outer_new in reversed(parts[:-1]):
        if dim.kind == "concat":
            partner = torch.cat([outer, torch.where(partner >= 0, partner + len(outer), NONE)])
            sign, new = torch.cat([outer_sign, sign]), torch.cat([outer_new, new])
            continue
        # Of a new outer channel the outer axis alone says what stands where.
        size, alone = len(partner), outer_new[:, None].expand(-1, len(partner))
        left = torch.where(outer[:, None] >= 0, outer[:, None] * size + torch.arange(size), NONE)
        right = torch.where(partner >= 0, torch.arange(len(outer))[:, None] * size + partner, NONE)
        partner = torch.where(alone, left, right).flatten()
        sign = torch.where(alone, outer_sign[:, None], sign[None, :]).flatten()
        new = (alone | new[None, :]).flatten()
    return partner, sign, new
