"""Axes, patterns, lifts, fills, and the types a family or a method is declared with; no files, no transformers."""

from growformer.algebra.becoming import Becoming
from growformer.algebra.facts import Attention, Divides, Experts, Frozen, Lends, Norm, Power, Rotary, Tied
from growformer.algebra.family import OUTSIDE, Family, PerLayer, replace
from growformer.algebra.fill import BARRED, Fill
from growformer.algebra.lift import ONE, Factor, Lift, Run, concat, product
from growformer.algebra.method import KINDS, Kind, Method, Order, Side, Way
from growformer.algebra.pattern import GATE, ODDS, RAW, WILD, Atom, Dim, NamePattern, TensorPattern
from growformer.algebra.sizes import Field, Layered, Ratio, Size, Times, Unlike, assigned, fields_of, layered, lookup
from growformer.algebra.split import HALVES, SPLITS, Split, copies, shared

__all__ = [
    "BARRED",
    "GATE",
    "HALVES",
    "KINDS",
    "ODDS",
    "ONE",
    "OUTSIDE",
    "RAW",
    "SPLITS",
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
    "Kind",
    "Layered",
    "Lends",
    "Lift",
    "Method",
    "NamePattern",
    "Norm",
    "Order",
    "PerLayer",
    "Power",
    "Ratio",
    "Rotary",
    "Run",
    "Side",
    "Size",
    "Split",
    "TensorPattern",
    "Tied",
    "Times",
    "Unlike",
    "Way",
    "assigned",
    "concat",
    "copies",
    "fields_of",
    "layered",
    "lookup",
    "product",
    "replace",
    "shared",
]
