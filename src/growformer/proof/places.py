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
from growformer.algebra.pattern import Atom, Dim
from growformer.proof.facts import MEAN, NONE, Axis, Facts

REACHED, SHUT, OPEN = 0, 1, 2


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

    @property
    def new(self) -> int:
        return len(self.source)

    @property
    def equations(self) -> int:
        return int(self.equation.max()) + 1 if self.new else 0

    @property
    def sums(self) -> bool:
        return self.equations < int((self.equation >= 0).sum())

    def cut(self, rows: slice) -> Places:
        """The places of some of the new indices."""
        cut = (x[rows] for x in (self.source, self.state, self.factor, self.equation, self.weight, self.pull))
        source, state, factor, equation, weight, pull = cut
        return Places(self.old, source, state, self.factors, factor, equation, weight, pull)

    @property
    def simple(self) -> bool:
        return all(factor == ONE for factor in self.factors)

    def by_equation(self) -> tuple[Tensor, Tensor]:
        """For each equation, the old index and the factor's number."""
        source, factor = torch.zeros((2, self.equations), dtype=torch.int64)
        terms = (self.equation >= 0) & (self.source >= 0)
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
    weight = pull if sums else torch.ones(axis.new, dtype=torch.float64)
    factors = (ONE,) if sums else tuple(factors)
    factor = torch.zeros_like(axis.factor) if len(factors) == 1 else axis.factor
    return Places(axis.old, source, state, factors, factor, equation, weight, pull)


def _number(size: int) -> Places:
    axis = Axis.identity("", size)
    return _places(axis, (ONE,), torch.ones(size, dtype=torch.float64), False, REACHED)


def atom_places(facts: Facts, atom: Atom, gain: Factor | None = None) -> Places:
    """How one axis stands in a tensor.

    Args:
        facts: the receipt's axes and what follows.
        atom: the axis, the stand and the role.
        gain: the factor to try where the tensor is a gain of q or k, whose product alone is fixed.
    """
    if isinstance(atom.axis, int):
        return _number(atom.axis)
    axis, family = facts.axes[atom.axis], facts.family
    normed, attention = facts.normed(axis.name), family.attention
    heads = axis.name in (attention.heads, attention.kv_heads)
    c, backs = axis.scale, floats(axis.backs)
    coefficient = floats(axis.factors)[axis.factor]
    if atom.stand == "gain":
        factor = gain if gain is not None else facts.gain(atom.role, axis)
        places = _places(axis, (factor,), backs * coefficient / float(factor), False, OPEN)
        if axis.name == facts.key:
            # Copies of keys are heard by nobody: the gain of k shuts them after the norm has counted them.
            unheard = axis.reached & torch.tensor([back is None for back in axis.backs])
            state = torch.where(unheard, SHUT if atom.role == "k" else OPEN, places.state)
            source = torch.where(unheard, NONE, places.source)
            equation = torch.where(source == NONE, NONE, (source != NONE).cumsum(0) - 1)
            return replace(places, state=state, source=source, equation=equation)
        return places
    if atom.stand == "shift":
        factor = facts.shift(atom.role, axis)
        return _places(axis, [f * factor for f in axis.factors], backs / float(factor), True, SHUT)
    reads_key = axis.name == facts.key and atom.role == "k" and not normed
    if atom.stand == "write" and not reads_key:
        # Scores of a new head see nothing but its own values, so q and k of it are free whichever side is closed.
        unseen = axis.name == attention.kv_heads or (heads and atom.role in ("q", "k"))
        shut = normed or (axis.closed == "writers" and not unseen)
        return _places(axis, [f * c for f in axis.factors], backs / float(c), shut, REACHED)
    take = ONE / c if not normed else ONE  # a norm's gain has taken c back before anyone reads
    if reads_key:
        take = take * facts.key_growth
    shut = axis.closed == "readers" and not normed
    return _places(axis, [take / f for f in axis.factors], coefficient / float(take), shut, OPEN, sums=axis.copied)


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
