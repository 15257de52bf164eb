"""Layers that end in a norm on the stream: where gains and shifts must stand when new layers take them over.

A new layer that adds nothing normalises the stream all the same. It leaves what is normalised already as it is, up to
eps, if the norms before it and inside it have one gain K for all channels and no shift; the gain and shift that the
stream had then stand at the norm that ends the new layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from growformer.algebra.factor import Factor
from growformer.algebra.facts import Norm
from growformer.algebra.family import Family
from growformer.algebra.pattern import NamePattern

LayerMap = Mapping[str, Sequence[int | None]]


@dataclass(frozen=True)
class Handed:
    """One old place of the stream, and where its gain and shift are in the target.

    Attributes:
        source: the source layer that the norm ends; -1: it stands before the first.
        stood: the target layer that is this one.
        stands: the target layer that the gain and shift end now; another one where new layers come between.
    """

    source: int
    stood: int
    stands: int


def handed(layers: Sequence[int | None]) -> list[Handed]:
    """Every old place of the stream, in order."""
    stood = [-1, *(at for at, old in enumerate(layers) if old is not None), len(layers)]
    return [Handed(source - 1, at, after - 1) for source, (at, after) in enumerate(pairwise(stood))]


class Stack:
    """The norms on the stream of one axis of layers.

    Attributes:
        last: by stand (gain, shift), the name of the norm that ends each layer.
        first: the same of the norm before the first layer; empty where there is none.
        inside: the names of all others in the layers, with their stands.
        norm: that ends each layer.
        problems: why new layers are not covered.
    """

    def __init__(self, family: Family, axis: str) -> None:
        self.last: dict[str, NamePattern] = {}
        self.first: dict[str, NamePattern] = {}
        self.inside: list[tuple[NamePattern, str]] = []
        self.norm: Norm | None = None
        self.problems: list[str] = []
        eps: set[str | float] = set()
        for at, norm, stand in _on_stream(family):
            if axis in at.axes and norm.feeds != axis:
                self.inside.append((at, stand))
            elif norm.feeds == axis:
                where = self.last if axis in at.axes else self.first
                self._say(stand in where, f"{where[stand].text if stand in where else ''} and {at.text} both feed it")
                where[stand] = at
                self.norm = norm if axis in at.axes else self.norm
            else:
                continue
            eps.add(norm.eps)
            self._say(norm.gain is None or set(at.axes) - {axis} != set(), f"{at.text} is no gain of its layer alone")
        self._say(bool(self.inside) and "gain" not in self.last, f"{self._some()} stands on the stream, and ends none")
        self._say("gain" in self.last and len(eps) > 1, f"its norms have several eps, {sorted(map(str, eps))}")
        self._say(bool(self.first) and set(self.first) != set(self.last), "the first norm's shift has no counterpart")

    def _say(self, wrong: bool, what: str) -> None:
        if wrong:
            self.problems.append(f"{what}; not covered")

    def _some(self) -> str:
        return self.inside[0][0].text if self.inside else ""

    @property
    def empty(self) -> bool:
        """No norm of the layers stands on the stream."""
        return not self.last and not self.inside

    @property
    def norms(self) -> int:
        """How many norms a vector passes in each layer.

        Where one is skipped (that of cross-attention, without an encoder), it is one less, which moves eps^3.
        """
        return sum(stand == "gain" for _, stand in self.inside) + ("gain" in self.last)

    def name(self, stand: str, place: int, axis: str) -> tuple[NamePattern, dict[str, int]] | None:
        """The gain or shift that stands after a layer (-1: before the first)."""
        if place >= 0:
            return self.last[stand], {axis: place}
        return (self.first[stand], {}) if stand in self.first else None


def _on_stream(family: Family) -> Iterator[tuple[NamePattern, Norm, str]]:
    for at, pattern in family.patterns:
        for atom in pattern.atoms():
            norm = family.norms.get(atom.role or "")
            if atom.stand in ("gain", "shift") and norm is not None and norm.output == "stream":
                yield at, norm, atom.stand


def kept_gains(family: Family, told: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Factor], list[str]]:
    """By axis of layers, the gain K that the receipt tells; with what is wrong with it.

    Below one, K would shrink what a norm reads towards its eps, and no bound of eps alone would hold.
    """
    out, problems = dict[str, Factor](), list[str]()
    for axis in family.layers:
        text = told.get(axis, {}).get("kept")
        if text is None:
            continue
        try:
            out[axis] = Factor(Fraction(text))
        except (ValueError, TypeError, ZeroDivisionError) as error:
            problems.append(f"axis {axis}: its kept gain {text!r}: {error}")
            continue
        if out[axis].square < 1:
            problems.append(f"axis {axis}: norms keep a gain whose square is {text}; required 1 or more")
    return out, problems


def check_handing(family: Family, axis: str, layers: Sequence[int | None], kept: Mapping[str, Factor]) -> list[str]:
    """What is wrong with new layers of an axis, as far as norms on the stream are."""
    stack = Stack(family, axis)
    if stack.empty:
        return []
    problems = list(stack.problems)
    if axis not in kept:
        problems.append("each layer ends in a norm on the stream, and no gain is told that new ones keep")
    if layers[0] is None and not stack.first:
        problems.append("a new layer at 0, and no norm stands before the first")
    return [f"axis {axis}: {problem}" for problem in problems]
