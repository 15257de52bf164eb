"""Recipes that a request has to choose: which of them a family takes, and a growth that shows each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from growformer.algebra import Family, NamePattern
from growformer.api.checks.requests import Asked, Planner
from growformer.errors import GrowformerError
from growformer.planning.choices import ROPES, Choices
from growformer.planning.split import inner_axes

TITLE = "opt-in: "
"""What the names of these growths begin with."""


@dataclass(frozen=True)
class OptIn:
    """One growth with a choice.

    Attributes:
        what: which recipe it shows.
        request: new sizes by config field.
        choices: the recipes.
    """

    what: str
    request: Mapping[str, int]
    choices: Choices = field(default_factory=Choices)


def opt_ins(planner: Planner, asked: list[Asked]) -> Iterator[OptIn]:
    """Every recipe that the family of a planner takes by choice, or that leaves new entries dead."""
    for way in ROPES:
        if way != Choices().rope:
            yield from _rope(planner, asked, way)
    yield from _split(planner, asked)
    experts = planner.family.experts
    for one in asked:
        if experts is not None and experts.axis in one.axes and _has(planner, experts.axis):
            barred = next((size for size in one.dead if size < 2 * one.old), None)
            if barred is not None:
                yield OptIn(f"{TITLE}{one.field}, new experts barred", {one.field: barred})
        if "vocab" in one.axes and one.new != one.old and _has(planner, "vocab"):
            yield OptIn(f"{TITLE}{one.field}, new tokens closed", {one.field: one.new}, Choices(new_tokens="closed"))


def _rope(planner: Planner, asked: list[Asked], way: str) -> Iterator[OptIn]:
    """The first size that is granted and alive with a way to place rotary pairs."""
    if not any(a.rotary is not None and a.rotary.whole for a in planner.family.attentions):
        return
    choices = Choices(rope=way)
    for one in asked:
        for size in (one.new, 2 * one.old, 3 * one.old):
            try:
                dead, _ = planner.glance({one.field: size}, choices)
            except GrowformerError:
                continue
            if not dead:
                yield OptIn(f"{TITLE}{one.field}, rope={way}", {one.field: size}, choices)
                return


def _split(planner: Planner, asked: list[Asked]) -> Iterator[OptIn]:
    """Experts split into as few slices as their width can be."""
    experts, inner = planner.family.experts, inner_axes(planner.family)
    for many in asked:
        for wide in asked if experts is not None and experts.axis in many.axes else ():
            times = next((n for n in range(2, wide.old + 1) if wide.old % n == 0), 0)
            request = {many.field: times * many.old, wide.field: wide.old // max(times, 1)}
            if not times or not set(inner) & set(wide.axes):
                continue
            try:
                planner.glance(request)
            except GrowformerError:
                continue
            yield OptIn(f"{TITLE}{many.field}, experts split", request)


def _has(planner: Planner, axis: str) -> bool:
    """Whether the checkpoint has a bias on what is chosen from an axis."""
    return any(_named(planner.family, name, disk) for name in planner.family.odds(axis) for disk in planner.shapes)


def _named(family: Family, name: NamePattern, disk: str) -> bool:
    return name.match(disk) is not None or name.match(family.prefix + disk) is not None
