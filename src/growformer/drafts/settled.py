"""What a draft says cannot grow: sizes that its patterns do not explain, or that the class takes only together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from growformer.algebra import WILD, Family, Field, Frozen, TensorPattern, Times
from growformer.algebra.sizes import fields_of
from growformer.drafts.probe import Probe
from growformer.errors import GrowformerError
from growformer.planning.cover import stored_dims
from growformer.planning.sizes import size_of

JOINT = "+"
"""Stands between the fields of a probe that changed several."""


def frozen(family: Family, base: Probe, probes: Mapping[str, Probe]) -> tuple[Frozen, ...]:
    """The axes of a draft that the probes say it cannot grow, each with the reason.

    Args:
        family: the draft so far.
        base: the unchanged model.
        probes: by the field that was changed (several: joined by JOINT), the model that came of it.
    """
    found: dict[str, str] = {}
    for name in (n for n in probes if JOINT in n):
        for part in name.split(JOINT):
            if part not in probes:
                said = f"the class takes another {part} only with another {' or '.join(_partners(part, probes))}"
                found |= {axis: said for axis in sized_by(family, part) if axis not in found}
    found = unexplained(family, base, probes) | found
    found |= dict.fromkeys(_outputs(family), "it is an output of the model, and nothing reads it")
    loose = next(_loose(base), "") if "hidden" not in found else ""
    if loose and "hidden" in family.axes:
        found["hidden"] = loose
    grouped: dict[str, list[str]] = {}
    for axis, reason in found.items():
        grouped.setdefault(reason, []).append(axis)
    return tuple(Frozen(tuple(axes), reason, ordered=reason == loose) for reason, axes in grouped.items())


def _outputs(family: Family) -> list[str]:
    """Axes with fields of their own that the tensors of some class write and those of none read."""
    stands: dict[str, set[str]] = {}
    for text in family.tasks.values():
        for atom in TensorPattern.parse(text).atoms():
            stands.setdefault(str(atom.axis), set()).add(atom.stand)
    inside = {axis for text in family.tensors.values() for axis in TensorPattern.parse(text).axes()}
    fields = {a: fields_of(s) for a, s in family.axes.items()}
    shared = {a for a in fields if any(fields[a] & other for b, other in fields.items() if b != a)}
    return [a for a, stand in stands.items() if stand == {"write"} and a in fields and a not in {*inside, *shared}]


def unexplained(family: Family, base: Probe, probes: Mapping[str, Probe]) -> dict[str, str]:
    """By axis, where a probe of the field that sizes it has a tensor of another shape than its pattern says."""
    found: dict[str, str] = {}
    for name, probe in probes.items():
        axes = [] if JOINT in name else [a for a in sized_by(family, name) if a not in family.layers]
        odd = next(_odd(family, base, probe), "") if axes else ""
        if odd:
            found |= dict.fromkeys(axes, f"with another {name}, {odd}")
    return found


def blanked(text: str, axes: re.Pattern[str]) -> str:
    """A pattern's text with every dim that names one of the axes left as the checkpoint has it."""
    role, _, rest = text.partition(": ") if re.match(r"\w+: [*+-]", text) else ("", "", text)
    if not axes.search(rest):
        return text
    dims, depth, word = [], 0, ""
    for c in f"{rest} ":
        depth += (c in "([") - (c in ")]")
        if c == " " and not depth:
            dims.append(re.sub(r"^\[.*\]$", f"[{WILD}]", word) if axes.search(word) and word[0] == "[" else word)
            if axes.search(dims[-1]):
                dims[-1] = WILD
            word = ""
        else:
            word += c
    sign = dims[0] if dims[0] in "*+" else ""
    if sign:  # a gain of what is not named is a vector like any other
        return f"-> {' '.join(dims[1:])}"
    return " ".join(dims) if not role else f"{role}: {' '.join(dims)}"


def sized_by(family: Family, name: str) -> list[str]:
    """The axes that a request for a config field grows first."""
    out = []
    for axis, size in family.axes.items():
        named = size.name if isinstance(size, Field) else size.times if isinstance(size, Times) else ""
        if named == name:
            out.append(axis)
    return out


def _partners(part: str, probes: Mapping[str, Probe]) -> list[str]:
    pairs = [name.split(JOINT) for name in probes if JOINT in name]
    return [*dict.fromkeys(other for pair in pairs if part in pair for other in pair if other != part)]


def _odd(family: Family, base: Probe, probe: Probe) -> Iterator[str]:
    """Tensors of a probe that have other shapes than their patterns say."""
    here = family.of(probe.full)
    for disk, shape in probe.shapes.items():
        try:
            name, pattern, _ = here.find(disk)
            dims = stored_dims(name, pattern)
            was = base.shapes.get(disk)
            sides = enumerate(zip(dims, shape, strict=True))
            wanted = [_size(here, dim, probe.full, was[k] if was else n) for k, (dim, n) in sides]
        except (GrowformerError, KeyError, TypeError, IndexError, ValueError):
            continue
        if wanted != list(shape):
            yield f"{name.text} is {list(shape)}, which {pattern.text!r} does not say"


def _size(family: Family, dim: Any, full: Mapping[str, Any], fixed: int) -> int:
    if dim.atom is not None and dim.atom.axis == WILD:
        return fixed
    return int(dim.size(lambda a: a.axis if isinstance(a.axis, int) else size_of(family.axes[a.axis], full)))


def _loose(base: Probe) -> Iterator[str]:
    """Numbers that no tensor stores, added to the stream channel by channel: its channels have an order."""
    if base.trace is None or base.model is None:
        return
    stored = set(base.model.state_dict())  # a shared tensor by all its names
    streams = {node.root for dim in base.trace.residual for node in dim}
    for dim, *sides in base.trace.sides:
        # A mask on a table of biases is no part of the stream.
        if any(node.root in streams for node in dim) and any(not past & stored for past in sides):
            yield "numbers that no tensor stores are added to the stream, channel by channel"
