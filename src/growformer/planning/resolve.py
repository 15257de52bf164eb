"""From old and new sizes to the growth of every axis: which lift, which side closed, which rescale."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from growformer.algebra import BARRED, ONE, OUTSIDE, Attention, Experts, Factor, Family, Lift, Method, Run
from growformer.errors import RequestError
from growformer.planning.choices import Choices
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.migrate import KEPT
from growformer.planning.moves import field, up
from growformer.planning.rotary import pair_places
from growformer.planning.sizes import Sizes
from growformer.planning.split import split_growth


def spread(old: int, new: int, barred: Collection[int] = ()) -> list[int]:
    """Target places of the new layers when nobody places them: evenly, each after an old one.

    Args:
        old, new: how many layers there are.
        barred: old layers that no new one may follow; the nearest other takes its place, the later of two.
    """
    extra = new - old
    after = [((j + 1) * old + extra - 1) // extra - 1 for j in range(extra)]
    free = [layer for layer in range(old) if layer not in barred]
    after = sorted(min(free, key=lambda layer: (abs(layer - want), -layer)) for want in after) if barred else after
    return [layer + 1 + j for j, layer in enumerate(after)]


def layer_growth(
    old: int,
    new: int,
    at: Sequence[int] | None,
    method: Method,
    axis: str = "layer",
    barred: Collection[int] = (),
) -> AxisGrowth:
    """The growth of the layer axis, new layers at the target places `at`.

    Raises:
        RequestError: where the places are not as many as the new layers, repeat, are out of range, or behind a layer
            that no new one may follow.
    """
    places = spread(old, new, barred) if at is None and new > old else list(at or ())
    if len(places) != new - old or len(set(places)) != len(places) or any(not 0 <= p < new for p in places):
        raise RequestError(
            f"the new layers' places {places} should be {new - old} different numbers from 0 to {new - 1} "
            f"(places in the grown model of {new} layers)"
        )
    sources: list[int | None] = []
    like: list[int] = []
    taken = 0
    for place in range(new):
        sources.append(None if place in places else taken)
        if place in places and taken - 1 in barred:
            raise RequestError(
                f"a new layer at {place} would follow old layer {taken - 1}, which lends its keys and values to the "
                f"last layers, and would lend its own instead; place it elsewhere"
            )
        taken += place not in places
        like.append(max(taken - 1, 0))
    return AxisGrowth(axis, Lift.rows(old, sources), method.closed["layer"], like=tuple(like))


def normed_growth(family: Family, axis: str, old: int, new: int, method: Method) -> AxisGrowth:
    """The growth of an axis that a norm reads, the residual stream first of all: a lift its norm cannot see.

    New channels that nothing writes under an RMSNorm, that carry the mean under a LayerNorm, or whole copies (design,
    section 3).
    """
    if old == new:
        return AxisGrowth(axis, Lift.identity(old), "writers")
    # The values of a head have no say: whether a norm reads them is the family's, and a method knows no norms.
    if family.attention_of(axis) is None and method.closed.get(axis, "writers") != "writers":
        raise RequestError(f"a norm reads {axis}, so it can only be closed at its writers")
    if axis in family.copied:
        return AxisGrowth(axis, Lift.copies(old, new // old), "writers", heard=True)
    norms = [norm for norm in family.norms.values() if norm.axis == axis]
    # One eps that stands in the code, or serves norms over several axes, cannot be rescaled; the stream is.
    scale = Factor.sqrt(new, old) if any(family.fixed_eps(norm) for norm in norms) else ONE
    return stream_growth(axis, old, new, mean=any(norm.kind == "layer" for norm in norms), scale=scale)


def stream_growth(axis: str, old: int, new: int, *, mean: bool, scale: Factor = ONE) -> AxisGrowth:
    """[I; 0], or [I; mean], closed at the writers."""
    if old == new:
        return AxisGrowth(axis, Lift.identity(old), "writers")
    tail = Run(new - old, 0, back=None, mean=old) if mean else Run(new - old, None, back=None)
    return AxisGrowth(axis, Lift(old, (Run(old, 0), tail)), "writers", scale)


def key_growth(family: Family, axis: str, old: int, new: int, method: Method, way: str = "theta") -> AxisGrowth:
    """The growth of an axis of the dot product.

    Under a norm over each head the new channels are copies of old ones at new rotary pairs, closed at the key's gain:
    channel i's n_i copies carry sqrt((m-1)/n_i), m = new // old, so that every channel weighs the same and the norm
    sees nothing. Below twice the size only zeros are exact, and zero queries on zero keys never move (unless keys are
    the values too).
    """
    attention = family.attention_of(axis)
    rotary = attention.rotary if attention is not None and attention.rotary and attention.rotary.axis == axis else None
    whole = rotary if rotary is not None and rotary.whole else None
    half = whole is not None and whole.layout == "half"
    places = list(range(old)) if whole is None else pair_places(old, new, whole.layout, strided=way == "strided")
    norm = family.norm_over(axis) or family.norm_across(axis)
    if old == new or norm is None:
        return AxisGrowth(axis, Lift.place(old, places, new), method.closed.get(axis, "readers"))
    times = new // old
    sources: list[int | None] = [None] * new
    for i, place in enumerate(places):
        sources[place] = i
    if times < 2:
        if norm.kind == "layer":
            raise RequestError(_whole_heads(family, axis, old, new))
        scale = ONE if len(norm.axes) > 1 else Factor.sqrt(new, old)
        name = field(family, axis) or "head_dim"
        dead = (
            f"{name} {old} -> {new}: under a norm over each head, new query and key rows below twice the size must "
            f"all be zero, and zero times zero has no gradient; {name}={2 * old} is alive"
        )
        if attention is not None and attention.value == axis:
            dead = ""  # new keys are new values as well, and learn through what reads those
        return AxisGrowth(axis, Lift.rows(old, sources), "writers", scale, dead=dead)
    if norm.kind == "layer" and new % old:
        raise RequestError(_whole_heads(family, axis, old, new))
    turn, base = (old // 2, new // 2) if half else (old, new)
    for i, place in enumerate(j for j in range(base) if sources[j] is None):
        sources[place] = i % turn
        if half:
            sources[place + base] = i % turn + turn
    copies = [sum(1 for source in sources if source == i) - 1 for i in range(old)]
    weight = {n: ONE if n == times - 1 else Factor.sqrt(times - 1, n) for n in copies}
    kept = set(places)
    runs = tuple(
        Run(1, source) if j in kept else Run(1, source, weight[copies[source]], None)
        for j, source in enumerate(sources)
        if source is not None
    )
    scale = ONE if len(norm.axes) > 1 else Factor.sqrt(new, old * times)
    return AxisGrowth(axis, Lift(old, runs), "readers", scale)


def _whole_heads(family: Family, axis: str, old: int, new: int) -> str:
    return (
        f"{family.name}: the {axis} size {old} -> {new}: a LayerNorm over each head sees anything but whole copies of "
        f"the head; {old * max(2, -(-new // old))} works"
    )


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


def resolve_growth(
    family: Family,
    sizes: Sizes,
    method: Method,
    *,
    tied: bool,
    headed: bool = True,
    layers_at: Mapping[str, Sequence[int]] | None = None,
    choices: Choices | None = None,
) -> Growth:
    """The growth of every axis of a family whose sizes are the same in all layers."""
    choices = choices or Choices()
    old, new = sizes.old, sizes.new
    axes: dict[str, AxisGrowth] = {}
    for attention in family.attentions:
        axes |= {axis.axis: axis for axis in _heads(family, attention, old, new, method)}
    if sizes.split is not None and family.experts is not None:
        axes |= {axis.axis: axis for axis in split_growth(family.experts, old, *sizes.split)}
    normed = {norm.axis for norm in family.norms.values()}
    for axis in family.axes:
        was, now = old[axis], new[axis]
        if axis in axes:
            continue
        if axis in OUTSIDE:
            axes[axis] = _outside(family, axis, was, now, choices)
        elif axis in family.layers:
            layers = layer_growth(was, now, (layers_at or {}).get(axis), method, axis, family.lenders)
            fed = was != now and any(norm.feeds == axis for norm in family.norms.values())
            axes[axis] = replace(layers, kept=KEPT) if fed else layers
        elif any(axis in attention.key for attention in family.attentions):
            axes[axis] = key_growth(family, axis, was, now, method, choices.rope)
        elif family.experts is not None and axis == family.experts.axis:
            axes[axis] = expert_growth(family, axis, sizes)
        elif axis in normed or axis in family.copied:
            axes[axis] = normed_growth(family, axis, was, now, method)
        else:
            axes[axis] = AxisGrowth(axis, Lift.place(was, range(was), now), method.closed.get(axis, "readers"))
    return Growth((axes[axis] for axis in family.axes), tied=tied, headed=headed)


def expert_growth(family: Family, axis: str, sizes: Sizes) -> AxisGrowth:
    """Copies of all experts, as many more chosen or under a new router; or new ones that a bias keeps out."""
    was, now = sizes.old[axis], sizes.new[axis]
    if was == now or not sizes.blocks:
        assert family.experts is not None
        return _copied_experts(family.experts, was, now, sizes.chosen)
    old, new = was // sizes.blocks, now // sizes.blocks
    places = [expert // old * new + expert % old for expert in range(was)]
    dead = (
        f"{field(family, axis)} {was} -> {now}: the {now - was} new experts have a bias of {BARRED:g} (-65504 in "
        f"float16) before the router chooses, so that no token is sent to them and nothing in them learns"
        + ("" if now % was == 0 else f"; {up(now, was)} are copies, and alive")
    )
    return AxisGrowth(axis, Lift.place(was, places, now), "readers", dead=dead, barred=True)


def _copied_experts(experts: Experts, was: int, now: int, chosen: int | None) -> AxisGrowth:
    """Copies of all experts: each read by a share under the router's own copies, or whole under a new router."""
    dead = ""
    if chosen == 1:
        dead = (
            f"{experts.chosen}=1: weights that add up to one are 1 where there is one of them, whatever the router "
            f"says, so that no gradient ever reaches it; {experts.chosen}=2 is alive"
        )
    copies = Lift.copies(was, now // was)
    return AxisGrowth(experts.axis, copies, heard=was != now and chosen is None, whole=chosen is not None, dead=dead)


def _outside(family: Family, axis: str, old: int, new: int, choices: Choices) -> AxisGrowth:
    """An axis that inputs and outputs index grows at its end."""
    lift = Lift.place(old, range(old), new)
    if axis != "vocab" or old == new or choices.new_tokens == "open":
        return AxisGrowth(axis, lift, "writers")
    dead = (
        f"{field(family, axis)} {old} -> {new}, new tokens closed: the head's bias of {BARRED:g} (-65504 in float16) "
        f"gives them the probability zero, and no step of training is large enough to change it; the first new token "
        f"in the data is a loss of 1e30"
    )
    return AxisGrowth(axis, lift, "writers", dead=dead, barred=True)


def _heads(
    family: Family, attention: Attention, old: Mapping[str, int], new: Mapping[str, int], method: Method
) -> list[AxisGrowth]:
    """The growth of an attention's query heads, key/value heads, and query heads in a group."""
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
    closed = method.closed.get("heads", "readers")
    dead = ""
    if across is not None and new[kv] > old[kv] and None in pairs:
        dead = (
            f"{old[kv]} -> {new[kv]} key/value heads: under one norm over all heads, new queries and keys must both be "
            f"zero, and zero times zero has no gradient; copies ({old[kv] * -(-new[kv] // old[kv])}) are alive"
        )
    out = [AxisGrowth(heads, Lift.rows(old[heads], queries), closed)]
    if kv != heads:
        out.append(AxisGrowth(kv, Lift.rows(old[kv], pairs), method.closed.get("kv_heads", "readers"), dead=dead))
    elif dead:
        out = [replace(out[0], dead=dead)]
    if attention.group is not None:
        group, grown = old[attention.group], new[attention.group]
        if sorted(p for p in pairs if p is not None) != list(range(old[kv])):
            raise RequestError(f"{family.name} stores a group's queries beside its keys: groups cannot be split")
        out.append(AxisGrowth(attention.group, Lift.place(group, range(group), grown), closed))
    return out
