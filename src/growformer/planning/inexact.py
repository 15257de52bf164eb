"""Where the dual of a growth does not say what gradients do: copies whose shares are of unlike sizes, and means.

The gradient of a copied channel is what its readers send back: alpha_k of the old one where the k-th copy's readers
have alpha_k of every weight, and no multiple of it where the parts differ from entry to entry. A norm over the copies
takes a mean of all of them off each, which is alpha_k of the old one's for equal parts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from growformer.algebra import WILD, Atom, Family, Lift, NamePattern, TensorPattern
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.ports import last_norm

MEAN = "new channels carry the mean of the old ones, and a part of their gradient"
UNREAD = "its channels are copied, and the copies take a part of their gradient"
ENTRYWISE = "its channels are copied, and what reads them is shared entry by entry"
UNEVEN = "its channels are copied under a norm, and what reads them is shared unevenly"
TIED = "its channels are copied unevenly, and the tied head reads every copy alike"

SLICED = "its rows weigh the slices of what was one expert, each of which has a gradient of its own"


def inexact(
    family: Family,
    growth: Growth,
    name: NamePattern,
    pattern: TensorPattern,
    index: Mapping[str, int],
    dims: Sequence[Lift],
) -> str:
    """Why a target tensor's moments are not the source's by the dual; empty where they are.

    Args:
        family, growth: the model's.
        name, pattern: the tensor's.
        index: where its index axes are, in the target.
        dims: its lifts.
    """
    if any(run.mean for dim in dims for run in dim.runs):
        return MEAN
    unread = any(run.old is not None and run.back is None for dim in dims for run in dim.runs)
    read = {atom.axis for atom in pattern.atoms() if atom.stand == "read"}
    for axis in name.axes:
        whole = growth.at(axis, index)
        if axis in family.layers:
            continue
        if _unread(whole):
            return UNREAD
        if whole.heard and whole.shares.by_entry and axis not in read:
            return ENTRYWISE
    for atom in pattern.atoms():
        if not isinstance(atom.axis, str) or atom.axis == WILD or atom.index:
            continue
        said = _of(family, growth, atom, growth.at(atom.axis, index), index, unread)
        if said:
            return said
    return ""


def _of(family: Family, growth: Growth, atom: Atom, axis: AxisGrowth, index: Mapping[str, int], unread: bool) -> str:
    """The same of one axis that a tensor has among its dims."""
    if unread and _unread(axis):
        return UNREAD
    if axis.split and atom.stand == "write":
        return SLICED
    if not axis.heard or atom.stand == "read" or _keys(family, atom):
        return ""
    uneven = any(run.back != axis.lift.runs[0].back for run in axis.lift.runs)
    if atom.stand != "write":
        if growth.tied and last_norm(family, growth, atom.role, index):
            return TIED if uneven else ""
        return ENTRYWISE if axis.shares.by_entry else ""
    if axis.shares.by_entry:
        return ENTRYWISE
    return UNEVEN if uneven and family.norm_over(axis.axis) is not None else ""


def _keys(family: Family, atom: Atom) -> bool:
    """Whether a tensor writes keys, which read the channels that queries write."""
    attention = family.attention_of(str(atom.axis))
    return attention is not None and atom.axis in attention.key and family.side(atom.role) == "k"


def _unread(axis: AxisGrowth) -> bool:
    """Whether the axis has copies that what reads it sees, and R does not."""
    return any(run.old is not None and not run.mean and run.back is None for run in axis.lift.runs)
