"""A tensor's equations by spans of neighbouring entries: views are compared, and no index is ever gathered.

Nothing is decided here but that all is well. Where these spans find anything else, or would be too short to gain by,
`equations` looks at every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growformer.algebra.factor import ONE
from growformer.algebra.scratch import Scratch
from growformer.proof.places import OPEN, REACHED, SHUT, Places

if TYPE_CHECKING:
    from growformer.proof.equations import Tensors

FEWEST = 16
"""Entries of a span, on average, below which looking at every entry by its number is no slower."""

STRIPE = 1 << 16
"""Entries that are multiplied at once, so that what is in between stays in the processor's cache."""

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_scratch = Scratch()


@dataclass(frozen=True)
class Span:
    """Neighbouring indices of a dim: their state and, where they are reached, the first old one and their factor."""

    start: int
    stop: int
    state: int
    source: int = 0
    factor: int = 0

    def cut(self, start: int, stop: int) -> Span:
        low, high = max(start, self.start), min(stop, self.stop)
        return Span(low, high, self.state, self.source + low - self.start, self.factor)


@dataclass(frozen=True)
class Spans:
    """All dims of a tensor by spans.

    Attributes:
        rows: those of dim 0.
        rest: for each state of a row, the spans of the other dims, multiplied out, that must be looked at one by one.
        factors: the product of factors by the number that each dim gives it; empty where all are one.
    """

    rows: tuple[Span, ...]
    rest: Mapping[int, tuple[tuple[Span, ...], ...]]
    factors: Mapping[tuple[int, ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, places: Sequence[Places]) -> Spans | None:
        """None where numbers must be gathered or added up, or there is but one."""
        if not places or any(dim.sums for dim in places):
            return None
        dims = [_spans(dim) for dim in places]
        if any(spans is None for spans in dims):
            return None
        rows, *others = [spans for spans in dims if spans is not None]
        if math.prod(len(spans) for spans in others) > max(FEWEST, math.prod(dim.new for dim in places[1:]) // FEWEST):
            return None
        rest = {state: tuple(product(*(_merged(spans, state) for spans in others))) for state in (REACHED, SHUT, OPEN)}
        if all(dim.simple for dim in places):
            return cls(tuple(rows), rest)
        numbers = product(*(range(len(dim.factors)) for dim in places))
        return cls(tuple(rows), rest, {which: _float(places, which) for which in numbers})


def _float(places: Sequence[Places], which: tuple[int, ...]) -> float:
    """The product of one factor of each dim, rounded once."""
    out = ONE
    for dim, k in zip(places, which, strict=True):
        out = out * dim.factors[k]
    return float(out)


def _spans(dim: Places) -> list[Span] | None:
    """A dim by spans; None where reached entries are means, or spans are short."""
    source, state, factor = (x.numpy() for x in (dim.source, dim.state, dim.factor))
    reached = state == REACHED
    if bool((source[reached] < 0).any()):
        return None
    goes_on = (source[1:] == source[:-1] + 1) & (factor[1:] == factor[:-1]) | ~reached[1:]
    cuts = np.flatnonzero((state[1:] != state[:-1]) | ~goes_on) + 1
    if len(cuts) > max(FEWEST, dim.new // FEWEST):
        return None
    edges = [0, *cuts.tolist(), dim.new] if dim.new else [0]
    return [
        Span(a, b, int(state[a]), int(source[a]) if reached[a] else 0, int(factor[a]) if reached[a] else 0)
        for a, b in pairwise(edges)
    ]


def _merged(spans: Sequence[Span], state: int) -> list[Span]:
    """The spans of a dim as they stand in rows of that state; what need not be told apart is one."""
    if state == REACHED:
        return list(spans)
    out: list[Span] = []
    for span in spans:
        what = max(span.state, state)
        if out and out[-1].state == what:
            out[-1] = Span(out[-1].start, span.stop, what)
        else:
            out.append(Span(span.start, span.stop, what))
    return out


def holds(spans: Spans, rows: slice, piece: Tensor, read: Callable[[slice], Tensor]) -> tuple[int, int] | None:
    """How many entries of some rows are shut and open, where each is what it must be; None where one is not.

    Args:
        spans: of the tensor.
        rows: which rows.
        piece: those rows.
        read: rows of the tensor that reached entries come from; good until they are read again.
    """
    shut = opened = 0
    for row in _within(spans.rows, rows):
        here = piece[row.start - rows.start : row.stop - rows.start]
        for box in spans.rest[row.state]:
            part = here[(slice(None), *(slice(span.start, span.stop) for span in box))]
            state = max(row.state, *(span.state for span in box)) if box else row.state
            if state == REACHED:
                old = read(slice(row.source, row.source + row.stop - row.start))
                old = old[(slice(None), *(slice(s.source, s.source + s.stop - s.start) for s in box))]
                if not _same(part, old, spans.factors.get((row.factor, *(span.factor for span in box)))):
                    return None
                continue
            if not is_shut_or_open(part, state):
                return None
            shut += part.numel() * (state == SHUT)
            opened += part.numel() * (state == OPEN)
    return shut, opened


def viewer(tensors: Tensors) -> Callable[[str, slice], Tensor]:
    """How to read rows that are done with before the thread reads any of the same tensors in this way again."""
    found: Callable[[str, slice], Tensor] = getattr(tensors, "view", tensors.read)
    return found


def _within(spans: Sequence[Span], rows: slice) -> Iterator[Span]:
    return (span.cut(rows.start, rows.stop) for span in spans if span.start < rows.stop and span.stop > rows.start)


def whole(x: Tensor) -> NDArray[Any]:
    """The bits of each entry as a whole number without sign, in the same memory."""
    bits: NDArray[Any] = x.view(_WHOLE[x.element_size()]).numpy()
    return bits.view(f"uint{8 * x.element_size()}")


def is_shut_or_open(x: Tensor, state: int) -> bool:
    """Whether entries are all zero where they are shut, finite where they are open."""
    if not x.numel():
        return True
    bits = whole(x)
    # Zero but for its sign; and no infinity or NaN, whose exponents are all ones.
    infinity = _infinity(x.dtype)
    mask = bits.dtype.type(np.iinfo(bits.dtype).max >> 1) if state == SHUT else infinity
    found = _scratch.array("masked", x.shape, bits.dtype)
    largest = np.bitwise_and(bits, mask, out=found).max()
    return bool(largest == 0) if state == SHUT else bool(largest != infinity)


@lru_cache
def _infinity(dtype: torch.dtype) -> Any:
    return whole(torch.tensor([math.inf], dtype=dtype))[0]


def _same(new: Tensor, old: Tensor, factor: float | None) -> bool:
    """Whether entries are the old ones, bit for bit, or, with a factor, finite and their product rounded once."""
    if factor is None and new.dtype == old.dtype:
        return _equal(new, old)
    step = max(1, STRIPE // max(math.prod(new.shape[1:]), 1))
    for at in range(0, len(new), step):
        part, of = new[at : at + step], old[at : at + step]
        wanted = of.to(new.dtype) if factor is None else (of.double() * factor).to(new.dtype)
        if not _equal(part, wanted) or (factor is not None and not is_shut_or_open(part, OPEN)):
            return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    differ = _scratch.array("differ", a.shape, np.bool_)
    return not np.not_equal(whole(a), whole(b), out=differ).any()
