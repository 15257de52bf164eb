"""The two equations W' = E W (writers) and W' E = W (readers), checked on one tensor at a time in pieces of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from growformer.algebra.factor import ONE
from growformer.proof.axes import MEAN, NONE
from growformer.proof.places import OPEN, REACHED, SHUT, Places, floats
from growformer.proof.reading import Slabs, Tensors
from growformer.proof.rows import bits, half_ulp, pieces, read_rows, same, take
from growformer.proof.spans import Spans, holds, is_shut_or_open, viewer

__all__ = [
    "Found",
    "Slabs",
    "Tensors",
    "check_new",
    "check_old",
    "half_ulp",
    "pieces",
    "pull_back",
    "read_rows",
    "same",
]


@dataclass
class Found:
    """What one tensor was found to be: the first thing wrong with it, or how its bits relate to the source's."""

    wrong: str | None = None
    fidelity: str = "identical"
    zero: int = 0
    free: int = 0


def _spread(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors, one for each dim, shaped so that they broadcast against the tensor."""
    return [v.reshape([-1 if d == i else 1 for d in range(len(vectors))]) for i, v in enumerate(vectors)]


def _factors(places: Sequence[Places], which: Sequence[Tensor]) -> Tensor:
    """The factor of each entry (or one for all): a product of one factor of each dim, rounded once to float64."""
    products = [ONE]
    for dim in places:
        products = [x * y for x in products for y in dim.factors]
    table = floats(products).reshape([len(dim.factors) for dim in places])
    which = [w[:1] if len(w) and bool((w == w[0]).all()) else w for w in which]
    return table if len(products) == 1 else table[tuple(_spread(which))]


def _old_entries(source: Tensors, name: str, index: Sequence[Tensor], but: int | None = None) -> Tensor:
    """The source's entries at the product of these old indices (anything where there is none).

    Dim `but` is left whole.
    """
    old = read_rows(source, name, index[0].clamp(min=0))
    for d, places in enumerate(index[1:], 1):
        old = old if d == but else take(old, d, places.clamp(min=0))
    return old


def _means(source: Tensors, name: str, index: Sequence[Tensor], d: int, weigh: Tensor | None) -> tuple[Tensor, Tensor]:
    """The float64 mean of the old entries along dim d, and how far summing in another order may move it.

    `weigh`: what each of them counts for; None: one.
    """
    weigh = torch.ones(source.shape(name)[d], dtype=torch.float64) if weigh is None else weigh
    if d:
        old = _old_entries(source, name, index, but=d).double()
        old = old * weigh.reshape([-1 if e == d else 1 for e in range(old.dim())])
        total, size = old.sum(d, keepdim=True), old.abs().sum(d, keepdim=True)
    else:
        total, size = torch.zeros((2, 1, *source.shape(name)[1:]), dtype=torch.float64)
        for rows in pieces(source.shape(name)):
            old = source.read(name, rows).double()
            old = old * weigh[rows].reshape([-1] + [1] * (old.dim() - 1))
            total += old.sum(0, keepdim=True)
            size += old.abs().sum(0, keepdim=True)
        for e, places in enumerate(index[1:], 1):
            total, size = (x.index_select(e, places.clamp(min=0)) for x in (total, size))
    n = source.shape(name)[d]
    return total / n, size * 2.0**-52


def _holds(x: Tensor, state: int, offset: int = 0) -> bool:
    """Whether new entries are all zero where they are shut, finite where they are open: one pass, no other tensor."""
    if not x.numel():
        return True
    return is_shut_or_open(x, state) if state == OPEN or not offset else bool((x == -offset).all())


def _zero(offset: int) -> str:
    return "zero" if not offset else f"{-offset}, so that {offset} + it is zero"


def _say(
    name: str,
    start: int,
    bad: Tensor,
    new: Tensor,
    wanted: Tensor | None,
    why: str,
    numbers: Sequence[Tensor] | None = None,
) -> str:
    """What is wrong at the first bad entry of a piece that starts at row `start`.

    `numbers`: of each dim, which of the piece's are looked at; None for all.
    """
    at = bad.nonzero()[0].tolist()
    if not at:
        return f"{name}: found {float(new)!r}; required {why if wanted is None else repr(float(wanted)) + ', ' + why}"
    place = at if numbers is None else [int(of[k]) for of, k in zip(numbers, at, strict=True)]
    required = why if wanted is None else f"{float(wanted[tuple(at)])!r}, {why}"
    return f"{name}{[place[0] + start, *place[1:]]}: found {float(new[tuple(at)])!r}; required {required}"


def check_new(
    target: Tensors, name: str, shape: Sequence[int], closed: bool, offset: int = 0, value: float | None = None
) -> Found:
    """A tensor of a new layer (or head): all zero where it is closed, anything finite elsewhere.

    Args:
        target, name: the tensor.
        shape: that it must have.
        closed: a new layer writes the stream here, or the gain stands here of what it adds to it.
        offset: what the code adds to the stored numbers.
        value: that every entry must be, with what the code adds; None: any.
    """
    found = Found(fidelity="new")
    if tuple(target.shape(name)) != tuple(shape):
        found.wrong = f"{name}: shape {list(target.shape(name))}; required {list(shape)}"
        return found
    for rows in pieces(shape) if shape else [None]:
        new = target.read(name) if rows is None else viewer(target)(name, rows)
        if value is not None:
            bad, why = new != value - offset, "what a norm keeps that hands on its gain and shift, or stands between"
            if bool(bad.any()):
                wanted = torch.full(bad.shape, value - offset, dtype=torch.float64)
                found.wrong = _say(name, 0 if rows is None else rows.start, bad, new, wanted, why)
                return found
        elif not _holds(new, SHUT if closed else OPEN, offset):
            bad = (new != -offset) if closed else ~new.isfinite()
            shut = f"{_zero(offset)}, for a new layer is closed where it writes the stream"
            shut = "1, for what passes a new layer is multiplied by it" if offset < 0 else shut
            why = shut if closed else "a finite number"
            found.wrong = _say(name, 0 if rows is None else rows.start, bad, new, None, why)
            return found
    entries = torch.Size(shape).numel()
    found.zero, found.free = entries * closed, entries * (not closed and value is None)
    return found


def check_old(
    places: Sequence[Places],
    target: Tensors,
    name: str,
    source: Tensors,
    source_name: str,
    offset: int = 0,
    spans: Spans | None = None,
    weigh: Tensor | None = None,
) -> Found:
    """A tensor that a source tensor is lifted to: its equations, its zero entries, its free entries.

    Args:
        places: one for each dim.
        target, name: the grown tensor.
        source, source_name: the tensor it comes from.
        offset: what the code adds to the stored numbers of both; the equations hold for the sums.
        spans: the places by spans, where that is quicker.
        weigh: for rows that are means, what each old one counts for (a gain that stands behind); None: one.
    """
    old, new = tuple(dim.old for dim in places), tuple(dim.new for dim in places)
    found = Found(fidelity=_fidelity(places, offset))
    if (source.shape(source_name), target.shape(name)) != (old, new):
        shapes = f"{list(source.shape(source_name))} -> {list(target.shape(name))}"
        found.wrong = f"{name}: shape {shapes}; required {list(old)} -> {list(new)}"
        return found
    sums = any(dim.sums for dim in places)
    if sums and offset:
        raise ValueError("the weights of copies add up, and 1 is added to each; not covered")
    if not new:
        a, b = source.read(source_name).to(target.dtype(name)), target.read(name)
        if not torch.equal(bits(a), bits(b)):
            found.wrong = _say(name, 0, torch.ones((), dtype=torch.bool), b, a, source_name)
        return found
    for rows in pieces(new):
        piece = target.read(name, rows) if spans is None else viewer(target)(name, rows)
        held = None
        if spans is not None:
            held = holds(spans, rows, piece, lambda rows: viewer(source)(source_name, rows))
        if held is not None:
            found.zero, found.free = found.zero + held[0], found.free + held[1]
            continue
        cut = [places[0].cut(rows), *places[1:]]
        for state, numbers in _blocks(cut):
            part = piece
            for d, of in enumerate(numbers):
                part = take(part, d, of)
            if state == REACHED:
                if not sums:
                    found.wrong = _check_block(cut, numbers, part, name, rows.start, source, source_name, offset, weigh)
            elif not _holds(part, state, offset):
                shut = state == SHUT
                bad, why = (part != -offset, _zero(offset)) if shut else (~part.isfinite(), "a finite number")
                found.wrong = _say(name, rows.start, bad, part, None, f"{why} in a new entry", numbers)
            if found.wrong:
                return found
            found.zero += part.numel() * (state == SHUT)
            found.free += part.numel() * (state == OPEN)
    if sums:
        found.wrong = _check_sums(places, target, name, source, source_name, weigh)
    return found


def _blocks(cut: Sequence[Places]) -> list[tuple[int, tuple[Tensor, ...]]]:
    """The entries of some rows by what they must be, what is zero first: a state, and the numbers of each dim.

    In a block the channels of a dim are all means of old ones, or none is.
    """
    kinds = []
    for dim in cut:
        kind = 2 * dim.state.long() + (dim.source == MEAN)
        kinds.append([(k // 2, (kind == k).nonzero().flatten()) for k in sorted(set(kind.tolist()))])
    blocks = [(max(state for state, _ in one), tuple(of for _, of in one)) for one in product(*kinds)]
    return sorted(blocks, key=lambda block: (SHUT, OPEN, REACHED).index(block[0]))


def _fidelity(places: Sequence[Places], offset: int) -> str:
    """How the bits of old entries relate to the source's."""
    if offset and not all(dim.simple for dim in places):
        return "rounded"
    if any(dim.sums or bool((dim.source == MEAN).any()) for dim in places):
        return "rounded"
    if all(dim.simple for dim in places):
        return "identical"
    # Only the factors that some index carries count.
    used = [[dim.factors[k] for k in sorted(set(dim.factor[dim.source >= 0].tolist()))] for dim in places]
    products = [ONE]
    for factors in used:
        products = [x * y for x in products for y in factors]
    return "rounded" if any(f.exponent is None for f in products) else "scaled"


def _check_block(
    cut: Sequence[Places],
    numbers: Sequence[Tensor],
    part: Tensor,
    name: str,
    start: int,
    source: Tensors,
    source_name: str,
    offset: int,
    weigh: Tensor | None,
) -> str | None:
    """Compare a block of reached entries with the source's; says what is wrong."""
    index = [dim.source[of] for dim, of in zip(cut, numbers, strict=True)]
    factor = _factors(cut, [dim.factor[of] for dim, of in zip(cut, numbers, strict=True)])
    means = [d for d, places in enumerate(index) if bool((places == MEAN).any())]
    for d in means:
        mean, slack = (x * factor for x in _means(source, source_name, index, d, weigh))
        bad = ~(((mean - slack).to(part.dtype) <= part) & (part <= (mean + slack).to(part.dtype)))
        if bool(bad.any()):
            return _say(name, start, bad, part, mean.expand(part.shape), f"the mean of {source_name}", numbers)
    if means:
        return None
    old = _old_entries(source, source_name, index)
    simple = all(dim.simple for dim in cut)
    if offset and not simple:
        wanted = (old.double() + offset) * factor - offset
        # The sum and the product are each rounded once before the result is.
        slack = 2.0**-51 * (old.double().abs() + offset) * factor
        bad = ~(((wanted - slack).to(part.dtype) <= part) & (part <= (wanted + slack).to(part.dtype)) & part.isfinite())
        why = f"(1 + {source_name}) times the factor, less 1"
        return _say(name, start, bad, part, wanted, why, numbers) if bool(bad.any()) else None
    wanted = old.to(part.dtype) if simple else (old.double() * factor).to(part.dtype)
    if torch.equal(bits(part), bits(wanted)) and (simple or _holds(part, OPEN)):
        return None
    bad = bits(part) != bits(wanted)
    if not simple:
        bad &= part != wanted  # zeros of either sign are one
        bad |= ~part.isfinite() & old.isfinite()  # a factor may take a number past the largest
    if not bool(bad.any()):
        return None
    at = bad.nonzero()[0].tolist()
    by = "" if simple else f" times {float(factor.expand(part.shape)[tuple(at)])!r}"
    origin = [int(i[k]) for i, k in zip(index, at, strict=True)]
    return _say(name, start, bad, part, wanted, f"{source_name}{origin}{by}", numbers)


def _fold(x: Tensor, d: int, equation: Tensor, weight: Tensor, equations: int) -> Tensor:
    """Sum the terms of each equation along dim d."""
    terms = (equation >= 0).nonzero().flatten()
    shape = [1] * x.dim()
    shape[d] = len(terms)
    part = x.index_select(d, terms) * weight[terms].reshape(shape)
    out = x.new_zeros((*x.shape[:d], equations, *x.shape[d + 1 :]))
    return out.index_add_(d, equation[terms], part)


def _check_sums(
    places: Sequence[Places], target: Tensors, name: str, source: Tensors, source_name: str, weigh: Tensor | None
) -> str | None:
    """W' E = W where an old index has several terms: they add up, each of them rounded once."""
    first = places[0]
    source_of, factor_of = zip(*(dim.by_equation() for dim in places), strict=True)
    order = torch.argsort(first.equation, stable=True)
    order = order[first.equation[order] >= 0]
    for rows in pieces((first.equations, *target.shape(name)[1:])):
        mine = order[(first.equation[order] >= rows.start) & (first.equation[order] < rows.stop)]
        piece = read_rows(target, name, mine)
        total, slack = piece.double(), half_ulp(piece)
        for d, dim in enumerate(places):
            equation = dim.equation if d else first.equation[mine] - rows.start
            weight, count = (dim.weight, dim.equations) if d else (first.weight[mine], rows.stop - rows.start)
            slack = _fold(slack, d, equation, weight, count) + 2.0**-52 * _fold(total.abs(), d, equation, weight, count)
            total = _fold(total, d, equation, weight, count)
        index = [source_of[0][rows], *source_of[1:]]
        factor = _factors(places, [factor_of[0][rows], *factor_of[1:]])
        wanted = _old_entries(source, source_name, index).double() * factor
        for d, old in enumerate(index):
            means = (old == MEAN).nonzero().flatten()
            if len(means):
                mean, moved = (
                    (x * factor).expand(wanted.shape).index_select(d, means)
                    for x in _means(source, source_name, index, d, weigh)
                )
                wanted.index_copy_(d, means, mean)
                slack.index_add_(d, means, moved)
        bad = ~((total - wanted).abs() <= slack)
        if bool(bad.any()):
            return _say(f"{name}: its copies of {source_name}", rows.start, bad, total, wanted, "their sum")
    return None


def pull_back(
    places: Sequence[Places], target: Tensors, name: str, rows: slice | None = None, offset: int = 0
) -> Tensor:
    """R W' (writers) and W' E (readers), in float64: what the source's tensor, or those rows of it, must have been.

    `offset`: what the code adds to the stored numbers of both.
    """
    if not places:
        return target.read(name).double()
    first = places[0]
    start, stop = (0, first.old) if rows is None else (rows.start, rows.stop)
    out = torch.zeros([stop - start, *(dim.old for dim in places[1:])], dtype=torch.float64)
    mine = ((first.pull != 0) & (first.source >= start) & (first.source < stop)).nonzero().flatten()
    for part in pieces((len(mine), *target.shape(name)[1:])):
        taken = mine[part]
        piece = read_rows(target, name, taken).double() + offset
        for d in reversed(range(1, len(places))):
            read = torch.where(places[d].pull != 0, places[d].source, NONE)
            piece = _fold(piece, d, read, places[d].pull, places[d].old)
        weight = first.pull[taken].reshape([-1] + [1] * (piece.dim() - 1))
        out.index_add_(0, first.source[taken] - start, piece * weight)
    return out - offset
