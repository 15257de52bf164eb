"""Axes, patterns, lifts, fills, and the types a family or a method is declared with; no files, no transformers."""

from growformer.algebra.family import (
    Attention,
    Divides,
    Family,
    Field,
    Norm,
    Ratio,
    Rotary,
    Size,
    Tied,
    Times,
    replace,
)
from growformer.algebra.fill import Fill
from growformer.algebra.lift import ONE, Factor, Lift, Run, concat, product
from growformer.algebra.method import Method, Side
from growformer.algebra.pattern import Atom, Dim, NamePattern, TensorPattern

__all__ = [
    "ONE",
    "Atom",
    "Attention",
    "Dim",
    "Divides",
    "Factor",
    "Family",
    "Field",
    "Fill",
    "Lift",
    "Method",
    "NamePattern",
    "Norm",
    "Ratio",
    "Rotary",
    "Run",
    "Side",
    "Size",
    "TensorPattern",
    "Tied",
    "Times",
    "concat",
    "product",
    "replace",
]
