"""Ports: what the lift of an axis becomes for a tensor that writes it, reads it, or is a norm's gain or shift over it.

This is the table of design section 1 with the norms of section 3. `free` on a run of new channels says that this
tensor's entries there can be anything, because the closed side is the other one; a block is free when any of its new
dims says so, and zero otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from growformer.algebra import Atom, Factor, Family, Lift, Run
from growformer.planning.growth import AxisGrowth, Growth


def port(family: Family, growth: Growth, atom: Atom, index: Mapping[str, int]) -> Lift:
    """The lift of `atom` for the tensor it stands in, at the target index `index`."""
    if isinstance(atom.axis, int):
        return Lift.identity(atom.axis)
    axis = growth.at(atom.axis, index)
    normed = family.norm_over(atom.axis) is not None
    if atom.stand == "gain":
        return _gain(family, growth, axis, atom.role)
    if atom.stand == "shift":
        return axis.normed.times(tied_demand(family, growth, axis, atom.role)).freed(False)
    if atom.stand == "write" and atom.role == "k" and atom.axis == "key" and not normed:
        # Of the two sides of the dot product, the key projection is the one that reads (arXiv 2308.06103, eq. 17-19).
        return axis.normed.times(score_demand(family, axis)).freed(axis.closed == "writers")
    if atom.stand == "write":
        return axis.lift.times(axis.scale).freed(axis.closed == "readers")
    lift = axis.normed if normed else _dual(axis.lift.times(axis.scale))
    return lift.freed(axis.closed == "writers")


def score_demand(family: Family, axis: AxisGrowth) -> Factor:
    """What q.k must grow by for the scores to stay, when they are divided by sqrt(key)."""
    return Factor.sqrt(axis.new, axis.old) if family.attention.scaled and axis.old else Factor()


def tied_demand(family: Family, growth: Growth, axis: AxisGrowth, role: str | None) -> Factor:
    """What the norm before a tied head is multiplied by, for the head reads through the embedding's rescaled tensor."""
    if growth.tied and family.tied is not None and role == family.tied.norm:
        return axis.scale.inverse
    return Factor()


def gain_factor(family: Family, growth: Growth, axis: AxisGrowth, role: str | None) -> Factor:
    """The factor of a norm's old gains.

    With mean square times `energy` (eps times it as well), the normalised vector comes out divided by sqrt(energy) and
    multiplied by the scale of the writers; the gain makes up for both (arXiv 2308.06103, eq. 24, where energy = h/h').
    Of a query norm and a key norm the query's gain stays, and the key's takes what the score demands.
    """
    energy = Factor(axis.energy)
    first = next((run.factor for run in axis.lift.runs if run.old is not None), Factor())
    restore = energy / (axis.scale * first)
    if axis.axis == "key":
        return restore * restore * score_demand(family, axis) if role == "k" else Factor()
    return restore * tied_demand(family, growth, axis, role)


def _gain(family: Family, growth: Growth, axis: AxisGrowth, role: str | None) -> Lift:
    lift = axis.normed.times(gain_factor(family, growth, axis, role))
    if axis.closed == "readers":
        # Only the query side of a normed key axis is free: the key's gain is what closes the new channels.
        return lift.freed(role == "q")
    return lift.freed(True)


def _dual(lift: Lift) -> Lift:
    """What a reader does: it takes R where a writer takes E."""
    runs = tuple(
        Run(run.count, None, back=None)
        if run.old is None or run.back is None
        else replace(run, factor=run.back, back=run.factor)
        for run in lift.runs
    )
    return Lift(lift.old, runs)


def eps_factor(axis: AxisGrowth) -> Fraction:
    """What the eps of a norm over `axis` is multiplied by."""
    return axis.energy
