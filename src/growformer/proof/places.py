"""What each new index of a dim of a target tensor must hold, put together from the axes that the dim is made of.

Everything that E does not reach is zero or free by one rule: a new index of a dim is *shut* in this tensor where the
axis is closed on the side on which the tensor stands, and *open* where it is closed on the other. An entry with an open
new index is free (its value cannot be seen, or what it multiplies is zero); any other entry with a new index is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import OUTSIDE
from growformer.algebra.pattern import GATE, WILD, Atom, Dim, NamePattern
from growformer.proof.axes import MEAN, NONE, Axis
from growformer.proof.facts import Facts

REACHED, SHUT, OPEN = 0, 1, 2


@dataclass(frozen=True)
class Where:
    """The tensor that an axis stands in.

    Attributes:
        at: its name.
        last: it stands in the last of its layers, or in none.
        split: what the old gains of queries, or of keys, are multiplied by, for the two factors have one product only.
        part: which slice of an axis that experts share out among their copies is this one's.
    """

    at: NamePattern
    last: bool = True
    split: Factor = ONE
    part: int = 0


@dataclass(frozen=True)
class Places:
    """One dim of a target tensor: for each new index, what it must hold.

    Attributes:
        old: the size of the source's dim.
        source: [new] the old index, NONE, or MEAN.
        state: [new] REACHED, SHUT or OPEN.
        factors, factor: the distinct factors of source entries, and [new] which of them applies.
        equation: [new] the number of the equation that the index is a term of; NONE where it is in none. A reader of
            copies has one equation for each old index (the copies' entries add up), all else one for each new one.
        weight: [new] the coefficient in that sum.
        pull: [new] the coefficient with which the pull-back reads the index.
    """

    old: int
    source: Tensor
    state: Tensor
    factors: tuple[Factor, ...]
    factor: Tensor
    equation: Tensor
    weight: Tensor
    pull: Tensor

    @classmethod
    def whole(cls, size: int) -> Places:
        """A dim that stays as it is."""
        axis = Axis.identity("", size)
        return _places(axis, (ONE,), _ones(axis), False, REACHED)

    @property
    def new(self) -> int:
        return len(self.source)

    @property
    def equations(self) -> int:
        return int(self.equation.max()) + 1 if self.new else 0

    @property
    def sums(self) -> bool:
        return self.equations < int((self.equation >= 0).sum())

    def cut(self, rows: slice | Tensor) -> Places:
        """The places of some of the new indices."""
        cut = (x[rows] for x in (self.source, self.state, self.factor, self.equation, self.weight, self.pull))
        source, state, factor, equation, weight, pull = cut
        return Places(self.old, source, state, self.factors, factor, equation, weight, pull)

    def sliced(self, number: int, size: int) -> Places:
        """The places of one of several slices of so many neighbours; no equation is of two of them."""
        mine = self.cut(slice(number * size, (number + 1) * size))
        return replace(mine, equation=torch.where(mine.equation == NONE, NONE, mine.equation - number * size))

    def times(self, factor: Factor) -> Places:
        """The same places, every source entry multiplied by one more factor."""
        return replace(self, factors=tuple(f * factor for f in self.factors), pull=self.pull / float(factor))

    def of(self, old: int) -> Places:
        """The places of what comes from one old index alone, as a dim of its own."""
        mine = self.cut((self.source == old).nonzero().flatten())
        zeros = torch.zeros_like(mine.source)
        return replace(mine, old=1, source=zeros, equation=zeros)

    @property
    def simple(self) -> bool:
        return all(factor == ONE for factor in self.factors)

    def by_equation(self) -> tuple[Tensor, Tensor]:
        """For each equation, the old index and the factor's number."""
        source, factor = torch.zeros((2, self.equations), dtype=torch.int64)
        terms = (self.equation >= 0) & (self.source != NONE)
        source[self.equation[terms]] = self.source[terms]
        factor[self.equation[terms]] = self.factor[terms]
        return source, factor


def floats(factors: Sequence[Factor | None]) -> Tensor:
    # An axis repeats a few factors thousands of times, and each root is taken with big integers.
    value = {id(f): 0.0 if f is None else float(f) for f in {id(f): f for f in factors}.values()}
    return torch.tensor([value[id(f)] for f in factors], dtype=torch.float64)


def _places(
    axis: Axis, factors: Sequence[Factor], pull: Tensor, shut: bool, means: int, *, sums: bool = False
) -> Places:
    """The places of a dim that is one axis; `means`: the state of channels that are a mean."""
    state = torch.full((axis.new,), SHUT if shut else OPEN, dtype=torch.uint8)
    state[axis.reached] = REACHED
    state[axis.source == MEAN] = means
    source = axis.source.clone()
    if means != REACHED:
        source[source == MEAN] = NONE
    taken = source != NONE
    pull = torch.where(axis.reached, pull, 0.0)
    equation = torch.where(taken, source if sums else taken.cumsum(0) - 1, NONE)
    weight = pull if sums else _ones(axis)
    factors = (ONE,) if sums else tuple(factors)
    factor = torch.zeros_like(axis.factor) if len(factors) == 1 else axis.factor
    return Places(axis.old, source, state, factors, factor, equation, weight, pull)


def _ones(axis: Axis) -> Tensor:
    return torch.ones(axis.new, dtype=torch.float64)


def atom_places(facts: Facts, atom: Atom, where: Where, wild: int = 0) -> Places:
    """How one axis stands in a tensor.

    Args:
        facts: the receipt's axes and what follows.
        atom: the axis, the stand and the role.
        where: the tensor.
        wild: the size of a dim that stays as the checkpoint has it.

    Raises:
        ValueError: no rule covers this.
    """
    if isinstance(atom.axis, int) or atom.axis == WILD:
        return Places.whole(wild if atom.axis == WILD else int(atom.axis))
    if atom.axis in facts.layers:
        # A slab of each layer: a new layer's is free, for the layer is closed where it adds to the stream.
        layers = facts.layers[atom.axis]
        return _places(layers, (ONE,), _ones(layers), False, REACHED)
    axis = facts.axes[atom.axis]
    if axis.name in OUTSIDE or axis.barred:
        return _places(axis, (ONE,), _ones(axis), False, OPEN)
    found = _BY_STAND[atom.stand](facts, axis, atom, where)
    return found if axis.slices == 1 else found.sliced(where.part, axis.size)


def _write(facts: Facts, axis: Axis, atom: Atom, where: Where) -> Places:
    attending, norms = facts.attending, facts.norms
    side = facts.family.side(atom.role)
    if axis.name in attending.keys and side == "k" and not attending.normed(axis.name):
        # Of the two sides of the dot product, keys are the one that reads (arXiv 2308.06103, eq. 17 to 19).
        return _reads(axis, attending.growth(axis.name) / axis.scale, axis.closed == "readers", OPEN)
    factor = axis.scale * norms.spread(atom.role, axis.name)
    if axis.name in facts.family.streams:
        factor = factor * norms.power(atom.role)
    # A gate multiplies what another writer has shut.
    unseen = atom.role == GATE or attending.unseen(atom)
    shut = norms.reads(atom.role, axis.name) or (axis.closed == "writers" and not unseen)
    return _places(axis, [f * factor for f in axis.factors], floats(axis.backs) / float(factor), shut, REACHED)


def _read(facts: Facts, axis: Axis, atom: Atom, where: Where) -> Places:
    if axis.means and facts.norms.raw(axis.name, where.at, atom.role):
        raise ValueError(f"axis {axis.name}: a mean is carried past a reader that is no norm")
    if facts.whole(axis.name):
        return _places(axis, (ONE,), floats(axis.backs), False, REACHED)
    if facts.split > 1 and facts.routes(axis.name):
        # Each copy is weighed by a part of what the expert was, and none of them is added up with another's weights.
        return _places(axis, (Factor.of(facts.split),), _ones(axis) / facts.split, False, REACHED)
    take = facts.norms.taken(axis.name, where.at, atom.role) * facts.share(axis.name)
    shut = axis.closed == "readers" or facts.attending.sharing(axis.name)
    places = _reads(axis, take, shut and facts.family.norm_over(axis.name) is None, OPEN)
    if axis.partner is None:
        return places
    return replace(places, state=torch.where(axis.alone, SHUT, places.state).to(torch.uint8))


def _reads(axis: Axis, take: Factor, shut: bool, means: int) -> Places:
    coefficient = floats(axis.factors)[axis.factor]
    factors = [take / f for f in axis.factors]
    return _places(axis, factors, coefficient / float(take), shut, means, sums=axis.copied)


def _gain(facts: Facts, axis: Axis, atom: Atom, where: Where) -> Places:
    norm, role = facts.family.norms.get(atom.role or ""), str(atom.role)
    if norm is None:
        if axis.means and not facts.weighed(atom):
            raise ValueError(f"axis {axis.name}: {role} scales its channels one by one, which no mean passes")
        return _scaled(axis, ONE, SHUT)  # to one; what stands before it carries the mean behind it
    if axis.name != norm.axes[-1]:
        return _by_head(facts, axis, atom)
    if axis.name not in facts.attending.keys:
        return _scaled(axis, facts.norms.gain(role, where.at, where.last))
    return _heard(_scaled(axis, where.split), axis, atom, facts.family.side(atom.role))


def _shift(facts: Facts, axis: Axis, atom: Atom, where: Where) -> Places:
    norm, role = facts.family.norms.get(atom.role or ""), str(atom.role)
    if norm is None:
        raise ValueError(f"axis {axis.name}: a shift in the role {role}, which is no norm; not covered")
    if axis.name != norm.axes[-1]:
        return _by_head(facts, axis, atom)
    if axis.name in facts.attending.keys:
        # Added behind the gain, it is to queries and keys what the gained vector is.
        carried = facts.attending.carried(role, axis.name)
        return _heard(_scaled(axis, where.split * carried), axis, atom, facts.family.side(role))
    factor = facts.norms.shift(role, where.at, where.last)
    means = SHUT if norm.output == "branch" else REACHED
    return _places(axis, [f * factor for f in axis.factors], floats(axis.backs) / float(factor), True, means)


def _by_head(facts: Facts, axis: Axis, atom: Atom) -> Places:
    """Gains and shifts that each head has for itself."""
    if not facts.attending.heads(axis.name):
        raise ValueError(f"axis {axis.name}: a gain or shift of norm {atom.role}, which does not read it; not covered")
    return _scaled(axis, ONE)


def _scaled(axis: Axis, factor: Factor, means: int = OPEN) -> Places:
    """What multiplies channel by channel: one factor for all, and anything where nothing arrives."""
    pull = floats(axis.backs) * floats(axis.factors)[axis.factor] / float(factor)
    return _places(axis, (factor,), pull, False, means)


def _heard(places: Places, axis: Axis, atom: Atom, side: str | None) -> Places:
    """Copies of keys are heard by nobody: gain and shift of k shut them after the norm has counted them.

    Where nothing arrives at all, the shift of k is shut too, for the shift of q is free there.
    """
    unheard = torch.tensor([back is None for back in axis.backs], dtype=torch.bool)
    mute = unheard if atom.stand == "shift" else unheard & axis.reached
    state = torch.where(mute, SHUT if side == "k" else OPEN, places.state).to(torch.uint8)
    source = torch.where(unheard, NONE, places.source)
    equation = torch.where(source == NONE, NONE, (source != NONE).cumsum(0) - 1)
    return replace(places, state=state, source=source, equation=equation)


_BY_STAND = {"write": _write, "read": _read, "gain": _gain, "shift": _shift}


def dim_places(dim: Dim, of: Callable[[Atom], Places]) -> Places:
    """The places of a dim, put together from those of its axes.

    Raises:
        ValueError: a mean is carried by an axis that stands in a product.
    """
    if dim.atom is not None:
        return of(dim.atom)
    parts = [dim_places(part, of) for part in dim.parts]
    result = parts[-1]
    for part in reversed(parts[:-1]):
        result = _beside(part, result) if dim.kind == "concat" else _times(part, result)
    return result


def _beside(a: Places, b: Places) -> Places:
    return Places(
        a.old + b.old,
        torch.cat([a.source, torch.where(b.source >= 0, b.source + a.old, b.source)]),
        torch.cat([a.state, b.state]),
        a.factors + b.factors,
        torch.cat([a.factor, b.factor + len(a.factors)]),
        torch.cat([a.equation, torch.where(b.equation >= 0, b.equation + a.equations, NONE)]),
        torch.cat([a.weight, b.weight]),
        torch.cat([a.pull, b.pull]),
    )


def _times(a: Places, b: Places) -> Places:
    """The product, b varying fastest. Of a new outer channel the outer axis alone says whether it is shut or open."""
    if bool((a.source == MEAN).any() | (b.source == MEAN).any()):
        raise ValueError("a mean is carried by an axis inside a product")

    def both(x: Tensor, y: Tensor, size: int) -> Tensor:
        x, y = x[:, None], y[None, :]
        return torch.where((x >= 0) & (y >= 0), x * size + y, NONE).flatten()

    return Places(
        a.old * b.old,
        both(a.source, b.source, b.old),
        torch.where(a.state[:, None] != REACHED, a.state[:, None], b.state[None, :]).flatten(),
        tuple(x * y for x in a.factors for y in b.factors),
        (a.factor[:, None] * len(b.factors) + b.factor[None, :]).flatten(),
        both(a.equation, b.equation, b.equations),
        (a.weight[:, None] * b.weight[None, :]).flatten(),
        (a.pull[:, None] * b.pull[None, :]).flatten(),
    )
