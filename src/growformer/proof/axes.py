"""What a receipt claims of each axis: a pair (E, R), a scale and a closed side, read by the certificate's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import Family

MEAN = -2
"""In `Axis.source`: this channel is the mean of all old ones."""
NONE = -1
"""In `Axis.source`: no old channel reaches this one."""


@dataclass(frozen=True)
class Axis:
    """One axis as the receipt tells it.

    Attributes:
        old, new: how many channels.
        source: [new] the old channel that reaches each new one, or NONE, or MEAN.
        factors: the distinct coefficients of E.
        factor: [new] which of `factors` each new channel carries.
        backs: [new] the coefficient in R of each new channel, None where R does not read it.
        scale: the scale c of every writer besides.
        closed: the side whose new entries are zero.
        barred: no softmax or top-k over the axis chooses a new channel, whatever it holds, for its bias is too low.
        partner: where new channels stand in pairs, [new] the other of the pair, or NONE.
        slices: how many copies of an expert share the axis out among them, a slice of neighbours each; the lift is that
            of all slices, one after the other. 1: it is one axis.
    """

    name: str
    old: int
    new: int
    source: Tensor
    factors: tuple[Factor, ...]
    factor: Tensor
    backs: tuple[Factor | None, ...]
    scale: Factor
    closed: str
    barred: bool = False
    partner: Tensor | None = None

    @property
    def alone(self) -> Tensor:
        """[new] Whether a channel is new and, where new ones stand in pairs, has no partner."""
        single = self.source == NONE
        return single if self.partner is None else single & (self.partner == NONE)

    slices: int = 1

    @property
    def size(self) -> int:
        """How many channels the config gives it: those of one slice."""
        return self.new // self.slices

    @property
    def reached(self) -> Tensor:
        return self.source >= 0

    @property
    def copied(self) -> bool:
        """Some old channel reaches several new ones."""
        reached = self.source[self.reached].tolist()
        return len(reached) > len(set(reached))

    @property
    def empty(self) -> bool:
        """No old channel reaches some new one, as a mean neither."""
        return bool((self.source == NONE).any())

    @property
    def means(self) -> bool:
        return bool((self.source == MEAN).any())

    @property
    def times(self) -> int:
        """How many whole copies of all old channels, one after the other, the new ones are; 0 where they are not."""
        m, rest = divmod(self.new, self.old) if self.old else (1, self.new)
        tiled = not rest and torch.equal(self.source, torch.arange(self.old).repeat(m))
        return m if tiled and self.plain else 0

    @property
    def plain(self) -> bool:
        """Every coefficient is one and no channel is a mean, as anything between linear maps demands."""
        return self.scale == ONE and all(f == ONE for f in self.factors) and not self.means

    @property
    def is_identity(self) -> bool:
        if self.slices != 1:
            return False
        return self.old == self.new and self.plain and torch.equal(self.source, torch.arange(self.new))

    def read_at(self) -> list[list[int]]:
        """For each old channel, the new ones at which R reads it."""
        out: list[list[int]] = [[] for _ in range(self.old)]
        for j, (i, back) in enumerate(zip(self.source.tolist(), self.backs, strict=True)):
            if back is not None and i >= 0:
                out[i].append(j)
        return out

    def energy(self) -> Fraction | None:
        """The sum of squared coefficients of each old channel, where it is the same for all; None where it is not."""
        sums = [Fraction(0)] * self.old
        for i, k in zip(self.source.tolist(), self.factor.tolist(), strict=True):
            if i >= 0:
                sums[i] += self.factors[k].square
        return sums[0] if len(set(sums)) == 1 else None

    def overlap(self, other: Axis) -> Fraction | None:
        """The number E^T E' for this lift and another; None where it is no multiple of the identity."""
        if torch.equal(self.source, other.source) and (self.factors, self.new) == (other.factors, other.new):
            return self.energy() if torch.equal(self.factor, other.factor) else None
        return None

    @classmethod
    def identity(cls, name: str, size: int) -> Axis:
        zeros = torch.zeros(size, dtype=torch.int64)
        return cls(name, size, size, torch.arange(size), (ONE,), zeros, (ONE,) * size, ONE, "writers")

    @classmethod
    def of_layers(cls, name: str, layers: Sequence[int | None]) -> Axis:
        """The axis of layers by their map: for each target layer its source layer, or None where it is new."""
        source = torch.tensor([NONE if old is None else old for old in layers], dtype=torch.int64)
        backs = tuple(None if old is None else ONE for old in layers)
        zeros = torch.zeros_like(source)
        return cls(
            name, len(layers) - list(layers).count(None), len(layers), source, (ONE,), zeros, backs, ONE, "readers"
        )

    @classmethod
    def parse(cls, name: str, told: Mapping[str, Any]) -> Axis:
        """Read one axis of a receipt.

        Raises:
            ValueError: where it makes no sense, or R E is not the identity.
        """
        old, new, closed = int(told["old"]), int(told["new"]), str(told.get("closed", "writers"))
        scale = Fraction(told.get("scale", "1"))
        slices = told.get("slices", 1)
        if not isinstance(slices, int) or isinstance(slices, bool) or slices < 1:
            raise ValueError(f"{slices!r} slices make no sense")
        new *= slices
        if scale <= 0 or closed not in ("writers", "readers", "pairs"):
            raise ValueError(f"scale {scale} and closed side {closed!r} make no sense")
        source: list[int] = []
        squares: list[Fraction] = []
        backs: list[Factor | None] = []
        for run in told["lift"]:
            count, start = int(run[0]), run[1]
            square = Fraction(run[2]) if len(run) > 2 else Fraction(1)
            back = run[3] if len(run) > 3 else (None if start is None else "1")
            mean = int(run[4]) if len(run) > 4 else 0
            if start is None:
                source += [NONE] * count
                backs += [None] * count
            elif mean:
                if start != 0 or mean != old or back is not None:
                    raise ValueError(f"run {run}: a mean must be of all {old} old channels, and is not read back")
                source += [MEAN] * count
                backs += [None] * count
            else:
                if start < 0 or start + count > old:
                    raise ValueError(f"run {run}: reaches past the {old} old channels")
                source += range(start, start + count)
                backs += [None if back is None else Factor(Fraction(back))] * count
            if square <= 0 or (back is not None and Fraction(back) <= 0):
                raise ValueError(f"run {run}: coefficients must be positive")
            squares += [square] * count
        if len(source) != new:
            raise ValueError(f"its lift has {len(source)} channels; it says {new}")
        distinct = sorted(set(squares)) or [Fraction(1)]
        place = {square: k for k, square in enumerate(distinct)}
        axis = cls(
            name,
            old,
            new,
            torch.tensor(source, dtype=torch.int64),
            tuple(map(Factor, distinct)),
            torch.tensor([place[s] for s in squares], dtype=torch.int64),
            tuple(backs),
            Factor(scale),
            closed,
            told.get("barred") is True,
            _partners(told["lift"], source) if closed == "pairs" else None,
            slices,
        )
        axis._check_inverse()
        return axis

    def _check_inverse(self) -> None:
        # An axis repeats a few products thousands of times: one object for each, so that it is worked out once.
        products: dict[tuple[int, int], Fraction] = {}
        total: list[Fraction | None] = [None] * self.old
        for i, k, back in zip(self.source.tolist(), self.factor.tolist(), self.backs, strict=True):
            if back is None or i < 0:
                continue
            if (k, id(back)) not in products:
                product = self.factors[k] * back
                try:
                    products[k, id(back)] = Fraction(str(product))
                except ValueError:
                    raise ValueError(f"R E at old channel {i} holds {product}, which is not rational") from None
            value, so_far = products[k, id(back)], total[i]
            total[i] = value if so_far is None else so_far + value
        wrong = {id(value) for value in {id(value): value for value in total}.values() if value != 1}
        for i, found in enumerate(total):
            if id(found) in wrong:
                raise ValueError(f"R E is {found or 0} at old channel {i}; required 1")


def _partners(runs: Sequence[Sequence[Any]], source: Sequence[int]) -> Tensor:
    """[new] The partner of each channel, or NONE, by the distances that the receipt states.

    Raises:
        ValueError: a partner that is no new channel, or has another already.
    """
    partner = [NONE] * len(source)
    at = 0
    for run in runs:
        distance = int(run[8].get("mirror", 0)) if len(run) > 8 else 0
        for j in range(at, at + int(run[0])) if distance else ():
            i = j - distance
            if not 0 <= i < j or source[i] != NONE or source[j] != NONE or (partner[i], partner[j]) != (NONE, NONE):
                raise ValueError(f"channel {j} cannot be the partner of {i}: each must be new, and in one pair")
            partner[i], partner[j] = j, i
        at += int(run[0])
    return torch.tensor(partner, dtype=torch.int64)


def read_axes(
    family: Family,
    told: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    layers: Mapping[str, Sequence[int | None]],
) -> tuple[dict[str, Axis], list[str]]:
    """The receipt's axes, layers aside; an axis it leaves out stays as it is. Returns them with what is wrong."""
    axes: dict[str, Axis] = {}
    problems = [f"axis {name}: family {family.name} has none such" for name in told if name not in family.axes]
    for name in family.axes:
        try:
            axis = Axis.parse(name, told[name]) if name in told else Axis.identity(name, sizes.get(name, 0))
        except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
            problems.append(f"axis {name}: {error}")
            continue
        if name not in family.layers:
            axes[name] = axis
        elif axis.slices != 1:
            problems.append(f"axis {name}: in {axis.slices} slices, which layers never are")
        elif name in told and [None if i < 0 else i for i in axis.source.tolist()] != list(layers[name]):
            problems.append(f"axis {name}: its lift and the layer map {list(layers[name])} disagree")
    return axes, problems
