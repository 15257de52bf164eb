"""What a method picks: its way for an axis, the old channels that new ones copy, the layers that stand again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from growformer.algebra import OUTSIDE, Family, Kind, Lift, Method, Order, Side, Way
from growformer.algebra.fill import numbers
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth
from growformer.planning.moves import called, field, up

Pick = Callable[[str, int, int], list[int]]
"""Of an axis, its old size and a count: as many old channels, for new ones to be like."""


def kind_of(family: Family, axis: str) -> Kind | None:
    """Which of a method's ways an axis grows by; None: its recipe is the same under every method."""
    attention = family.attention_of(axis)
    if axis in family.streams:
        return "hidden"
    if axis in family.layers:
        return "layer"
    if attention is not None:
        return "key" if axis in attention.key else "value" if axis == attention.value else "heads"
    outside = axis in OUTSIDE or (family.experts is not None and axis == family.experts.axis)
    return None if outside or axis in family.copied or family.norm_over(axis) is not None else "mlp"


def way_of(method: Method, family: Family, axis: str) -> Way:
    """The way in which a method grows an axis.

    Raises:
        RequestError: it has none; the message says what to add.
    """
    kind = kind_of(family, axis)
    if kind is None:
        return Way(closed="writers")
    if kind not in method.ways:
        name = field(family, axis) or f"the {called(axis)}"
        why = method.cannot.get(kind, "says nothing of that")
        raise RequestError(
            f"{name} would grow {axis}, and {method.name} ({method.source}) {why}; it grows "
            f"{', '.join(method.ways)}; --method {method.name},{kind}=paper grows the rest as the paper does"
        )
    return method.ways[kind]


def cycle(axis: str, old: int, count: int) -> list[int]:
    """The old channels from the first on, over and over."""
    return [j % old for j in range(count)]


def picker(method: Method, family: Family, axis: str, seed: int) -> Pick:
    """How a method picks old channels of an axis: from the first on, over and over, or at random."""
    kind = kind_of(family, axis)
    way = method.ways.get(kind) if kind is not None else None

    def drawn(name: str, old: int, count: int) -> list[int]:
        return [int(n) * old >> 16 for n in numbers(seed, f"copies of {name}", (old, count), 0, count)]

    return drawn if way is not None and way.order == "random" else cycle


def copied_growth(axis: str, lift: Lift, closed: Side, way: Way) -> AxisGrowth:
    """Copies that are all read, each by its share of what read the old channel."""
    said = f"{axis} {lift.old} -> {lift.new}: what writes the copies comes from the next layer" if way.ahead else ""
    made = AxisGrowth(axis, lift, closed, heard=True, shares=way.split, ahead=way.ahead, changes=said)
    return _learned(made) if way.fill == "gradient" else made


def _learned(growth: AxisGrowth) -> AxisGrowth:
    """The growth, as the beginning of one that is learned."""
    said = f"{growth.axis} {growth.old} -> {growth.new}: the lift is learned, and starts as copies"
    return replace(growth, learned="lift", changes=said)


def stacked_growth(
    old: int, new: int, at: Sequence[int] | None, way: Way, axis: str, barred: Collection[int] = ()
) -> AxisGrowth:
    """Whole layers again, in the order of the method: the function changes.

    Raises:
        RequestError: no such stack has that many layers, or layers would be placed.
    """
    if at is not None:
        raise RequestError("this method says where copies of layers stand; leave out where new layers go")
    if barred:
        raise RequestError("the last layers take keys and values from others, which copies of layers would tear apart")
    sources = _ORDERS[way.order](old, new)
    changes = f"{axis} {old} -> {new}: whole layers stand again ({', '.join(map(str, sources))}), and compute again"
    made = AxisGrowth(axis, Lift.rows(old, sources), "readers", like=tuple(sources), changes=changes)
    return _learned(made) if way.fill == "gradient" else made


def _stack(old: int, new: int) -> list[int]:
    """The model on top of itself, g times over (G_stack, arXiv 2405.15319)."""
    if new % old:
        raise RequestError(f"{new} layers are no multiple of {old}: the whole model is stacked; {up(new, old)} works")
    return [*range(old)] * (new // old)


def _each(old: int, new: int) -> list[int]:
    """Every layer behind itself, the first ones once more where the number is no multiple."""
    times, more = divmod(new, old)
    return [layer for layer in range(old) for _ in range(times + (layer < more))]


def _middle(old: int, new: int) -> list[int]:
    """The middle block again (MIDAS, arXiv 2409.19044, section 3)."""
    block = new - old
    if block > old:
        raise RequestError(
            f"{old} -> {new} layers: the middle {block} of {old} layers would be copied; at most {2 * old}"
        )
    start = (old - block + 1) // 2
    return [*range(start + block), *range(start, old)]


def _overlap(old: int, new: int) -> list[int]:
    """Two copies, of which the first lacks its last layers and the second its first (SOLAR, arXiv 2312.15166)."""
    less = 2 * old - new
    if less < 0 or less % 2:
        raise RequestError(
            f"{old} -> {new} layers: two copies of {old} layers, less as many at the seam of each, make an even number "
            f"of layers up to {2 * old}; {min(new + new % 2, 2 * old)} works"
        )
    return [*range(old - less // 2), *range(less // 2, old)]


_ORDERS: dict[Order, Callable[[int, int], list[int]]] = {
    "stack": _stack,
    "each": _each,
    "middle": _middle,
    "overlap": _overlap,
}
