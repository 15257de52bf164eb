"""Which numbers in tensor names count layers or experts, and which are just names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from growformer.algebra import Field, Size
from growformer.drafts.patterns import Axes
from growformer.drafts.probe import Probe
from growformer.drafts.sizes import fit


@dataclass
class Named:
    """Names with index axes in braces.

    Attributes:
        patterns: by pattern name, the disk names that it covers in the base model.
        layers: index axes of layers, in order.
        uneven: pattern names that only some layers have.
    """

    patterns: dict[str, list[str]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)


def _counts(shapes: Iterable[str]) -> dict[str, set[int]]:
    """By the text before a number (numbers before it as #), the numbers that stand there."""
    out: dict[str, set[int]] = {}
    for name in shapes:
        pieces = re.split(r"(?<=\.)(\d+)(?=\.|$)", name)
        before = ""
        for i, piece in enumerate(pieces):
            if i % 2:
                out.setdefault(before, set()).add(int(piece))
                before += "#"
            else:
                before += piece
    return out


def name_patterns(base: Probe, probes: Mapping[str, Probe], axes: Axes, extra: Iterable[str] = ()) -> Named:
    """Names of the base model (and `extra` ones) as patterns; layer axes are added to `axes`."""
    every = {"": base, **probes}
    counts = {p: _counts(probe.shapes) for p, probe in every.items()}
    fulls = {p: probe.full for p, probe in every.items()}
    index: dict[str, str] = {}
    named = Named()
    heads = {(s, a) for a, s in axes.sizes.items() if axes.kinds[a] in ("heads", "kv_heads", "experts")}
    for before, seen in counts[""].items():
        sizes = {p: len(c[before]) if before in c else 0 for p, c in counts.items()}
        size: Size | int | None = fit(sizes, fulls)
        whole = seen == set(range(max(seen) + 1))
        if not isinstance(size, Field) and re.search(r"(layers?|h|blocks?)\.$", before) and "#" not in before:
            # Only some layers are seen under this name, or the field is none that could be changed.
            size = next((s for s in (fit({p: max(c.get(before, {0})) + 1 for p, c in counts.items()}, fulls),)), None)
            whole = isinstance(size, Field)
        if not whole or not isinstance(size, Field):
            continue
        own = next((a for s, a in heads if s == size and "#" in before), "")
        if not own:
            kind = "layer"
            if "#" in before:
                kind = "experts" if "expert" in before else "index"
            elif "decoder" in before and any("encoder" in b for b in counts[""]):
                kind = "decoder_layer"
            own = axes.name(kind, size)
        if "#" not in before and own not in named.layers:
            named.layers.append(own)
        index[before] = own
    groups: dict[str, list[str]] = {}
    for name in [*base.shapes, *extra]:
        pieces = re.split(r"(?<=\.)(\d+)(?=\.|$)", name)
        before, text = "", ""
        for i, piece in enumerate(pieces):
            if i % 2:
                text += f"{{{index[before]}}}" if before in index else piece
                before += "#"
            else:
                before, text = before + piece, text + piece
        groups.setdefault(text, []).append(name)
    for text, names in groups.items():
        layered = [a for a in named.layers if f"{{{a}}}" in text]
        full = {before for before, axis in index.items() if layered and axis == layered[0]}
        of = {int(m[1]) for n in names for b in full if (m := re.match(re.escape(b) + r"(\d+)\.", n))}
        # Where another config has it in other layers, it is not block 0's own.
        rest = {n for p in probes.values() for n in p.shapes}
        of |= {i for i in range(1, 99) for b in full if of == {0} and names[0].replace(f"{b}0.", f"{b}{i}.", 1) in rest}
        most = max((len(counts[""].get(b, ())) for b in full), default=0)
        if layered and of and len(of) < most:
            if of == {0}:
                named.patterns[names[0]] = names
                continue
            named.uneven.append(text)
        named.patterns[text] = names
    return named
