"""New layers where a norm stands on the stream: the norm before a new layer gives it its gain and shift.

A new layer adds nothing to the stream and normalises it all the same. So the norm before it keeps a constant gain K and
no shift, and so do the norms inside it; its last norm has the gain and shift that the stream had before. A vector that
is normalised already passes a norm as it is, up to that norm's eps: this is all that changes (families.md of the
design calls it affine migration).

With v the variance of a token's vector before the first of these norms, e = eps / v, d = eps / K^2 and m norms that
follow, what reads the stream gets it times

    sqrt((1 + e) / (1 + d + ... + d^(m-1) + d^m (1 + e)))  =  1 + eps/2 (1/v - 1/K^2) + O(eps^2)

whatever m is: new layers in a row add nothing to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growformer.algebra import ONE, Factor, Family, Field, NamePattern, Norm, lookup
from growformer.planning.growth import Growth

KEPT = ONE
"""The gain K that norms keep which gave theirs away.

One is what a fresh LayerNorm has, so that a new layer reads a stream of unit variance, as large as its branches expect
it and as what they will add to it; nothing rounds in any dtype; and the error, eps/2 |1 - 1/v|, needs no variance to be
known: it is at most eps/2 max(1, 1/v). A large K comes to eps / (2 v), smaller where v > 2 only, and a branch would
have to be K times as large to count.
"""

Place = tuple[str, tuple[int, ...]]
"""A tensor by the text of its name pattern and its index."""


@dataclass(frozen=True)
class Chain:
    """The norms on the stream of one axis of layers, for one of gain and shift.

    Attributes:
        ends: the name of those that end the layers.
        before: of the one before the first layer; None where nothing normalises what that reads.
        inner: of the others inside the layers.
    """

    ends: NamePattern
    before: NamePattern | None
    inner: tuple[NamePattern, ...]


def chain(family: Family, axis: str, stand: str) -> Chain | None:
    """The norms on the stream of the layers of `axis`; None where none ends them, or several would.

    Args:
        family: the model family.
        axis: of layers.
        stand: "gain" or "shift".
    """
    ends, before, inner = list[NamePattern](), list[NamePattern](), list[NamePattern]()
    for name, norm in _on_stream(family, stand):
        if axis in name.axes:
            (ends if norm.feeds == axis else inner).append(name)
        elif norm.feeds == axis:
            before.append(name)
    if len(ends) != 1 or len(before) > 1 or any(name.axes != (axis,) for name in (*ends, *inner)):
        return None
    return Chain(ends[0], before[0] if before else None, tuple(inner))


def chained(family: Family, axis: str) -> bool:
    """Whether one norm ends each layer of `axis`, and has a shift if the one before the first layer has."""
    shifts = any(norm.feeds == axis for _, norm in _on_stream(family, "shift"))
    return chain(family, axis, "gain") is not None and (not shifts or chain(family, axis, "shift") is not None)


def stream_norms(family: Family, axis: str) -> list[Norm]:
    """The norms on the stream that stand in the layers of `axis`, or feed them."""
    inside = [norm for name, norm in _on_stream(family, "gain") if axis in name.axes]
    return [*inside, *(norm for norm in family.norms.values() if norm.feeds == axis and norm not in inside)]


def _on_stream(family: Family, stand: str) -> Iterator[tuple[NamePattern, Norm]]:
    for name, pattern in family.patterns:
        for atom in pattern.atoms():
            norm = family.norms.get(atom.role or "")
            if atom.stand == stand and norm is not None and norm.output == "stream":
                yield name, norm


def holders(sources: Sequence[int | None]) -> dict[int, int | None]:
    """Whose gain and shift stand after each target layer (-1: before the first); None: a new layer comes next.

    Args:
        sources: for each target layer, the source layer or None.
    """
    out: dict[int, int | None] = {}
    held = -1
    for place in range(-1, len(sources)):
        source = sources[place] if place >= 0 else None
        held = held if source is None else source
        out[place] = None if place + 1 < len(sources) and sources[place + 1] is None else held
    return out


def moves(family: Family, growth: Growth) -> dict[Place, Place | Factor]:
    """The target tensors whose gain or shift comes from elsewhere than their index says, with the source's tensor.

    A factor: they come from nowhere, and have this gain, or no shift.
    """
    out: dict[Place, Place | Factor] = {}
    for axis in [axis for axis in family.layers if any(norm.feeds == axis for norm in family.norms.values())]:
        layers = growth.at(axis)
        for stand in ("gain", "shift") if layers.kept is not None else ():
            found = chain(family, axis, stand)
            if found is None or layers.kept is None:
                continue
            for place, source in holders(layers.sources).items():
                target = _at(found, place)
                own = layers.sources[place] if place >= 0 else -1
                if target is not None and (source is None or source != own):
                    given = None if source is None else _at(found, source)
                    out[target] = layers.kept if given is None else given
            new = [place for place, source in enumerate(layers.sources) if source is None]
            out |= {(name.text, (place,)): layers.kept for name in found.inner for place in new}
    return out


def _at(found: Chain, place: int) -> Place | None:
    if place >= 0:
        return found.ends.text, (place,)
    return None if found.before is None else (found.before.text, ())


def within_eps(family: Family, growth: Growth, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is exact only up to eps, with the formula of the bound: one sentence for each axis of layers."""
    out = []
    for axis in family.layers:
        layers = growth.at(axis)
        if layers.kept is None:
            continue
        pairs = zip(layers.sources, layers.sources[1:], strict=False)
        after = [str(old) for old, following in pairs if following is None and old is not None]
        where = ["before the first layer"] * (layers.sources[0] is None)
        where += [f"after the source's layer{'s' * (len(after) > 1)} {', '.join(after)}"] * bool(after)
        eps = stream_norms(family, axis)[0].eps
        value = lookup(config, eps) if isinstance(eps, str) else eps
        size = family.axes[axis]
        name = size.name if isinstance(size, Field) else axis
        out.append(
            f"{name} {layers.old} -> {layers.new}: the norm before new layers ({' and '.join(where)}) hands them its "
            f"gain and shift, and keeps gain K = {layers.kept}. A token whose vector has variance v before that norm "
            f"comes out times sqrt((1 + eps/v) / (1 + eps/K^2)), so off by eps/2 x |1/v - 1/K^2| of itself, with eps = "
            f"{value}; the proof measures v, and bounds what this does to the outputs"
        )
    return tuple(out)
