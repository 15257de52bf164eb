"""Growth: the lift, the closed side and the scale of every axis, before any tensor is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import islice
from typing import Literal

from growformer.algebra import HALVES, ONE, Factor, Lift, Run, Side, Split
from growformer.algebra.lift import merged

Scope = tuple[tuple[str, int], ...]
"""Where an axis has a size of its own: pairs of index axis and target index, such as (("layer", 3),)."""


@dataclass(frozen=True)
class AxisGrowth:
    """How one axis grows.

    Attributes:
        axis: its name.
        lift: E and its left inverse, before `scale`.
        closed: the side whose new entries are zero.
        scale: what every writer is multiplied by besides (the stream rescale).
        scope: the layer (and head) it holds for; empty: everywhere.
        like: for an index axis, for each new index the old one whose tensors set the fills.
        dead: why the new channels can never be reached by a gradient; empty where they can.
        heard: its copies are all read, each by a share of what read the old channel.
        barred: a softmax or a top-k reads the axis, and the bias of new channels is so low that it never chooses them:
            whatever else they hold.
        kept: for an index axis of layers that end in a norm on the stream, the gain of the norms that give their own
            gain and shift away to a new layer (see `planning.migrate`); None elsewhere.
        whole: its copies are all read, each by all that read the old channel, for what weighs them adds up to one.
        shares: of copies that are heard: how the readers share.
        donors: for each new channel, the old one whose entries the open side starts from; empty: it is drawn. Of an
            index axis of layers: for each target layer, the one whose tensors a new layer starts from.
        ahead: copies are written by the next layer's tensors.
        changes: why the grown model computes another function, in one sentence; empty where it does not.
        split: its copies are all read, each by a slice of what read the old channel, times as many as there are.
        sliced: (index axis, m): the m copies of each channel of that axis have a slice of these channels each, in
            order; the lift is that of all slices together. None: they have them all.
        fades: its closed side fades in while the grown model trains.
        opened: that side as it is in the end, open as the other is.
        learned: what comes from a loss, once there is a model: "readers", the open side of new channels; "lift", all of
            the lift, which starts as this one.
        summed: the norms that read it divide by a sum of squares, not by a mean.
    """

    axis: str
    lift: Lift
    closed: Side = "readers"
    scale: Factor = ONE
    scope: Scope = ()
    like: tuple[int, ...] = ()
    dead: str = ""
    heard: bool = False
    barred: bool = False
    kept: Factor | None = None
    whole: bool = False
    shares: Split = HALVES
    donors: tuple[int, ...] = ()
    ahead: bool = False
    changes: str = ""
    split: bool = False
    sliced: tuple[str, int] | None = None
    fades: bool = False
    opened: bool = False
    learned: Literal["", "readers", "lift"] = ""
    summed: bool = False

    @property
    def old(self) -> int:
        return self.lift.old

    @property
    def new(self) -> int:
        return self.lift.new // (self.sliced[1] if self.sliced is not None else 1)

    @property
    def is_identity(self) -> bool:
        return self.lift.is_identity and self.scale == ONE and self.sliced is None

    @cached_property
    def sources(self) -> list[int | None]:
        """For each new index, the old one it is (index axes)."""
        out: list[int | None] = []
        for run in self.lift.runs:
            out += [None if run.old is None else run.old + i for i in range(run.count)]
        return out

    @cached_property
    def energy(self) -> Fraction:
        """Mean square over the new channels divided by that over the old ones (about the mean, where one is carried).

        The same of sums of squares, where `summed`.
        Every old channel must arrive with the same total square, or no gain and eps could make up for it.
        """
        squares: dict[int, Fraction] = {}
        for run in self.lift.runs:
            if run.old is not None and not run.mean:
                for i in range(run.old, run.old + run.count):
                    squares[i] = squares.get(i, Fraction(0)) + run.factor.square
        if len(set(squares.values())) > 1:
            raise ValueError(f"axis {self.axis}: its channels are copied unevenly")
        total = next(iter(squares.values()), Fraction(1))
        fewer = Fraction(1) if self.summed or not self.old else Fraction(self.old, self.new)
        return self.scale.square * total * fewer if self.old else Fraction(1)

    @cached_property
    def normed(self) -> Lift:
        """The lift behind a norm over this axis, whose gain takes up scale and energy: each channel at its first place.

        A carried mean is 0 there, and copies that nobody reads are closed by their gain or by their readers.
        """
        if self.heard:
            return self.lift
        return Lift(
            self.old,
            tuple(
                Run(run.count, None, back=None)
                if run.old is None or run.mean or run.back is None
                else Run(run.count, run.old)
                for run in self.lift.runs
            ),
        )

    def facing(self, lift: Lift, side: Literal["writers", "readers"]) -> Lift:
        """`lift` for a tensor on one side of the axis: its new channels closed, or open with what they start from."""
        if self.closed == "pairs":
            return paired(lift, side)
        start = self.opened or self.closed != side
        return _started(lift, self.donors) if start and self.donors else lift.freed(start)


@lru_cache(maxsize=1024)
def _started(lift: Lift, donors: tuple[int, ...]) -> Lift:
    """The lift with each new channel a copy of an old one, which nobody reads."""
    factor = next((run.factor for run in lift.runs if run.old is not None and not run.mean), ONE)
    runs: list[Run] = []
    rest = iter(donors)
    for run in lift.runs:
        runs += [Run(1, donor, factor, None) for donor in islice(rest, run.count)] if run.new else [run]
    return Lift(lift.old, tuple(merged(runs)))


@lru_cache(maxsize=1024)
def paired(lift: Lift, side: Literal["writers", "readers"]) -> Lift:
    """New channels in pairs: the second is written as the first is, and read with the opposite sign.

    One that has no partner is closed at its readers.
    """
    mirrored = [(start - run.mirror, run.count) for start, run in lift.spans() if run.mirror]
    firsts = {at for start, count in mirrored for at in range(start, start + count)}
    sign = 1 if side == "writers" else -1
    runs: list[Run] = []
    for start, run in lift.spans():
        if not run.new:
            runs.append(run)
            continue
        for at in range(start, start + run.count):
            free = side == "writers" or bool(run.mirror) or at in firsts
            runs.append(replace(run, count=1, free=free, mirror=sign * run.mirror))
    return Lift(lift.old, tuple(merged(runs)))


class Growth:
    """The growth of every axis of a model.

    Args:
        axes: one entry for each axis and scope.
        tied: whether the head reads through the embedding's own tensor.
        headed: whether there is a head that could.
        inside: of layers closed by pairs, the axes whose channels stand in pairs throughout a new layer.
    """

    def __init__(
        self,
        axes: Iterable[AxisGrowth],
        *,
        tied: bool = False,
        headed: bool = True,
        inside: Mapping[str, Lift] | None = None,
    ) -> None:
        self.headed = headed
        self.inside = inside or {}
        self.axes: dict[tuple[str, Scope], AxisGrowth] = {(a.axis, a.scope): a for a in axes}
        self.tied = tied

    def at(self, axis: str, index: Mapping[str, int] | None = None) -> AxisGrowth:
        """The growth of `axis` where the index axes have the target values `index`: the narrowest scope that fits."""
        scope = tuple((index or {}).items())
        while True:
            found = self.axes.get((axis, scope))
            if found is not None:
                return self._slice(found, index or {})
            if not scope:
                raise KeyError(f"axis {axis} has no size here")
            scope = scope[:-1]

    def _slice(self, axis: AxisGrowth, index: Mapping[str, int]) -> AxisGrowth:
        """What a copy has of an axis of which each has a slice."""
        if axis.sliced is None or axis.sliced[0] not in index:
            return axis
        copy = index[axis.sliced[0]] // self.at(axis.sliced[0]).old
        return replace(axis, lift=Lift(axis.old, (Run(axis.new, copy * axis.new),)), sliced=None)

    def __iter__(self) -> Iterator[AxisGrowth]:
        return iter(self.axes.values())

    def opened(self) -> Growth | None:
        """The growth as it is once all that fades in has done so; None where nothing does."""
        if not any(axis.fades for axis in self):
            return None
        return Growth((replace(a, opened=a.fades) for a in self), tied=self.tied, headed=self.headed)
