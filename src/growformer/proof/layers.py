"""Names: which tensor of the target comes from which of the source, by the layer maps and the axes that names hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from growformer.algebra.factor import Factor
from growformer.algebra.family import Family
from growformer.algebra.pattern import Atom, Dim, NamePattern, TensorPattern
from growformer.proof.facts import Facts
from growformer.proof.handing import LayerMap, Stack, check_handing, handed
from growformer.proof.origin import Origin
from growformer.proof.places import REACHED, SHUT, Places, Where, atom_places


@dataclass(frozen=True)
class Placed:
    """A target tensor (or a source tensor) under its family's pattern.

    Attributes:
        source: the tensor it comes from; None where it is new.
        like: the source tensor that it comes from, or whose layer it is like.
        closed: it is new, and must be zero.
        copies: where an axis in its name is read, all target tensors that share the source's weights.
        value: it is new, and each of its entries must be this number; None: any.
    """

    name: str
    at: NamePattern
    pattern: TensorPattern
    index: Mapping[str, int]
    source: str | None = None
    like: str = ""
    closed: bool = False
    copies: tuple[str, ...] = ()
    value: float | None = None

    @property
    def dims(self) -> list[Dim]:
        """The dims of the stored tensor: an axis that its name holds takes none."""
        named = self.at.axes
        return [d for d in self.pattern.dims if not (d.atom is not None and d.atom.index and d.atom.axis in named)]

    def reads(self, axis: str) -> bool:
        """Whether its name holds the axis, and it is one of those that are added up along it."""
        return axis in self.at.axes and self.atom(axis).stand == "read"

    def atom(self, axis: str) -> Atom:
        """How the tensor stands to an axis that its name holds: as the pattern says in brackets, or as a writer."""
        found = [atom for atom in self.pattern.atoms() if atom.index and atom.axis == axis]
        role = next((atom.role for atom in self.pattern.atoms()), None)
        return found[0] if found else Atom(axis, "write", role, True)


def layer_maps(
    family: Family, layers: LayerMap | Sequence[int | None], found: Mapping[str, int]
) -> dict[str, list[int | None]]:
    """The map of every layer axis; one that is not told stays as it is (`found`: how many layers the source has)."""
    told = layers if isinstance(layers, Mapping) else {family.layer: layers}
    return {axis: list(told.get(axis, range(found.get(axis, 0)))) for axis in family.layers}


def likes(layers: Sequence[int | None]) -> list[int]:
    """For each target layer the source layer that it is, or is like: the one before it, at the front the first."""
    last, out = 0, []
    for old in layers:
        last = last if old is None else old
        out.append(last)
    return out


def check_layers(family: Family, maps: LayerMap, gains: Mapping[str, Factor]) -> list[str]:
    """What is wrong with the layer maps by themselves.

    `gains`: by axis, the gain of the norms on the stream that gave theirs to a new layer.
    """
    problems = [f"axis {axis}: family {family.name} has no such layers" for axis in maps if axis not in family.layers]
    for axis in family.layers:
        layers = maps[axis]
        kept = [layer for layer in layers if layer is not None]
        if kept != list(range(len(kept))):
            problems.append(f"axis {axis}: layers {kept} of the source, in this order; required each once")
        if None not in layers:
            continue
        if None in layers[: family.settled]:
            problems.append(
                f"axis {axis}: a new layer at {list(layers).index(None)}; the first {family.settled} "
                f"are built otherwise"
            )
        problems += _closing(family, axis) + check_handing(family, axis, layers, gains)
    return problems


def _closing(family: Family, axis: str) -> list[str]:
    """Whether new layers of an axis can be closed at all."""
    inside = [(at, pattern) for at, pattern in family.patterns if axis in at.axes]
    for role, norm in family.norms.items():
        if norm.output == "added" and norm.gain is None:
            return [f"axis {axis}: norm {role} on what a branch adds has no gain to close a new layer at; not covered"]
    if not any(family.closes_layer(at, pattern) for at, pattern in inside):
        return [f"axis {axis}: nothing closes a new layer; not covered"]
    return []


class Names:
    """What the target's tensors must be, given the source's under their patterns."""

    def __init__(
        self,
        facts: Facts,
        maps: LayerMap,
        gains: Mapping[str, Factor],
        old: Mapping[str, Placed],
        prefix: str,
        origin: Origin | None = None,
    ) -> None:
        self._facts, self._maps, self._gains, self._old = facts, maps, gains, old
        self._prefix, self._origin = prefix, origin
        self._likes = {axis: likes(layers) for axis, layers in maps.items()}

    def indices(self, at: NamePattern) -> Iterator[tuple[int, ...]]:
        """Every index that tensors of one name may have in the source."""
        sizes = []
        for axis in at.axes:
            kept = [layer for layer in self._maps.get(axis, ()) if layer is not None]
            sizes.append(range(len(kept) if axis in self._maps else self._facts.axes[axis].old))
        return (index for index in itertools.product(*sizes) if at.has(index))

    def required(self) -> dict[str, Placed]:
        """Every tensor that the target must have, and no other.

        Raises:
            ValueError: no rule covers an axis in a name.
        """
        out: dict[str, Placed] = {}
        for old in self._old.values():
            for placed in self._targets(old):
                out[placed.name] = placed
        for placed in self._made():
            out[placed.name] = placed
        for axis, layers in self._maps.items():
            if None in layers:
                self._hand(out, axis, layers)
        return out

    def _hand(self, out: dict[str, Placed], axis: str, layers: Sequence[int | None]) -> None:
        """Where gains and shifts on the stream stand, of layers that end in a norm there."""
        stack = Stack(self._facts.family, axis)
        if stack.empty:
            return
        stands = {one.stands: one.source for one in handed(layers)}
        for stand in stack.last:
            for place in range(-1, len(layers)):
                here = stack.name(stand, place, axis)
                name = None if here is None else self.disk(*here)
                if name in out:
                    source = stack.name(stand, stands[place], axis) if place in stands else None
                    self._put(out, name, stand, axis, None if source is None else self.disk(*source))
        new = [place for place, old in enumerate(layers) if old is None]
        for at, stand in stack.inside:
            for name in (self.disk(at, {axis: place}) for place in new):
                if name in out:
                    self._put(out, name, stand, axis, None)

    def _put(self, out: dict[str, Placed], name: str, stand: str, axis: str, source: str | None) -> None:
        if source is not None and source not in self._old:
            raise ValueError(f"{name}: required of {source}, which the source lacks")
        value = None if source is not None else float(self._gains[axis]) if stand == "gain" else 0.0
        like = source or out[name].like
        out[name] = replace(out[name], source=source, like=like, closed=value == 0.0, value=value)

    def _made(self) -> Iterator[Placed]:
        """The tensors of the target's family that no tensor of the source's is: shut where they write the stream."""
        family = self._facts.family
        for at, pattern in family.patterns if self._origin is not None else ():
            if self._origin is None or at.text not in self._origin.becoming.new:
                continue
            twin = NamePattern(self._origin.like(at.text))
            sizes = [range(len(self._maps[axis])) for axis in at.axes]
            for values in itertools.product(*sizes):
                index = dict(zip(at.axes, values, strict=True))
                like = self.disk(twin, {axis: self._likes[axis][i] for axis, i in index.items()})
                shut = any(atom.stand == "write" and atom.axis in family.streams for atom in pattern.atoms())
                yield Placed(self.disk(at, index), at, pattern, index, None, like, shut)

    def _targets(self, old: Placed) -> Iterator[Placed]:
        """All target tensors that come from a source tensor, or are like it."""
        family = self._facts.family
        kinds = [self._kinds(old, axis) for axis in old.at.axes]
        for combined in itertools.product(*kinds):
            index = {axis: kind[0] for axis, kind in zip(old.at.axes, combined, strict=True)}
            layers = {axis for axis, kind in zip(old.at.axes, combined, strict=True) if kind[1] is None}
            states = [kind[1].state[kind[0]] for kind in combined if kind[1] is not None]
            new = bool(layers) or any(state != REACHED for state in states)
            shut = family.closes_layer(old.at, old.pattern) or family.passes(old.pattern)
            closed = shut if layers else any(state == SHUT for state in states)
            copies: tuple[str, ...] = ()
            for axis, (_, places) in zip(old.at.axes, combined, strict=True):
                if places is not None and places.sums and not new:
                    if copies:
                        raise ValueError(f"axis {axis}: copies along two axes in one name; not covered")
                    same = (places.equation == old.index[axis]).nonzero().flatten().tolist()
                    copies = tuple(self.disk(old.at, {**index, axis: j}) for j in same)
            name = self.disk(old.at, index)
            yield Placed(name, old.at, old.pattern, index, None if new else old.name, old.name, new and closed, copies)

    def _kinds(self, old: Placed, axis: str) -> list[tuple[int, Places | None]]:
        """The target values of one index that a source tensor goes to; with its places, None for a new layer."""
        value = old.index[axis]
        if axis in self._maps:
            here = zip(self._maps[axis], self._likes[axis], strict=True)
            pairs = [(i, at) for i, (at, like) in enumerate(here) if like == value]
            size = len(self._maps[axis])
            whole = Places.whole(size)
            return [(i, None if at is None else whole) for i, at in pairs]
        places = atom_places(self._facts, old.atom(axis), Where(old.at))
        uneven = any(factor != places.factors[0] for factor in places.factors)
        if uneven or not (places.sums or places.simple or self._facts.split > 1):
            raise ValueError(f"axis {axis}: its coefficients stand in the names of tensors; not covered")
        sources = [0 if source < 0 else source for source in places.source.tolist()]  # a new one is like the first
        return [(j, places) for j, source in enumerate(sources) if source == value]

    def disk(self, at: NamePattern, index: Mapping[str, int]) -> str:
        """The name on disk of a tensor."""
        return at.format(index).removeprefix(self._prefix)
