"""Experts split: each becomes several, every one of them with a slice of its inner width.

A token that took k experts takes m k. The router's rows are copied, so that each of an expert's m slices is weighed by
1/m of what the expert was; what a slice gives counts m times, and the slices add up to the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growformer.algebra import WILD, Experts, Factor, Family, Field, Lift, Run, Times, lookup
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth
from growformer.planning.moves import Refused, Sizing, field


def taken(family: Family) -> tuple[str, ...]:
    """The config fields that follow from how often every expert is there, and may be asked for beside it."""
    return () if family.experts is None else (family.experts.chosen, *family.experts.groups)


def inner_axes(family: Family) -> list[str]:
    """The axes that an expert has to itself: those of its tensors, the streams aside."""
    experts, found = family.experts, dict[str, None]()
    if experts is None:
        return []
    for name, pattern in family.patterns:
        if experts.axis in name.axes or any(atom.index and atom.axis == experts.axis for atom in pattern.atoms()):
            found |= dict.fromkeys(a.axis for a in pattern.atoms() if isinstance(a.axis, str) and a.axis != WILD)
    return [axis for axis in found if axis != experts.axis and axis not in (*family.streams, *family.layers)]


def split_axis(family: Family, asked: Mapping[str, int], old: Mapping[str, int]) -> str:
    """The axis of experts' inner width that a request makes smaller; "" where it makes none smaller."""
    return next((a for a in inner_axes(family) if asked.get(field(family, a), old[a]) < old[a]), "")


def slices_of(family: Family, config: Mapping[str, Any], asked: Mapping[str, int], old: Mapping[str, int]) -> int:
    """In how many slices a request splits every expert; 1: in none.

    Raises:
        RequestError: it asks for narrower experts, and they are no slices of the source's, or cannot be.
    """
    axis, experts = split_axis(family, asked, old), family.experts
    if not axis or experts is None:
        return 1
    name, count = field(family, axis), field(family, experts.axis)
    width, was = old[axis], old[experts.axis]
    new, now = asked[name], asked.get(count, was)
    said = f"{name}={new} is smaller than the source's {width}"
    _check_split(family, config, axis, said, f"{count}={2 * was}")
    if now == was:
        near = min((n for n in range(1, width) if width % n == 0), key=lambda n: (abs(n - new), n))
        raise Refused(
            f"{said}; an expert gets narrower only where it is split into slices, {count} and what a token takes of "
            f"them as many times more",
            {name: near, count: was * (width // near)},
        )
    repairs = [{count: was * (width // new)}] if width % new == 0 else []
    if now % was == 0 and width % (now // was) == 0:
        repairs.append({name: width // (now // was)})
    if width % new or now != was * (width // new):
        raise Refused(
            f"{name}={new} with {count}={now}: experts are split into equal slices, and {was} of width {width} into "
            f"m become m times {was} of width {width}/m",
            *repairs,
        )
    return width // new


def _check_split(family: Family, config: Mapping[str, Any], axis: str, said: str, copies: str) -> None:
    """Refuse to split experts whose slices would not add up to them, or could not be told apart on disk."""
    experts, name = family.experts, field(family, axis)
    assert experts is not None
    works = f"copies of experts, of the width that they have, are exact: {copies} alone"
    for switch, wanted in experts.requires.items():
        if lookup(config, switch) != wanted:
            raise RequestError(
                f"{said}; slices of experts are weighed as copies are, which is exact with {switch}={wanted!r} alone, "
                f"and config.json says {lookup(config, switch)!r}; {name} does not get smaller"
            )
    for at, pattern in family.patterns:
        stands = {atom.stand for atom in pattern.atoms() if atom.axis == axis}
        index = next((a for a in pattern.atoms() if a.index and a.axis == experts.axis), None)
        if stands and experts.axis not in at.axes:
            why = (
                f"{at.text} holds all experts in one tensor, in which each would need another slice of the same dim"
                if index is not None
                else f"{at.text}, which is no expert's, has that width as well"
            )
            raise RequestError(f"{said}; {family.name} cannot split its experts, for {why}; {works}")
        if stands - {"read", "write"} or (index is not None and index.stand == "read" and "read" not in stands):
            raise RequestError(
                f"{said}; {family.name} cannot split its experts, for {at.text} is more to an expert than a map from "
                f"or to its inner width; {works}"
            )
    others = [a for a, size in family.axes.items() if a != axis and isinstance(size, Field) and size.name == name]
    others += [a for a, size in family.axes.items() if isinstance(size, Times) and _stays(size, name)]
    if others or family.norm_over(axis) is not None or family.norm_across(axis) is not None:
        why = f"{name} is the size of {' and '.join(others)} too" if others else "a norm reads all of an expert's width"
        raise RequestError(f"{said}; {family.name} cannot split its experts, for {why}; {works}")


def _stays(size: Times, name: str) -> bool:
    """Whether a size is so many times the width that no config field could make up for a smaller one."""
    return size.field == name and isinstance(size.times, int)


def move_slices(z: Sizing) -> None:
    """A size that is a multiple of the experts' width, of shared experts say, stays: the multiple grows instead."""
    axis = split_axis(z.family, z.asked, z.old)
    name = field(z.family, axis)
    for other, size in z.family.axes.items() if axis else ():
        if not isinstance(size, Times) or size.field != name or not isinstance(size.times, str):
            continue
        most = -(-z.old[other] // z.fields[name])
        if size.times not in z.asked:
            z.moved.append(f"{size.times} {z.fields[size.times]} -> {most}: {size.times} x {name} stays {z.old[other]}")
            z.fields[size.times] = most
        elif z.fields[size.times] < most:
            raise Refused(
                f"{size.times}={z.fields[size.times]} with {name}={z.fields[name]} makes the {other} size smaller "
                f"than the source's {z.old[other]}",
                {size.times: most},
            )


def check_taken(z: Sizing) -> None:
    """Refuse to take more or fewer experts than follow from how often every expert is there."""
    for name in taken(z.family):
        value = z.fields.get(name, lookup(z.config, name))
        if name in z.asked and z.asked[name] != value:
            experts = z.family.experts
            assert experts is not None
            count = field(z.family, experts.axis)
            raise Refused(
                f"{name}={z.asked[name]}: it follows from {count}, for as often as every expert is there, so many "
                f"times as many are taken; with {count}={z.new[experts.axis]} it is {value}",
                {name: int(value)},
            )


def split_growth(experts: Experts, old: Mapping[str, int], axis: str, slices: int) -> list[AxisGrowth]:
    """The growth of the experts and of their width, where each is split.

    R reads all copies of a router's row alike, 1/m of each: each expert's gradient falls to its slices together.
    """
    rows = tuple(Run(old[experts.axis], 0, back=Factor.of(1, slices)) for _ in range(slices))
    return [
        AxisGrowth(experts.axis, Lift(old[experts.axis], rows), split=True),
        AxisGrowth(axis, Lift.identity(old[axis]), sliced=(experts.axis, slices)),
    ]
