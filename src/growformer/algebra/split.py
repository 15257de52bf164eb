"""Splits: how the readers of copied channels share what read the one old channel, W'_1 + ... + W'_m = W.

With parts alpha_1 + ... + alpha_m = 1 of the same weights, the gradient of the k-th copy's writer is alpha_k times the
old one, and that of every reader is the old one whole: the left inverse of the copies reads each with its alpha
(design, section 9). Parts that differ from entry to entry have no such alpha; their left inverse is a mean of copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as _replace
from functools import lru_cache
from itertools import groupby
from typing import Literal

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.lift import Lift, Run, merged, stretches

Parts = Literal["even", "uneven", "dyadic", "halves", "noise", "own"]

SPLITS: Mapping[Parts, str] = {
    "even": "every copy has 1/m of each weight (Net2Net, arXiv 1511.05641, eq. 1)",
    "uneven": "the k-th copy has twice what the next has: 2/3 and 1/3 of two (LEMON, arXiv 2310.07999)",
    "dyadic": "1/2, 1/4, ..., the last two alike: powers of two, which round nothing in any dtype",
    "halves": "each entry goes whole to one copy, or half of it to each of two, drawn at random: rounds nothing",
    "own": "each copy is read by the copies of its own number, whole: the model beside itself (arXiv 2203.06211)",
    "noise": "1/m of each weight and a normal draw, added in one copy and taken off in the next",
}
"""The ways to share."""


@dataclass(frozen=True)
class Split:
    """How the readers of copies share their weights.

    Attributes:
        parts: one of `SPLITS`.
        noise: of "noise", the std of the draws in stds of the tensor: small in HyperCloning (arXiv 2409.12903), 1 for a
            difference of the size of the weights.
        fresh: an optimizer keeps what it knows of the first copy, and knows nothing of the others (SPARKLING's
            asymmetric reset, arXiv 2602.02472).
    """

    parts: Parts = "even"
    noise: float = 0.0
    fresh: bool = False

    @property
    def by_entry(self) -> bool:
        """The parts differ from entry to entry."""
        return self.parts in ("halves", "noise")

    def alphas(self, copies: int) -> list[Factor]:
        """The part of each of m copies; their mean where parts differ from entry to entry."""
        if self.parts == "uneven":
            return [Factor.of(2 ** (copies - 1 - k), 2**copies - 1) for k in range(copies)]
        if self.parts == "dyadic":
            return [Factor.of(1, 2 ** min(k + 1, max(copies - 1, 0))) for k in range(copies)]
        return [Factor.of(1, copies)] * copies


HALVES = Split("halves")


def copies(old: int, sources: Sequence[int], split: Split) -> Lift:
    """New channel j is a copy of old channel `sources[j]`; R reads every copy by its part."""
    lift = Lift(old, tuple(Run(count, first) for first, count in stretches(sources)))
    runs = [
        _replace(run, back=split.alphas(m)[k], copy=k if split.parts == "own" else -1, fresh=split.fresh and k > 0)
        for run, k, m in _numbered(lift)
    ]
    return Lift(old, tuple(merged(runs)))


@lru_cache(maxsize=1024)
def shared(lift: Lift, split: Split = HALVES, factor: Factor = ONE) -> Lift:
    """What reads copies of channels: of each old channel, `factor` times the source's weights, shared among them.

    Raises:
        ValueError: where a channel is no copy of an old one.
    """
    if any(run.old is None or run.mean for run in lift.runs):
        raise ValueError("only copies can share what reads them")
    out = []
    for run, k, m in _numbered(lift):
        whole, back = factor / run.factor, run.factor / factor
        run = _replace(run, copy=-1, fresh=split.fresh and k > 0)
        if m > 1 and split.parts == "own":
            out.append(_replace(run, factor=whole, back=back, share=(k, m), own=True))
        elif m == 1 or not split.by_entry:
            out.append(_replace(run, factor=whole * split.alphas(m)[k], back=back))
        elif split.parts == "halves":
            out.append(_replace(run, factor=whole, back=back, share=(k, m)))
        else:
            out.append(_replace(run, factor=whole, back=back, share=(k, m), noise=split.noise))
    return Lift(lift.old, tuple(merged(out)))


def _numbered(lift: Lift) -> list[tuple[Run, int, int]]:
    """Runs, cut so that all channels of one are the k-th of m copies each, with k and m."""
    times, seen = [0] * lift.old, [0] * lift.old
    for run in lift.runs:
        for i in range(run.count):
            times[(run.old or 0) + i] += 1
    out: list[tuple[Run, int, int]] = []
    for run in lift.runs:
        first = run.old or 0
        places = [(seen[channel], times[channel]) for channel in range(first, first + run.count)]
        start = 0
        for place, alike in groupby(places):
            count = len(list(alike))
            out.append((_replace(run, count=count, old=first + start), *place))
            start += count
        for channel in range(first, first + run.count):
            seen[channel] += 1
    return out
