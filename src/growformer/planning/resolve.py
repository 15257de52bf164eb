"""From old and new sizes to the growth of every axis: which lift, which side closed, which rescale."""

from __future__ import annotations

from collections.abc import Sequence

from growformer.algebra import ONE, Factor, Family, Lift, Method, Norm, Run
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.sizes import FIXED, Sizes


def spread(old: int, new: int) -> list[int]:
    """Target places of the new layers when nobody places them: evenly, each after an old one."""
    extra = new - old
    after = [((j + 1) * old + extra - 1) // extra - 1 for j in range(extra)]
    return [layer + 1 + j for j, layer in enumerate(after)]


def layer_growth(old: int, new: int, at: Sequence[int] | None, method: Method) -> AxisGrowth:
    """The growth of the layer axis, new layers at the target places `at`.

    Raises:
        RequestError: where the places are not as many as the new layers, repeat, or are out of range.
    """
    places = spread(old, new) if at is None and new > old else list(at or ())
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
        taken += place not in places
        like.append(max(taken - 1, 0))
    return AxisGrowth("layer", Lift.rows(old, sources), method.closed["layer"], like=tuple(like))


def hidden_growth(axis: str, old: int, new: int, norm: Norm | None, shared_eps: bool, method: Method) -> AxisGrowth:
    """The growth of the residual stream: a lift its norm cannot see (design, section 3)."""
    if old == new:
        return AxisGrowth(axis, Lift.identity(old), "writers")
    if method.closed[axis] != "writers":
        raise RequestError(f"a norm reads {axis}, so it can only be closed at its writers")
    layer_norm = norm is not None and norm.kind == "layer"
    tail = Run(new - old, 0, back=None, mean=old) if layer_norm else Run(new - old, None, back=None)
    # One eps field for norms over several axes cannot be rescaled for one of them; the stream is, and eps stays.
    scale = Factor.sqrt(new, old) if shared_eps else ONE
    return AxisGrowth(axis, Lift(old, (Run(old, 0), tail)), "writers", scale)


def pair_places(old: int, new: int) -> list[int]:
    """Where the old channels of a rotary head go: pair i stays pair i, and channel i turns with i + new/2."""
    return [i if i < old // 2 else i - old // 2 + new // 2 for i in range(old)]


def key_growth(family: Family, old: int, new: int, method: Method) -> AxisGrowth:
    """The growth of the key axis.

    Under a norm over each head the new channels are copies of old ones at new rotary pairs, closed at the key's gain:
    channel i's n_i copies carry sqrt((m-1)/n_i), m = new // old, so that every channel weighs the same and the norm
    sees nothing. Below twice the size only zeros are exact, and zero queries on zero keys never move.
    """
    rotary = family.attention.rotary is not None
    places = pair_places(old, new) if rotary else list(range(old))
    if old == new or family.norm_over("key") is None:
        return AxisGrowth("key", Lift.place(old, places, new), method.closed["key"])
    times = new // old
    sources: list[int | None] = [None] * new
    for i, place in enumerate(places):
        sources[place] = i
    if times < 2:
        scale = Factor.sqrt(new, old)
        dead = (
            f"head_dim {old} -> {new}: under a norm over each head, new query and key rows below twice the size must "
            f"all be zero, and zero times zero has no gradient; head_dim={2 * old} is alive"
        )
        return AxisGrowth("key", Lift.rows(old, sources), "writers", scale, dead=dead)
    half = new // 2 if rotary else new
    turn = old // 2 if rotary else old
    for pair in range(turn, half):
        sources[pair] = pair % turn
        if rotary:
            sources[pair + half] = pair % turn + turn
    copies = [sum(1 for source in sources if source == i) - 1 for i in range(old)]
    weight = {n: ONE if n == times - 1 else Factor.sqrt(times - 1, n) for n in copies}
    kept = set(places)
    runs = tuple(
        Run(1, source) if j in kept else Run(1, source, weight[copies[source]], None)
        for j, source in enumerate(sources)
        if source is not None
    )
    return AxisGrowth("key", Lift(old, runs), "readers", Factor.sqrt(new, old * times))


def head_growth(old: tuple[int, int], new: tuple[int, int]) -> tuple[list[int | None], list[int | None]]:
    """For each new query head and each new key/value head, the old one it is.

    Args:
        old, new: (query heads, key/value heads).

    Query head h reads key/value head h // (heads / kv_heads), so a head keeps its place in its group; where groups get
    smaller, each old key/value head is copied for the groups its query heads are spread over.
    """
    (heads, kv), (new_heads, new_kv) = old, new
    group, new_group = heads // kv, new_heads // new_kv
    copies = -(-group // new_group)
    queries: list[int | None] = [None] * new_heads
    for head in range(heads):
        pair, place = divmod(head, group)
        queries[(pair * copies + place // new_group) * new_group + place % new_group] = head
    return queries, [j // copies if j < kv * copies else None for j in range(new_kv)]


def resolve_growth(
    family: Family, sizes: Sizes, method: Method, *, tied: bool, layers_at: Sequence[int] | None = None
) -> Growth:
    """The growth of every axis of a family whose sizes are the same in all layers."""
    old, new = sizes.old, sizes.new
    axes = []
    for axis in family.axes:
        if axis in FIXED:
            axes.append(AxisGrowth(axis, Lift.identity(old[axis]), "writers"))
        elif axis == family.stream:
            norm = family.norm_over(axis)
            shared = norm is not None and family.shared_eps(norm)
            axes.append(hidden_growth(axis, old[axis], new[axis], norm, shared, method))
        elif axis == "key":
            axes.append(key_growth(family, old[axis], new[axis], method))
        elif axis == family.layer:
            axes.append(layer_growth(old[axis], new[axis], layers_at, method))
        elif axis not in (family.attention.heads, family.attention.kv_heads):
            axes.append(AxisGrowth(axis, Lift.place(old[axis], range(old[axis]), new[axis]), method.closed[axis]))
    heads, kv = family.attention.heads, family.attention.kv_heads or family.attention.heads
    queries, pairs = head_growth((old[heads], old[kv]), (new[heads], new[kv]))
    axes.append(AxisGrowth(heads, Lift.rows(old[heads], queries), method.closed["heads"]))
    if kv != heads:
        axes.append(AxisGrowth(kv, Lift.rows(old[kv], pairs), method.closed["kv_heads"]))
    return Growth(axes, tied=tied)
