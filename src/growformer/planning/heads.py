"""The growth of an attention's heads: which old head each new one is, copies, or is paired with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from growformer.algebra import Attention, Family, Lift, Run, Way, copies
from growformer.algebra.lift import merged
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth
from growformer.planning.picks import Pick, copied_growth, kind_of


def head_growth(
    old: tuple[int, int], new: tuple[int, int], copies: int = 1
) -> tuple[list[int | None], list[int | None]]:
    """For each new query head and each new key/value head, the old one it is.

    Args:
        old, new: (query heads, key/value heads).
        copies: how often each old key/value head should be there at least.

    Query head h reads key/value head h // (heads / kv_heads), so a head keeps its place in its group; where groups get
    smaller, each old key/value head is copied for the groups its query heads are spread over.
    """
    (heads, kv), (new_heads, new_kv) = old, new
    group, new_group = heads // kv, new_heads // new_kv
    copies = max(copies, -(-group // new_group))
    queries: list[int | None] = [None] * new_heads
    for head in range(heads):
        pair, place = divmod(head, group)
        queries[(pair * copies + place // new_group) * new_group + place % new_group] = head
    return queries, [j // copies if j < kv * copies else None for j in range(new_kv)]


def alibi_places(kind: str, old: int, new: int) -> list[int | None]:
    """For each new head, the old one with its slope, or None: a slope follows from a head's number and their count.

    Every old table of slopes is part of every larger one (measured for all counts up to 140).
    """
    have = slopes(kind, new)
    sources: list[int | None] = [None] * new
    for i, slope in enumerate(slopes(kind, old)):
        free = [j for j, s in enumerate(have) if s == slope and sources[j] is None]
        if not free:
            raise RequestError(f"{old} -> {new} heads: no new head has the slope 2^-{slope} of old head {i}")
        sources[free[0]] = i
    return sources


def slopes(kind: str, heads: int) -> list[Fraction]:
    """The exponents e of the slopes 2^-e of linear biases (arXiv 2108.12409), in the order of the heads.

    For a number of heads that is no power of two, "bloom" appends every second slope of twice the lower power, and
    "mpt" takes every second of the higher power first and then the others.
    """
    if kind == "mpt":
        power = 1 << (heads - 1).bit_length()
        table = [Fraction(8 * (i + 1), power) for i in range(power)]
        return table if power == heads else [*table[1::2], *table[::2]][:heads]
    power = 1 << (heads.bit_length() - 1)
    table = [Fraction(8 * (i + 1), power) for i in range(power)]
    more = [Fraction(8 * (2 * i + 1), 2 * power) for i in range(heads - power)]
    return [*table, *more]


def heads_growth(
    family: Family, attention: Attention, old: Mapping[str, int], new: Mapping[str, int], way: Way, pick: Pick
) -> list[AxisGrowth]:
    """The growth of an attention's query heads, key/value heads, and query heads in a group.

    Args:
        family: the model family.
        attention: its heads'.
        old, new: the size of every axis.
        way: of heads.
        pick: which old key/value heads new ones copy.

    Raises:
        RequestError: where no such heads are exact.
    """
    heads, kv = attention.heads, attention.kv_heads or attention.heads
    across = family.norm_across(kv)
    # Under one norm over all heads a new key/value head would have to be zero; a copy need not.
    copies = new[kv] // old[kv] if across is not None and new[kv] % old[kv] == 0 else 1
    queries, pairs = head_growth((old[heads], old[kv]), (new[heads], new[kv]), copies)
    if attention.alibi is not None:
        if (old[kv], old[heads]) != (new[kv], new[heads]) and old[kv] != old[heads]:
            raise RequestError(f"{family.name}: linear biases tie a head to its number, and so do groups; heads stay")
        queries = alibi_places(attention.alibi, old[heads], new[heads])
        # Where every head has its own keys and values, they go where their head goes.
        pairs = queries if kv == heads or (old[kv] == old[heads] and new[kv] == new[heads]) else pairs
    dead = ""
    if across is not None and new[kv] > old[kv] and None in pairs:
        dead = (
            f"{old[kv]} -> {new[kv]} key/value heads: under one norm over all heads, new queries and keys must both be "
            f"zero, and zero times zero has no gradient; copies ({old[kv] * -(-new[kv] // old[kv])}) are alive"
        )
    if way.lift == "copies" or way.closed != "readers":
        _check_alike(family, attention, old, new, way)
    if way.behind == "copy" and attention.group is not None:
        raise RequestError(f"{family.name} stores a group's queries beside its keys: no copies of heads; heads=paper")
    reading = [pairs[head // (new[heads] // new[kv])] for head, query in enumerate(queries) if query is None]
    if way.lift == "new" and way.closed == "writers" and kv != heads and any(pair is not None for pair in reading):
        raise RequestError(
            f"{family.name}: {old[heads]} -> {new[heads]} heads over {old[kv]} -> {new[kv]} key/value heads: new heads "
            f"would read old values, which cannot be closed where they are written; heads=paper works, or more "
            f"key/value heads in the same proportion"
        )
    donors = _donors(queries, pairs, old[heads] // old[kv], pick(kv, old[kv], pairs.count(None)))
    grown = {heads: (queries, donors[0]), kv: (pairs, donors[1])}
    out = [alike(axis, old[axis], *grown[axis], way) for axis in dict.fromkeys((heads, kv))]
    if way.closed == "pairs" and way.lift == "new":
        partners = {heads: _partners(queries, pairs), kv: halves([j for j, i in enumerate(pairs) if i is None])}
        out = [
            AxisGrowth(one.axis, _mirrored(one.old, grown[one.axis][0], partners[one.axis]), "pairs")
            if None in grown[one.axis][0]
            else one
            for one in out
        ]
    out[-1] = replace(out[-1], dead=dead)
    if attention.group is not None:
        group, larger = old[attention.group], new[attention.group]
        if sorted(p for p in pairs if p is not None) != list(range(old[kv])):
            raise RequestError(f"{family.name} stores a group's queries beside its keys: groups cannot be split")
        lift, fades = Lift.place(group, range(group), larger), bool(way.behind) and group != larger
        out.append(AxisGrowth(attention.group, lift, out[0].closed, fades=fades))
    return out


def alike(axis: str, old: int, sources: Sequence[int | None], donors: Sequence[int], way: Way) -> AxisGrowth:
    """The growth of one axis of heads, whose new ones are copies of, or start from, the donors."""
    if None not in sources:
        return AxisGrowth(axis, Lift.rows(old, sources), "readers")
    if way.lift == "copies":
        rest = iter(donors)
        whole = [next(rest) if source is None else source for source in sources]
        return copied_growth(axis, copies(old, whole, way.split), "readers", way)
    start = tuple(donors) if way.fill == "copy" else ()
    return AxisGrowth(axis, Lift.rows(old, sources), way.closed, donors=start, fades=bool(way.behind))


def _donors(
    queries: Sequence[int | None], pairs: Sequence[int | None], group: int, picked: Sequence[int]
) -> tuple[list[int], list[int]]:
    """For each new query head, and each new key/value head, the old one that it is like.

    A query head is like one of those that read what its own key/value head is, or is like.
    """
    rest = iter(picked)
    whole = [next(rest) if pair is None else pair for pair in pairs]
    size, turn = len(queries) // len(pairs), dict.fromkeys(range(len(pairs)), 0)
    found = []
    for head, query in enumerate(queries):
        if query is None:
            pair = head // size
            found.append(whole[pair] * group + turn[pair] % group)
            turn[pair] += 1
    return found, list(picked)


def halves(places: Sequence[int]) -> dict[int, int]:
    """Of new channels at these places, the partner of each in the second half; one may be left over."""
    half = len(places) // 2
    return {places[half + i]: places[i] for i in range(half)}


def _partners(queries: Sequence[int | None], pairs: Sequence[int | None]) -> dict[int, int]:
    """The partner of every second new query head: both read one key/value head, or two that are partners themselves."""
    size = len(queries) // len(pairs)
    twins = halves([j for j, pair in enumerate(pairs) if pair is None])
    out: dict[int, int] = {}
    for pair in range(len(pairs)):
        new = [head for head in range(pair * size, (pair + 1) * size) if queries[head] is None]
        if pair in twins:
            out |= {head: head + (twins[pair] - pair) * size for head in new}
        elif pair not in twins.values():
            out |= halves(new)
    return out


def _mirrored(old: int, sources: Sequence[int | None], partners: Mapping[int, int]) -> Lift:
    """The lift whose new channels mirror their partners, which stand before them."""
    runs = [
        Run(1, None, back=None, mirror=j - partners[j] if j in partners else 0) if source is None else Run(1, source)
        for j, source in enumerate(sources)
    ]
    return Lift(old, tuple(merged(runs)))


def _own_values(family: Family, attention: Attention) -> bool:
    """Whether values are written for each head (or each key/value head), not once for all."""
    heads = (attention.heads, attention.kv_heads)
    wrote = [
        {atom.axis for atom in pattern.atoms() if atom.stand == "write" and atom.role in (None, attention.roles[2])}
        for _, pattern in family.patterns
        if any(atom.axis == attention.value and atom.stand == "write" for atom in pattern.atoms())
    ]
    return all(axes & set(heads) for axes in wrote)


def paired_inside(family: Family, sizes: Mapping[str, int]) -> dict[str, Lift]:
    """The axes inside a new layer whose channels all stand in pairs, so that the layer adds nothing to the stream.

    Raises:
        RequestError: a layer that more than sums of its channels stand in.
    """
    if any(norm.output in ("added", "stream") for norm in family.norms.values()):
        raise RequestError(f"{family.name}: norms stand between what a layer makes and the stream; layer=paper works")
    out: dict[str, Lift] = {}
    for attention in family.attentions:
        if attention.alibi is not None:
            raise RequestError(f"{family.name}: heads differ by their slopes, and have no pairs; layer=paper works")
        kv = attention.kv_heads or attention.heads
        if attention.group is not None and sizes[kv] % 2:
            raise RequestError(f"{family.name}: {sizes[kv]} groups of heads do not make pairs; layer=paper works")
        pairs: list[int | None] = [None] * sizes[kv]
        queries: list[int | None] = [None] * sizes[attention.heads]
        out[kv] = _mirrored(0, pairs, halves(range(sizes[kv])))
        out[attention.heads] = _mirrored(0, queries, _partners(queries, pairs))
    for axis in family.axes:
        if kind_of(family, axis) == "mlp":
            out[axis] = _mirrored(0, [None] * sizes[axis], halves(range(sizes[axis])))
    for name, pattern in family.patterns:
        reads = {atom.axis for atom in pattern.atoms() if atom.stand == "read"}
        if reads and not reads & set(out) and family.closes_layer(name, pattern):
            # It would be closed by zeros besides, and two closures in series keep both from learning.
            raise RequestError(
                f"{family.name}: {name.text} adds to the stream, and what it reads has no pairs; layer=paper works"
            )
    return out


def _check_alike(
    family: Family, attention: Attention, old: Mapping[str, int], new: Mapping[str, int], way: Way
) -> None:
    """Refuse heads that cannot be like others: one that differs from its copy, or its partner, by its place alone."""
    axes = [axis for axis in (attention.heads, attention.kv_heads) if axis is not None and old[axis] != new[axis]]
    if not axes:
        return
    if way.lift == "new" and way.closed == "writers":
        if attention.group is not None or not _own_values(family, attention):
            raise RequestError(f"{family.name}: new heads would read old values; heads=paper works")
        return
    what = "copies of heads" if way.lift == "copies" else "pairs of heads"
    if attention.alibi is not None:
        raise RequestError(f"{family.name}: {what} differ by the slope that follows from a head's number; heads=paper")
    if attention.group is not None:
        raise RequestError(f"{family.name} stores a group's queries beside its keys: no {what}; heads=paper works")
    if any(family.norm_across(axis) is not None for axis in axes):
        raise RequestError(f"{family.name}: a norm over all heads reads them: no {what}; heads=paper works")
