"""Axes, patterns, lifts, fills, and the types a family or a method is declared with; no files, no transformers."""

from growformer.algebra.becoming import Becoming
from growformer.algebra.facts import Attention, Divides, Experts, Frozen, Lends, Norm, Power, Rotary, Tied
from growformer.algebra.family import OUTSIDE, Family, PerLayer, replace
from growformer.algebra.fill import BARRED, Fill
from growformer.algebra.lift import ONE, Factor, Lift, Run, concat, product
from growformer.algebra.method import Method, Side
from growformer.algebra.pattern import ODDS, RAW, WILD, Atom, Dim, NamePattern, TensorPattern
from growformer.algebra.sizes import Field, Layered, Ratio, Size, Times, Unlike, assigned, fields_of, layered, lookup

__all__ = [
    "BARRED",
    "ODDS",
    "ONE",
    "OUTSIDE",
    "RAW",
    "WILD",
    "Atom",
    "Attention",
    "Becoming",
    "Dim",
    "Divides",
    "Experts",
    "Factor",
    "Family",
    "Field",
    "Fill",
    "Frozen",
    "Layered",
    "Lends",
    "Lift",
    "Method",
    "NamePattern",
    "Norm",
    "PerLayer",
    "Power",
    "Ratio",
    "Rotary",
    "Run",
    "Side",
    "Size",
    "TensorPattern",
    "Tied",
    "Times",
    "Unlike",
    "assigned",
    "concat",
    "fields_of",
    "layered",
    "lookup",
    "product",
    "replace",
]
