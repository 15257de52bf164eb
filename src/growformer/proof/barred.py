"""New channels that a softmax or a top-k over their axis never chooses: what their bias must be, and what else holds.

Such a channel may hold anything: its share of the softmax is zero, and no token is sent to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from growformer.algebra.facts import Experts
from growformer.algebra.family import Family
from growformer.algebra.pattern import ODDS
from growformer.algebra.sizes import lookup
from growformer.proof.axes import NONE, Axis
from growformer.proof.layers import Placed
from growformer.proof.places import Places
from growformer.proof.reading import Tensors

LEVEL = -1e30
"""The highest bias that bars a channel. Logits are some hundreds at most, and exp(-110) is 0 in float32."""


def level(dtype: torch.dtype) -> float:
    """What of `LEVEL` a storage dtype holds: float16 ends before it, at -65504."""
    return float(torch.tensor(max(LEVEL, torch.finfo(dtype).min), dtype=torch.float64).to(dtype))


def check_bias(axes: Mapping[str, Axis], tensor: Placed, dims: Sequence[Places], target: Tensors) -> str:
    """What is wrong with a bias on what is chosen; empty where nothing is, or where it bars none.

    Args:
        axes: as the receipt tells them.
        tensor: a tensor that comes from one of the source.
        dims: what its dims must hold.
        target: the grown tensors.
    """
    for dim, places in zip(tensor.dims, dims, strict=True):
        atom = dim.atom
        if atom is None or atom.role != ODDS or not axes[str(atom.axis)].barred:
            continue
        most = level(target.dtype(tensor.name))
        found = target.read(tensor.name).movedim(tensor.dims.index(dim), -1).reshape(-1, places.new).double()
        bad = ~(found <= most).all(0) & (places.source == NONE)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            return (
                f"{tensor.name}: found {float(found[:, i].max())!r} for new channel {i} of {atom.axis}; required "
                f"{most!r} or less, for nothing may choose it"
            )
    return ""


def lacking(family: Family, axis: Axis, old: Mapping[str, Placed]) -> list[str]:
    """The parts of a model that choose among the channels of a barred axis, and have no bias that could bar any."""
    parts: dict[tuple[tuple[str, int], ...], bool] = {}
    names = {name.text for name in family.odds(axis.name)}
    for tensor in old.values():
        if axis.name in (*tensor.at.axes, *tensor.pattern.axes()):
            part = tuple((at, i) for at, i in tensor.index.items() if at in family.layers)
            parts[part] = parts.get(part, False) or tensor.at.text in names
    said = {part: ", ".join(f"{at} {i}" for at, i in part) or "the model" for part, has in parts.items() if not has}
    return [f"axis {axis.name}: {where} has no bias that bars new channels" for where in said.values()]


def check_groups(experts: Experts, axis: Axis, target: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    """Whether barred experts leave every old group together and apart from the others, and chosen as it was.

    A group's score is that of its best experts, so a barred one among them changes nothing, unless more are chosen
    than there are old ones.
    """
    chosen, *groups = (lookup(full, name) for name in (experts.chosen, *experts.groups))
    all_groups, taken = groups or (1, 1)
    now = lookup(target, experts.groups[0]) if experts.groups else 1
    if not all(isinstance(n, int) and n > 0 for n in (chosen, all_groups, taken, now)):
        return [f"axis {axis.name}: config fields {experts.chosen}, {', '.join(experts.groups)} should be numbers"]
    if axis.old % all_groups or axis.new % now:
        return [f"axis {axis.name}: {axis.old} in {all_groups} groups, {axis.new} in {now}; they must divide"]
    size, wide = axis.old // all_groups, axis.new // now
    if chosen > size * taken:
        return [f"axis {axis.name}: {chosen} of {size * taken} old experts are chosen, and barred ones with them"]
    into: dict[int, set[int]] = {}
    for place, source in enumerate(axis.source.tolist()):
        if source != NONE:
            into.setdefault(source // size, set()).add(place // wide)
    if any(len(places) > 1 for places in into.values()) or len(set().union(*into.values())) != len(into):
        return [f"axis {axis.name}: old groups of {size} are torn apart or put together among new groups of {wide}"]
    return []
