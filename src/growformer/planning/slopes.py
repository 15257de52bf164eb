"""Units that are written with zeros: never to learn where the activation has no slope at zero, or not silent there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from growformer.algebra import GATE, Family, lookup
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.moves import field

FLAT = ("relu", "relu2", "relu6")
"""Activations whose derivative at 0 is 0, as torch has it, by the names of config fields.

What writes a unit gets a gradient times that derivative, and what reads it one times the unit itself: both are 0.
"""

LOUD = ("sigmoid", "laplace", "sqrtsoftplus", "xielu")
"""Activations that are not 0 at 0, as transformers has them: what reads such a unit adds to the function."""


def without_slope(family: Family, growth: Growth, config: Mapping[str, Any]) -> Growth:
    """The growth, in which new units that no gradient will ever reach are named dead.

    Args:
        family: of the config; it says which field names the units' activation (`Family.activations`). Units that a gate
            multiplies are reached through it.
        growth: of every axis.
        config: the source's, with defaults filled in.

    Raises:
        RequestError: they would be read, and are not 0.
    """
    gated = {
        atom.axis
        for name, pattern in family.patterns
        if any(atom.role == GATE for atom in pattern.atoms())
        if name.text not in family.optional or lookup(config, family.optional[name.text])
        for atom in pattern.atoms()
    }

    def told(axis: AxisGrowth) -> AxisGrowth:
        name = family.activations.get(axis.axis)
        act = None if name is None or axis.axis in gated else lookup(config, name)
        if act not in (*FLAT, *LOUD) or axis.closed != "writers" or not 0 < axis.old < axis.new or axis.dead:
            return axis
        what = f"{field(family, axis.axis) or axis.axis} {axis.old} -> {axis.new}: new units are written with zeros"
        if act in LOUD:
            raise RequestError(
                f"{what}, and {name}={act} of 0 is not 0, so that they would be read; mlp=paper is exact"
            )
        why = f"where {name}={act} has no slope, so that no gradient ever reaches them; mlp=paper is alive"
        return replace(axis, dead=f"{what}, {why}")

    axes = [told(axis) for axis in growth]
    return Growth(axes, tied=growth.tied, headed=growth.headed, inside=growth.inside)
