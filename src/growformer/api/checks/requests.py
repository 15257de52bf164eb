"""What to ask of each axis, found by asking the planner for every size up to three times the source's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growformer.algebra import OUTSIDE, Family, Field, Ratio, Size, Times, lookup
from growformer.checkpoint import TensorFiles, read_config
from growformer.checkpoint.stock import fields_read, full_config
from growformer.errors import GrowformerError
from growformer.methods import METHODS
from growformer.planning import Plan, make_plan
from growformer.planning.choices import Choices
from growformer.planning.make import ties
from growformer.planning.resolve import resolve_growth
from growformer.planning.served import check_served
from growformer.planning.sizes import growable, resolve_sizes, size_of


@dataclass(frozen=True)
class Asked:
    """How a config field grows.

    Attributes:
        field: its name.
        axes: the axes that it sizes.
        old, new: its value, and the one to grow to; the same where none is granted.
        limit: which sizes are granted, in words; or the refusal.
        dead: sizes that are granted and whose new entries cannot all learn.
        moves: other size fields that come along.
    """

    field: str
    axes: tuple[str, ...]
    old: int
    new: int
    limit: str
    dead: tuple[int, ...] = ()
    moves: tuple[str, ...] = ()


@dataclass
class Planner:
    """Plans for one source folder, which is read once."""

    family: Family
    folder: Path
    raw: Mapping[str, Any] = field(init=False)
    full: Mapping[str, Any] = field(init=False)
    defaults: Mapping[str, Any] = field(init=False)
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.raw = read_config(self.folder)
        self.full, self.defaults = full_config(self.raw)
        with TensorFiles.open(self.folder) as files:
            self.shapes = {name: files[name].shape for name in files}
        self.read = fields_read(self.raw)

    def plan(self, request: Mapping[str, int]) -> Plan:
        """The plan of a request; raises as planning does."""
        return make_plan(
            self.family, METHODS["paper"], self.raw, self.full, self.defaults, self.shapes, request, read=self.read
        )

    def glance(self, request: Mapping[str, int], choices: Choices | None = None) -> tuple[bool, list[str]]:
        """Whether new entries of a granted request are dead, and which size fields move along; no tensor is planned.

        Raises:
            RequestError: it is not granted.
        """
        sizes = resolve_sizes(self.family, self.full, request, choices)
        check_served(self.family, self.full, sizes)
        tied, headed = ties(self.family, self.full, self.shapes), self.family.headed(self.full)
        growth = resolve_growth(self.family, sizes, METHODS["paper"], tied=tied, headed=headed, choices=choices)
        moved = [name for name, value in sizes.fields.items() if name not in request and value != _value(self, name)]
        return any(axis.dead for axis in growth), moved

    def asked(self) -> list[Asked]:
        """One request for each config field that sizes an axis."""
        return [self._field(name) for name in growable(self.family)]

    def asked_fields(self) -> list[tuple[str, ...]]:
        """The axes of each config field that a request may name."""
        return [self._axes(name) for name in growable(self.family)]

    def _axes(self, name: str) -> tuple[str, ...]:
        return tuple(axis for axis, size in self.family.axes.items() if _named(size) == name)

    def _field(self, name: str) -> Asked:
        axes = self._axes(name)
        old = _value(self, name)
        granted: dict[int, bool] = {}
        moves: dict[int, list[str]] = {}
        refused: dict[int, str] = {}
        last = max(3 * old, old + 8)
        for new in range(old + 1, last + 1):
            try:
                granted[new], moves[new] = self.glance({name: new})
            except GrowformerError as error:
                refused[new] = str(error)
        if not granted:
            return Asked(name, axes, old, old, refused[min(2 * old, max(refused))])
        dead = tuple(size for size, is_dead in granted.items() if is_dead)
        alive = [size for size in granted if size not in dead]
        new = self._choice(axes, old, alive or list(dead))
        limit = self._limit(name, old, list(granted), last)
        if dead:
            after = [size for size in granted if alive and size >= alive[0]]
            at = f"from {alive[0]} on" if alive == after else f"at {self._limit(name, old, alive, last)}"
            limit += f"; learns {at}" if alive else "; the new entries cannot learn"
        if moves[new]:
            limit += f"; brings {', '.join(moves[new])}"
        return Asked(
            name, axes, old, new, limit.replace(f"from {2 * old} on", "from twice the size on"), dead, tuple(moves[new])
        )

    def _choice(self, axes: tuple[str, ...], old: int, sizes: list[int]) -> int:
        """A size that says much: not a multiple where that is granted, twice as many heads, two more layers."""
        wanted = old + old // 2 + 1
        if set(axes) & set(self.family.layers):
            wanted = old + 2
        elif set(axes) & set(OUTSIDE):
            wanted = old + 5
        elif any(axis in (a.heads, a.kv_heads) for axis in axes for a in self.family.attentions):
            wanted = 2 * old
        return min(sizes, key=lambda size: (abs(size - wanted), size))

    def _limit(self, name: str, old: int, sizes: list[int], last: int) -> str:
        """The granted sizes in words: the simplest rule that grants exactly these."""
        tried = range(old + 1, last + 1)
        if sizes == list(tried):
            return "any"
        others = {_value(self, other): other for other in self._related(name)}
        heads = any(name == _named(self.family.axes[a.heads]) for a in self.family.attentions)
        for step in range(2, old + 1):
            if sizes == [size for size in tried if size % step == 0]:
                if step == old:
                    return "whole multiples"
                if step == 2 and not heads:
                    return "even"
                return f"multiples of {_times(step, others)}"
        for whole, step in itertools.permutations(others, 2):
            if step > 1 and sizes == [size for size in tried if whole % size == 0 and size % step == 0]:
                return f"multiples of {others[step]} that divide {others[whole]}"
        for whole, other in others.items():
            # Copies: the rule that grants less is the one to tell where the sample's sizes fit both.
            if sizes == [size for size in tried if whole % size == 0 and size % old == 0]:
                return f"whole multiples that divide {other}"
            if sizes == [size for size in tried if whole % size == 0]:
                return f"divisors of {other}"
        if sizes == list(range(sizes[0], last + 1)):
            return f"from {sizes[0]} on"
        return f"such as {', '.join(map(str, sizes[:3]))} from {old}"

    def _related(self, name: str) -> list[str]:
        """The config fields that a rule of the class, a quotient or attention ties to this one."""
        sizes = self.family.axes
        ties = [{rule.by, rule.over} for rule in self.family.rules]
        ties += [{size.over, size.by} for size in sizes.values() if isinstance(size, Ratio)]
        ties += [{_named(sizes[a.heads]), _named(sizes[a.kv_heads])} for a in self.family.attentions if a.kv_heads]
        found = {other for tied in ties if name in tied for other in tied}
        return [other for other in growable(self.family) if other in found and other != name]

    def together(self, asked: list[Asked]) -> dict[str, int]:
        """One request for every field that grows, repaired as the planner's refusals say; {} where there is none."""
        request = {one.field: one.new for one in asked if one.new != one.old}
        moved = {name for one in asked for name in one.moves}
        for start in (
            request,
            {k: v for k, v in request.items() if k not in moved},
            {k: 2 * _value(self, k) for k in request},
        ):
            tried = dict(start)
            for _ in range(6):
                if not tried:
                    break
                try:
                    self.glance(tried)
                    return tried
                except GrowformerError as error:
                    changes = _suggested(str(error))
                    if changes is None:
                        break
                    tried |= changes
        return {}


def _value(planner: Planner, name: str) -> int:
    for size in planner.family.axes.values():
        if isinstance(size, Field) and size.name == name:
            return size_of(size, planner.full)
    return int(lookup(planner.full, name))


def _named(size: Size) -> str:
    if isinstance(size, Field):
        return size.name
    return size.times if isinstance(size, Times) and isinstance(size.times, str) else ""


def _times(step: int, others: Mapping[int, str]) -> str:
    """A number as a multiple of the config field that is the largest divisor of it."""
    base = max((value for value in others if value > 1 and step % value == 0), default=1)
    times = f"{step // base} x " if step != base else ""
    return str(step) if base == 1 else f"{times}{others[base]}"


def _suggested(refusal: str) -> dict[str, int] | None:
    """The changes that a refusal says would work."""
    found = re.search(r"[;:] ([^;:]*=[^;:]*?) works", refusal)
    if found is None:
        return None
    first = found[1].split(" or ")[0]
    return {name: int(value) for name, value in re.findall(r"([\w.]+)=(\d+)", first)} or None
