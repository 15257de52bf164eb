"""From how sizes move when single config fields change to the config field, ratio or product that each size is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growformer.algebra import Field, Ratio, Size, Times
from growformer.drafts.nodes import Node
from growformer.drafts.probe import Probe

Seen = dict[str, int]
"""A size in every probe, by the field that was changed ("" for none)."""


class Sizes:
    """The size of every node in every probe.

    Args:
        base: the unchanged model.
        probes: by the field that was changed, the model that came of it.
    """

    def __init__(self, base: Probe, probes: Mapping[str, Probe]) -> None:
        self.fulls: dict[str, Mapping[str, Any]] = {"": base.full, **{k: p.full for k, p in probes.items()}}
        self.seen: dict[Node, Seen] = {}
        assert base.trace is not None
        for name, probe in {"": base, **probes}.items():
            if probe.trace is None:
                continue
            for param, dims in base.trace.params.items():
                others = probe.trace.params.get(param)
                if others is not None and len(others) == len(dims):
                    for a, b in zip(dims, others, strict=True):
                        self._pair(name, a, b)

    def _pair(self, probe: str, a: Sequence[Node], b: Sequence[Node]) -> None:
        if len(a) != len(b):
            return
        for x, y in zip(a, b, strict=True):
            self.seen.setdefault(x.root, {}).setdefault(probe, y.size)
            if x.root.factors and len(x.root.factors) == len(y.root.factors):
                self._pair(probe, x.root.factors, y.root.factors)
            mine, theirs = tiles(x), tiles(y)
            if mine and len(mine) == len(theirs):
                self._pair(probe, mine, theirs)

    def of(self, node: Node) -> Size | int | None:
        """What a node's size is; a number where it never moves; None where nothing fits."""
        return fit(self.seen.get(node.root, {"": node.size}), self.fulls)


def tiles(node: Node) -> list[Node]:
    """The cuts that cover a node without overlap, in order; none where it was not cut so."""
    parts = node.parts or node.root.parts
    out: list[Node] = []
    at = 0
    while at < node.size:
        # The longest first: finer cuts are inside.
        stops = sorted((stop for start, stop in parts if start == at), reverse=True)
        if not stops:
            return []
        out.append(parts[at, stops[0]])
        at = stops[0]
    return out


def fit(seen: Seen, fulls: Mapping[str, Mapping[str, Any]]) -> Size | int | None:
    """The simplest size that has the seen values: a field, a ratio of fields, a multiple, a product."""
    base = seen.get("", 0)
    if all(value == base for value in seen.values()):
        return base
    # A probe may have changed several fields, its name says which.
    moved = [name for name in seen if name and seen[name] != base]
    own = [*dict.fromkeys(name for names in moved for name in names.split("+"))]
    for name in own:
        told = {p: fulls[p].get(name) for p in seen}
        if all(seen[p] == v for p, v in told.items()):
            return Field(name)
        if name in seen and seen[name] == told[name] and all(v is None or v == seen[p] for p, v in told.items()):
            rest = fit({p: seen[p] for p, v in told.items() if v is None}, fulls)
            if isinstance(rest, (Field, Ratio, Times)):
                return Field(name, default=rest)
    for over, by in ((a, b) for a in own for b in own if a != b):
        if _all(seen, fulls, lambda full, a=over, b=by: full[a] // full[b]):
            return Ratio(over, by)
    for name in own:
        value: Any = fulls[""].get(name)
        whole = isinstance(value, int) and value and base % value == 0 and base != value
        if whole and _all(seen, fulls, lambda full, a=name, n=base // value: n * full[a]):
            return Times(base // value, name)
    counts = sorted(own, key=lambda name: name.endswith(("size", "dim", "width")))
    for first, second in ((a, b) for i, a in enumerate(counts) for b in counts[i + 1 :]):
        if _all(seen, fulls, lambda full, a=first, b=second: full[a] * full[b]):
            return Times(first, second)
    return None


def _all(seen: Seen, fulls: Mapping[str, Mapping[str, Any]], value: Any) -> bool:
    try:
        return all(seen[p] == value(fulls[p]) for p in seen)
    except (TypeError, ZeroDivisionError, KeyError):
        return False
