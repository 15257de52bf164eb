"""From old and new sizes to the growth of every axis: which lift, which side closed, which rescale."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from growformer.algebra import (
    BARRED,
    GATE,
    HALVES,
    ONE,
    OUTSIDE,
    Experts,
    Factor,
    Family,
    Lift,
    Method,
    Run,
    Side,
    Way,
    copies,
)
from growformer.algebra.lift import merged
from growformer.errors import RequestError
from growformer.planning.choices import Choices
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.heads import heads_growth, paired_inside
from growformer.planning.migrate import KEPT
from growformer.planning.moves import Refused, field, up
from growformer.planning.picks import Pick, copied_growth, picker, stacked_growth, way_of
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
    way: Way,
    axis: str = "layer",
    barred: Collection[int] = (),
) -> AxisGrowth:
    """The growth of the layer axis, new layers at the target places `at`.

    Raises:
        RequestError: where the places are not as many as the new layers, repeat, are out of range, or behind a layer
            that no new one may follow.
    """
    if way.lift == "copies" and new > old:
        return stacked_growth(old, new, at, way, axis, barred)
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
    donors = tuple(like) if way.fill == "copy" else ()
    closed: Side = "pairs" if way.closed == "pairs" and new > old else "readers"
    fades = bool(way.behind) and new > old
    return AxisGrowth(axis, Lift.rows(old, sources), closed, like=tuple(like), donors=donors, fades=fades)


def normed_growth(family: Family, axis: str, old: int, new: int, way: Way, pick: Pick | None = None) -> AxisGrowth:
    """The growth of an axis that a norm reads, the residual stream first of all: a lift its norm cannot see.

    New channels that nothing writes under an RMSNorm, that carry the mean under a LayerNorm, or whole copies (design,
    section 3).
    """
    if old == new:
        return AxisGrowth(axis, Lift.identity(old), "writers")
    # The values of a head have no say: whether a norm reads them is the family's, and a method knows no norms.
    if family.attention_of(axis) is None and way.lift == "new" and way.closed != "writers":
        raise RequestError(f"a norm reads {axis}, so it can only be closed at its writers")
    if way.behind:
        raise RequestError(f"a norm reads {axis}, which would see new channels fade in; say KIND=paper for it")
    if axis in family.copied or way.lift == "copies":
        split = way.split if way.lift == "copies" else HALVES
        if new % old:
            name = field(family, axis) or axis
            raise Refused(
                f"{name}={new}: a norm reads {axis}, so only whole copies of its channels are exact; "
                f"{name}={up(new, old)} is the next",
                {name: up(new, old)},
            )
        lift = copies(old, [*range(old)] * (new // old), split)
        return copied_growth(axis, lift, "writers", way if way.lift == "copies" else Way(split=split))
    norms = [norm for norm in family.norms.values() if norm.axis == axis]
    # One eps that stands in the code, or serves norms over several axes, cannot be rescaled; the stream is.
    summed = all(norm.kind == "sum" for norm in norms)
    scale = Factor.sqrt(new, old) if not summed and any(family.fixed_eps(norm) for norm in norms) else ONE
    grown = stream_growth(axis, old, new, mean=any(norm.kind == "layer" for norm in norms), scale=scale)
    grown = replace(grown, summed=summed)
    return grown if way.fill == "normal" or pick is None else replace(grown, donors=tuple(pick(axis, old, new - old)))


def stream_growth(axis: str, old: int, new: int, *, mean: bool, scale: Factor = ONE) -> AxisGrowth:
    """[I; 0], or [I; mean], closed at the writers."""
    if old == new:
        return AxisGrowth(axis, Lift.identity(old), "writers")
    tail = Run(new - old, 0, back=None, mean=old) if mean else Run(new - old, None, back=None)
    return AxisGrowth(axis, Lift(old, (Run(old, 0), tail)), "writers", scale)


def key_growth(
    family: Family, axis: str, old: int, new: int, way: Way, rope: str = "theta", pick: Pick | None = None
) -> AxisGrowth:
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
    places = list(range(old)) if whole is None else pair_places(old, new, whole.layout, strided=rope == "strided")
    norm = family.norm_over(axis) or family.norm_across(axis)
    if old == new:
        return AxisGrowth(axis, Lift.identity(old), "readers")
    if way.lift == "copies" or way.closed == "pairs":
        if norm is not None or rotary is not None:
            said = "a norm reads" if norm is not None else "rotary positions turn"
            raise RequestError(
                f"{field(family, axis) or axis} {old} -> {new}: {said} queries and keys, so that their channels have "
                f"no copies; key=paper works"
            )
        return plain_growth(axis, old, new, way, pick)
    if norm is None:
        donors = tuple(pick(axis, old, new - old)) if way.fill == "copy" and pick is not None else ()
        return AxisGrowth(axis, Lift.place(old, places, new), way.closed, donors=donors, fades=bool(way.behind))
    if way.behind:
        raise RequestError(
            f"{field(family, axis) or axis} {old} -> {new}: a norm reads queries and keys, and would see new channels "
            f"fade in; key=paper works"
        )
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


def plain_growth(axis: str, old: int, new: int, way: Way, pick: Pick | None = None) -> AxisGrowth:
    """The growth of an axis between linear maps that nothing else reads, old channels first."""
    if old == new or not old or pick is None:
        return AxisGrowth(axis, Lift.place(old, range(old), new), "readers" if way.closed == "pairs" else way.closed)
    donors = pick(axis, old, new - old)
    if way.lift == "copies":
        lift = copies(old, [*range(old), *donors], way.split)
        return copied_growth(axis, lift, "readers", way)
    if way.closed == "pairs":
        half, odd = divmod(new - old, 2)
        runs = (Run(old, 0), Run(half, None, back=None), Run(half, None, back=None, mirror=half))
        return AxisGrowth(axis, Lift(old, tuple(merged([*runs, Run(odd, None, back=None)]))), "pairs")
    start = tuple(donors) if way.fill == "copy" else ()
    lift = Lift.place(old, range(old), new)
    grown = AxisGrowth(axis, lift, way.closed, donors=start, fades=bool(way.behind))
    return replace(grown, learned="readers") if way.fill == "gradient" else grown


def _check_gates(family: Family, axis: str, way: Way) -> None:
    """Refuse to close units where they are written, if what gates them stands in the same rows."""
    mixed = any(
        atom.axis == axis and GATE in {part.role for part in dim.atoms() if isinstance(part.axis, int)}
        for _, pattern in family.patterns
        for dim in pattern.dims
        for atom in dim.atoms()
    )
    if way.lift == "new" and way.closed == "writers" and mixed:
        raise RequestError(
            f"{family.name} keeps a unit's gate beside it in one tensor's rows: closed where they are written, both "
            f"would be zero, and zero times zero has no gradient; mlp=paper works"
        )


def resolve_growth(
    family: Family,
    sizes: Sizes,
    method: Method,
    *,
    tied: bool,
    headed: bool = True,
    layers_at: Mapping[str, Sequence[int]] | None = None,
    choices: Choices | None = None,
    seed: int = 0,
) -> Growth:
    """The growth of every axis of a family whose sizes are the same in all layers.

    Raises:
        RequestError: an axis that the method cannot grow, or not exactly.
    """
    choices = choices or Choices()
    old, new = sizes.old, sizes.new
    picks = {axis: picker(method, family, axis, seed) for axis in family.axes}
    axes: dict[str, AxisGrowth] = {}
    for attention in family.attentions:
        mine = [a for a in (attention.heads, attention.kv_heads) if a is not None]
        way = way_of(method, family, mine[0]) if any(old[a] != new[a] for a in mine) else Way()
        axes |= {a.axis: a for a in heads_growth(family, attention, old, new, way, picks[mine[0]])}
    if sizes.split is not None and family.experts is not None:
        axes |= {axis.axis: axis for axis in split_growth(family.experts, old, *sizes.split)}
    normed = {norm.axis for norm in family.norms.values()}
    for axis in family.axes:
        was, now = old[axis], new[axis]
        if axis in axes:
            continue
        way = way_of(method, family, axis) if was != now else Way()
        if axis in OUTSIDE:
            axes[axis] = _outside(family, axis, was, now, choices)
        elif axis in family.layers:
            layers = layer_growth(was, now, (layers_at or {}).get(axis), way, axis, family.lenders)
            fed = was != now and any(norm.feeds == axis for norm in family.norms.values()) and not layers.changes
            axes[axis] = replace(layers, kept=KEPT) if fed else layers
        elif any(axis in attention.key for attention in family.attentions):
            axes[axis] = key_growth(family, axis, was, now, way, choices.rope, picks[axis])
        elif family.experts is not None and axis == family.experts.axis:
            axes[axis] = expert_growth(family, axis, sizes)
        elif axis in normed or axis in family.copied:
            axes[axis] = normed_growth(family, axis, was, now, way, picks[axis])
        else:
            _check_gates(family, axis, way)
            axes[axis] = plain_growth(axis, was, now, way, picks[axis])
    inside = paired_inside(family, new) if any(axes[layer].closed == "pairs" for layer in family.layers) else {}
    return Growth((axes[axis] for axis in family.axes), tied=tied, headed=headed, inside=inside)


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
    heard = was != now and chosen is None
    lift = copies(was, [*range(was)] * (now // was), HALVES) if heard else Lift.copies(was, now // was)
    return AxisGrowth(experts.axis, lift, heard=heard, whole=chosen is not None, dead=dead)


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
