"""Ports: what the lift of an axis becomes for a tensor that writes it, reads it, or is a norm's gain or shift over it.

This is the table of design section 1 with the norms of section 3. `free` on a run of new channels says that this
tensor's entries there can be anything, because the closed side is the other one; a block is free when any of its new
dims says so, and closed otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from growformer.algebra import GATE, ONE, OUTSIDE, RAW, Atom, Attention, Factor, Family, Lift, Norm, Run, shared
from growformer.planning.growth import AxisGrowth, Growth


def port(family: Family, growth: Growth, atom: Atom, index: Mapping[str, int]) -> Lift:
    """The lift of `atom` for the tensor it stands in, at the target index `index`."""
    if isinstance(atom.axis, int):
        return Lift.identity(atom.axis)
    axis = growth.at(atom.axis, index)
    if axis.axis in OUTSIDE or axis.barred:
        return axis.lift.freed(True)
    if atom.stand == "gain":
        return _gain(family, growth, axis, atom.role, index)
    if atom.stand == "shift":
        return axis.normed.times(shift_factor(family, growth, axis, atom.role, index)).freed(False)
    if atom.stand == "write":
        return _write(family, growth, axis, atom, index)
    return _read(family, axis, atom.role)


def _write(family: Family, growth: Growth, axis: AxisGrowth, atom: Atom, index: Mapping[str, int]) -> Lift:
    attention = family.attention_of(axis.axis)
    across = norm_across(family, atom.role, axis.axis)
    if across is not None:
        # Its eps serves other norms too: what it reads is rescaled, once, so that the mean square stays.
        rescale = Factor(across_energy(growth, across, index)).inverse if axis.axis == across.axes[-1] else ONE
        return axis.lift.times(axis.scale * rescale).freed(False)
    scored = attention is not None and axis.axis in attention.key and family.norm_over(axis.axis) is None
    if attention is not None and scored and family.side(atom.role) == "k":
        # Of the two sides of the dot product, the key projection is the one that reads (arXiv 2308.06103, eq. 17-19).
        demand = score_demand(growth, attention, index)
        if axis.heard:
            return shared(axis.lift, axis.shares, demand)
        return axis.facing(axis.normed.times(demand), "readers")
    lift = axis.lift.times(axis.scale * power(family, axis, atom.role))
    if axis.closed == "writers" and _open_writer(family, atom):
        donors = () if family.batch_norm(atom.role) else axis.donors  # a copy would wait for the gain to part from it
        return replace(axis, closed="readers", donors=donors).facing(lift, "writers")
    return _ahead(lift) if axis.ahead else axis.facing(lift, "writers")


def _ahead(lift: Lift) -> Lift:
    """The lift with every copy but the first of the next layer's tensor."""
    seen: set[int] = set()
    runs = []
    for run in lift.runs:
        first = run.old is None or run.old not in seen
        seen |= set() if run.old is None else set(range(run.old, run.old + run.count))
        runs.append(run if first else replace(run, ahead=True))
    return Lift(lift.old, tuple(runs))


def _open_writer(family: Family, atom: Atom) -> bool:
    """Whether a writer may hold anything at new channels though the axis is closed at its writers.

    A gate multiplies what is zero already; scores of a new head weigh nothing but its own values; and the gain of a
    batch norm behind it is zero.
    """
    attention = family.attention_of(str(atom.axis))
    heads = attention is not None and atom.axis not in (*attention.key, attention.value)
    scored = heads and family.side(atom.role) in ("q", "k")
    return atom.role == GATE or scored or family.batch_norm(atom.role) is not None


def _read(family: Family, axis: AxisGrowth, role: str | None) -> Lift:
    if axis.heard:
        # Experts are weighed by their router, which a copy shares: each copy's weights count for 1/m only.
        routed = family.experts is not None and axis.axis == family.experts.axis
        return shared(axis.lift, axis.shares, Factor.of(axis.new, axis.old) if routed else ONE)
    if axis.whole:
        return axis.lift
    if axis.split:
        return axis.lift.times(Factor.of(axis.new, axis.old))
    named = family.norms.get(role or "")  # a reader may say which of several norms it follows
    norm = None if role == RAW else named if named and named.axis == axis.axis else family.norm_over(axis.axis)
    if norm is None:
        return axis.facing(_dual(axis.lift.times(axis.scale)), "readers")
    taken = restoring(axis) if norm.gain is None else ONE
    return axis.facing(axis.normed.times(taken), "readers")


def score_demand(growth: Growth, attention: Attention, index: Mapping[str, int]) -> Factor:
    """What q.k must grow by for the scores to stay, when they are divided by the root of the head size."""
    axes = [growth.at(name, index) for name in attention.key]
    old, new = sum(axis.old for axis in axes), sum(axis.new for axis in axes)
    return Factor.sqrt(new, old) if attention.scaled and old else ONE


def power(family: Family, axis: AxisGrowth, role: str | None) -> Factor:
    """What a writer (or a gain) is multiplied by, for the code multiplies what it makes by a power of the size."""
    found = family.powers.get(role or "")
    if found is None or found.axis != axis.axis or not axis.old:
        return ONE
    return Factor(Fraction(axis.old, axis.new) ** int(2 * found.exponent))


def head_demand(family: Family, growth: Growth, axis: AxisGrowth, role: str | None, index: Mapping[str, int]) -> Factor:
    """What the norm before the head is multiplied by.

    A tied head reads through the embedding's own tensor, with its factor and all its copies, and the code may multiply
    the logits by a power of the hidden size.
    """
    if not last_norm(family, growth, role, index):
        return ONE
    demand = power(family, axis, "logits")
    if not growth.tied:
        return demand
    first = next((run.factor for run in axis.lift.runs if run.old is not None), ONE)
    written = axis.scale * first * power(family, axis, embedding_role(family))
    copies = Factor.of(axis.new, axis.old) if axis.heard else ONE
    return demand / (written * copies)


def last_norm(family: Family, growth: Growth, role: str | None, index: Mapping[str, int]) -> bool:
    """Whether a norm is the one whose output a head reads that may be tied."""
    tied = family.tied
    if tied is None or not growth.headed or role != tied.norm:
        return False
    return not tied.layer or index.get(tied.layer) == growth.at(tied.layer).new - 1


def shift_factor(
    family: Family, growth: Growth, axis: AxisGrowth, role: str | None, index: Mapping[str, int]
) -> Factor:
    """The factor of a norm's old shifts: they are added behind the norm, and know nothing of its mean square."""
    attention = family.attention_of(axis.axis)
    if attention is not None and axis.axis in attention.key:
        return score_demand(growth, attention, index) if family.side(role) == "k" else ONE
    return head_demand(family, growth, axis, role, index)


def embedding_role(family: Family) -> str | None:
    """The role under which the tied embedding writes the stream."""
    assert family.tied is not None
    atoms = family.find(family.tied.embedding)[1].atoms()
    return next((atom.role for atom in atoms if atom.axis in family.streams and atom.stand == "write"), None)


def restoring(axis: AxisGrowth) -> Factor:
    """What a norm's gain takes up of the energy and of the writers' scale, for its readers to see what they saw."""
    first = next((run.factor for run in axis.lift.runs if run.old is not None), ONE)
    return ONE if axis.heard else Factor(axis.energy) / (axis.scale * first)


def norm_across(family: Family, role: str | None, axis: str) -> Norm | None:
    """The norm of queries or keys that reads `axis` together with other axes."""
    norm = family.norms.get(role or "")
    return norm if norm is not None and len(norm.axes) > 1 and axis in norm.axes else None


def across_energy(growth: Growth, norm: Norm, index: Mapping[str, int]) -> Fraction:
    """By how much the mean square under a norm across several axes changes."""
    energy = Fraction(1)
    for name in norm.axes:
        energy *= growth.at(name, index).energy
    return energy


def gain_factor(
    family: Family, growth: Growth, axis: AxisGrowth, role: str | None, index: Mapping[str, int] | None = None
) -> Factor:
    """The factor of a norm's old gains.

    With mean square times `energy` (eps times it as well), the normalised vector comes out divided by sqrt(energy) and
    multiplied by the scale of the writers; the gain makes up for both (arXiv 2308.06103, eq. 24, where energy = h/h').
    What a norm adds to the stream keeps the scale. Of a query norm and a key norm the query's gain stays, and the key's
    takes what the score demands.
    """
    norm = family.norms.get(role or "")
    if norm is None or norm.axes[-1] != axis.axis or norm.kind == "batch":
        return ONE
    attention = family.attention_of(axis.axis)
    if attention is not None and axis.axis in attention.key:
        side = family.side(role)
        score = score_demand(growth, attention, index or {}) if side == "k" else ONE
        if len(norm.axes) > 1:
            # The rescaled writers made the normalised vector larger by as much as the mean square got smaller.
            return Factor(across_energy(growth, norm, index or {})) * score
        return restoring(axis) * restoring(axis) * score if side == "k" else ONE
    if norm.output in ("added", "inner"):
        return Factor(axis.energy)
    if norm.output == "stream":
        return head_demand(family, growth, axis, role, index or {})
    return restoring(axis) * head_demand(family, growth, axis, role, index or {}) * power(family, axis, role)


def _gain(family: Family, growth: Growth, axis: AxisGrowth, role: str | None, index: Mapping[str, int]) -> Lift:
    if family.batch_norm(role) is not None:
        # It closes what is closed at its writers: behind a zero map, batches have no variance to divide by.
        return replace(axis, donors=()).facing(axis.lift.times(axis.scale), "writers")
    attention = family.attention_of(axis.axis)
    if attention is not None and axis.axis not in attention.key:
        return axis.lift.freed(True)  # a gain for each head stays with its head, and a copied head has a copy
    lift = axis.normed.times(gain_factor(family, growth, axis, role, index))
    if attention is not None and axis.axis in attention.key and axis.closed == "readers":
        # Only the query side of a normed key axis is free: the key's gain is what closes the new channels.
        return lift.freed(family.side(role) == "q")
    return lift.freed(True)


def _dual(lift: Lift) -> Lift:
    """What a reader does: it takes R where a writer takes E."""
    runs = tuple(
        Run(run.count, None, back=None, mirror=run.mirror)
        if run.old is None or run.back is None
        else replace(run, factor=run.back, back=run.factor)
        for run in lift.runs
    )
    return Lift(lift.old, runs)


def eps_factor(axis: AxisGrowth) -> Fraction:
    """What the eps of a norm over `axis` is multiplied by."""
    return axis.energy
