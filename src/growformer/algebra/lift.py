"""Lifts: how the old channels of an axis, or the old indices of a tensor's dim, sit among the new ones.

A lift E (new x old) says a' = E a. It is kept with its left inverse R (R E = 1) as a list of runs, so that a lift of a
hidden size of 8192 is two runs, and the lift of a fused dim is put together from the lifts of its axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as _replace
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any

from growformer.algebra.factor import ONE, Factor

__all__ = ["ONE", "Factor", "Lift", "Run", "concat", "merged", "product", "sorts", "stretches"]


@dataclass(frozen=True, slots=True)
class Run:
    """`count` neighbouring new channels that are made in one way.

    Attributes:
        count: how many new channels.
        old: the first old channel they come from, in order; None where no old channel reaches them.
        factor: the coefficient in E with which the old channel arrives.
        back: the coefficient in R with which it is read back; None where R does not read these channels
            (a copy that nobody listens to yet). Moments follow `back`, for the gradient is the dual.
        mean: where positive, every channel of the run is the mean of the old channels [old, old + mean).
        free: for channels without an old one: True where any value is exact, because the other side is closed.
        share: (k, m) where these are the k-th of m copies that a reader shares its weights among: every entry goes to
            one of them, or half of it to each of two, drawn at random; the m shares of an entry add up to it.
        weigh: for a mean, the source tensor whose entries weigh the old channels; empty: all alike.
        noise: with `share`, the copies hold the same part of every entry, the even ones more and the odd ones less by a
            normal draw of this std, in stds of the tensor; 0: whole halves as `share` has it.
        own: with `share`, a copy is read by the copies of its own number alone; by all alike where no other dim of the
            tensor is copied so.
        copy: the number of this copy, for readers that go by it; -1: none does.
        fresh: a copy that an optimizer is to know nothing of, although it holds a part of the function.
        ahead: where copies stand, those of the next layer's tensor.
        mirror: for new channels, how far before them the channels stand whose entries theirs are: the same where it is
            positive, the opposite where it is negative; 0: their own.
    """

    count: int
    old: int | None = None
    factor: Factor = ONE
    back: Factor | None = ONE
    mean: int = 0
    free: bool = False
    share: tuple[int, int] | None = None
    weigh: str = ""
    noise: float = 0.0
    own: bool = False
    copy: int = -1
    fresh: bool = False
    ahead: bool = False
    mirror: int = 0

    @property
    def new(self) -> bool:
        """No old channel reaches this run."""
        return self.old is None

    def times(self, factor: Factor) -> Run:
        """The same run with E scaled by `factor` and R by its inverse."""
        if self.old is None:
            return self
        return _replace(self, factor=self.factor * factor, back=None if self.back is None else self.back / factor)


@dataclass(frozen=True, slots=True)
class Lift:
    """E and R of one axis or dim: `old` channels become `new`, run by run."""

    old: int
    runs: tuple[Run, ...]

    def __hash__(self) -> int:
        """Of a few runs: copies drawn at random make thousands, and every tensor asks."""
        return hash((self.old, len(self.runs), self.runs[:1], self.runs[-1:]))

    @classmethod
    def identity(cls, size: int) -> Lift:
        return cls(size, (Run(size, 0),)) if size else cls(0, ())

    @classmethod
    def place(cls, old: int, positions: Sequence[int], new: int, *, free: bool = False) -> Lift:
        """Old channel i goes to `positions[i]` of `new`; the others are new channels, free or closed."""
        source = {p: i for i, p in enumerate(positions)}
        return cls.rows(old, [source.get(j) for j in range(new)], free=free)

    @classmethod
    def rows(cls, old: int, sources: Iterable[int | None], *, free: bool = False) -> Lift:
        """New channel j comes from old channel `sources[j]`, or from none. Repeats are copies; the first is read."""
        seen: set[int] = set()
        runs: list[Run] = []
        for first, count in stretches(sources):
            if first is None:
                runs.append(Run(count, None, back=None, free=free))
                continue
            channels = range(first, first + count)
            for again, part in groupby(channels, seen.__contains__):
                start, *rest = part
                runs.append(Run(1 + len(rest), start, back=None if again else ONE))
            seen.update(channels)
        return cls(old, tuple(merged(runs)))

    @classmethod
    def copies(cls, old: int, times: int) -> Lift:
        """All old channels, `times` times over; R reads the first of them."""
        return cls(old, tuple(Run(old, 0, back=None if k else ONE) for k in range(times)))

    @property
    def new(self) -> int:
        return sum(run.count for run in self.runs)

    @property
    def is_identity(self) -> bool:
        return self.runs == ((Run(self.old, 0),) if self.old else ())

    def times(self, factor: Factor) -> Lift:
        """The lift f E, with left inverse R / f."""
        return self if factor == ONE else Lift(self.old, tuple(run.times(factor) for run in self.runs))

    def freed(self, free: bool) -> Lift:
        """The same lift with its new channels free, or closed."""
        if all(run.free is free for run in self.runs if run.new):
            return self
        return Lift(self.old, tuple(_replace(run, free=free) if run.new else run for run in self.runs))

    def spans(self) -> Iterator[tuple[int, Run]]:
        """Each run with the first new channel it fills."""
        start = 0
        for run in self.runs:
            yield start, run
            start += run.count

    def to_json(self) -> list[list[object]]:
        """Runs as [count, old | None, E², R² | None, mean, free, share, weigh, more], trailing defaults left out.

        `more` is an object with what few runs have, by name.
        """
        out: list[list[object]] = []
        for run in self.runs:
            back = None if run.back is None else str(run.back.square)
            share = None if run.share is None else list(run.share)
            more = {name: value for name, default in _MORE.items() if (value := getattr(run, name)) != default}
            row: list[object] = [run.count, run.old, str(run.factor.square), back, run.mean, run.free, share, run.weigh]
            row.append(more)
            defaults: list[object] = [None, None, "1", "1" if run.old is not None else None, 0, False, None, "", {}]
            while len(row) > 2 and row[-1] == defaults[len(row) - 1]:
                row.pop()
            out.append(row)
        return out

    @classmethod
    def from_json(cls, old: int, rows: Sequence[Sequence[Any]]) -> Lift:
        """The inverse of `to_json`."""
        runs: list[Run] = []
        for row in rows:
            start = None if row[1] is None else int(row[1])
            factor = Factor.parse(str(row[2])) if len(row) > 2 else ONE
            square = row[3] if len(row) > 3 else ("1" if start is not None else None)
            back = None if square is None else Factor.parse(str(square))
            mean = int(row[4]) if len(row) > 4 else 0
            free = bool(row[5]) if len(row) > 5 else False
            share = (int(row[6][0]), int(row[6][1])) if len(row) > 6 and row[6] is not None else None
            weigh = str(row[7]) if len(row) > 7 else ""
            more = {name: row[8][name] for name in _MORE if name in row[8]} if len(row) > 8 else {}
            runs.append(Run(int(row[0]), start, factor, back, mean, free, share, weigh, **more))
        return cls(old, tuple(runs))


_MORE: dict[str, Any] = {"noise": 0.0, "own": False, "copy": -1, "fresh": False, "ahead": False, "mirror": 0}


def stretches(sources: Iterable[int | None]) -> Iterator[tuple[int | None, int]]:
    """Old channels as (first, count) of those that follow each other; None with a count, where there is none."""
    first: int | None = None
    count = 0
    for source in sources:
        if count and source == (None if first is None else first + count):
            count += 1
            continue
        if count:
            yield first, count
        first, count = source, 1
    if count:
        yield first, count


_MADE = attrgetter("factor", "back", "mean", "free", "share", "weigh", *_MORE)
"""All of a run but how many channels it has, and which."""


@lru_cache(maxsize=256)
def sorts(lift: Lift) -> tuple[Run, ...]:
    """A run of each sort there is, one channel long: what a lift of thousands of runs does in a few ways."""
    seen: dict[object, Run] = {}
    for run in lift.runs:
        seen.setdefault((_MADE(run), run.new), run)
    return tuple(_replace(run, count=1, old=None if run.new else 0) for run in seen.values())


def merged(runs: Iterable[Run]) -> list[Run]:
    """Neighbouring runs that continue each other, made one."""
    out: list[Run] = []
    more = 0  # channels that continue the last one
    for run in runs:
        if not run.count:
            continue
        last = out[-1] if out else None
        if last is not None and run.old == _next(last, more) and _MADE(last) == _MADE(run):
            more += run.count
            continue
        if last is not None and more:
            out[-1] = _replace(last, count=last.count + more)
        out.append(run)
        more = 0
    if more:
        out[-1] = _replace(out[-1], count=out[-1].count + more)
    return out


def _next(run: Run, more: int) -> int | None:
    """The old channel of the one behind a run and `more` channels that continue it."""
    return run.old if run.old is None or run.mean else run.old + run.count + more


def product(outer: Lift, inner: Lift) -> Lift:
    """The lift of the dim (outer inner), inner varying fastest.

    A new outer channel is new throughout, and closed or free as a whole: inside a new head nothing else is zeroed
    (a second closure in series would cost a training step).
    """
    runs: list[Run] = []
    for run in outer.runs:
        if run.old is None:
            runs.append(_replace(run, count=run.count * inner.new, mirror=run.mirror * inner.new))
        elif run.mean:
            if inner.new != 1 or not inner.is_identity:
                raise NotImplementedError("the mean of an outer axis is not a run of the product")
            runs.append(run)
        elif inner.is_identity:
            runs.append(_replace(run, count=run.count * inner.old, old=run.old * inner.old))
        else:
            for channel in range(run.old, run.old + run.count):
                for part in inner.runs:
                    if part.old is None:
                        runs.append(part)
                        continue
                    back = None if run.back is None or part.back is None else run.back * part.back
                    if run.share and part.share:
                        raise NotImplementedError("copies of two axes in one dim share what reads them")
                    runs.append(
                        _replace(
                            part,
                            old=channel * inner.old + part.old,
                            factor=run.factor * part.factor,
                            back=back,
                            share=run.share or part.share,
                            noise=run.noise or part.noise,
                            own=run.own or part.own,
                            copy=max(run.copy, part.copy),
                            fresh=run.fresh or part.fresh,
                            ahead=run.ahead or part.ahead,
                        )
                    )
    return Lift(outer.old * inner.old, tuple(merged(runs)))


def concat(parts: Sequence[Lift]) -> Lift:
    """The lift of the dim (a | b | ...)."""
    runs: list[Run] = []
    offset = 0
    for part in parts:
        runs += [run if run.old is None else _replace(run, old=run.old + offset) for run in part.runs]
        offset += part.old
    return Lift(offset, tuple(merged(runs)))
