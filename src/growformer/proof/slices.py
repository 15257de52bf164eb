"""Experts that are split: the slices of an expert's width that its copies have, and what makes them add up to it.

m copies of an expert are each weighed by 1/m of what it was (the router's rows are copied, and m times as many are
chosen). Of a hidden state x the expert gave D f(W x), f channel by channel. A copy with the rows S of W gives
f(W_S x), so that the copies give (1/m) sum_S D'_S f(W_S x), which is the expert's where the S are each of its channels
once, and D'_S = m D_S.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from growformer.algebra.family import Family
from growformer.proof.axes import Axis


def slices_of(axes: Mapping[str, Axis]) -> int:
    """In how many slices every expert is split; 1: in none."""
    return max((axis.slices for axis in axes.values()), default=1)


def check_slices(family: Family, axes: Mapping[str, Axis]) -> Iterator[str]:
    """What is wrong with slices by the axes alone, and by the patterns that they stand in."""
    for axis in axes.values():
        if axis.slices == 1:
            continue
        said = f"axis {axis.name}: in {axis.slices} slices"
        if family.experts is None or family.experts.axis not in axes or axis.name == family.experts.axis:
            yield f"{said}, and {family.name} has no experts that could have one each"
            continue
        experts = axes[family.experts.axis]
        if experts.times != axis.slices:
            found = experts.times or "none"
            yield f"{said}; required as many copies of all experts, one after the other; found {found}"
        if not axis.plain or sorted(axis.source.tolist()) != list(range(axis.old)):
            yield f"{said}; required every old channel in one of them, once, as it is"
        if family.norm_over(axis.name) is not None or family.norm_across(axis.name) is not None:
            yield f"{said}, and a norm reads all of them together"
        for at, pattern in family.patterns:
            stands = {atom.stand for atom in pattern.atoms() if atom.axis == axis.name}
            summed = any((a.axis, a.stand) == (experts.name, "read") for a in pattern.atoms())
            if stands and experts.name not in at.axes:
                yield f"{said}, and {at.text} is no single expert's"
            elif stands - {"write", "read"} or summed != ("read" in stands):
                yield f"{said}; of {at.text} no rule says how its copies add up"


def slice_number(experts: Axis, expert: int) -> int:
    """Which slice an expert of the target has: how many copies of the same one stand before it."""
    return int((experts.source[:expert] == experts.source[expert]).sum())
