"""What else changes when a size changes: groups, key/value heads, head sizes, multiples, experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growformer.algebra import Attention, Experts, Family, Field, Ratio, Times, lookup
from growformer.errors import RequestError


class Refused(RequestError):
    """A request without an answer, and changes to it that may lead to one."""

    def __init__(self, text: str, *repairs: Mapping[str, int]) -> None:
        super().__init__(text)
        self.repairs = repairs


@dataclass
class Sizing:
    """Sizes in the making.

    Attributes:
        family: the model family.
        config: the source's, defaults filled in.
        asked: new sizes by config field, as they were asked for.
        old, new: by axis.
        fields: new values by config field.
        moved: in words, what changes though nobody asked.
        blocks: in how many groups of old experts, one after the other, barred ones stand; 1: behind all; 0: nowhere.
        slices: in how many slices every expert is split; 1: in none.
    """

    family: Family
    config: Mapping[str, Any]
    asked: dict[str, int]
    old: Mapping[str, int]
    new: dict[str, int]
    fields: dict[str, int]
    moved: list[str]
    blocks: int = 0
    slices: int = 1

    def put(self, name: str, value: int) -> None:
        """Write a config field, and the size of every axis that it is."""
        self.fields[name] = value
        for axis, size in self.family.axes.items():
            if isinstance(size, Field) and size.name == name:
                self.new[axis] = value


def field(family: Family, axis: str) -> str:
    size = family.axes.get(axis)
    return size.name if isinstance(size, Field) else ""


def up(size: int, by: int) -> int:
    """The next multiple of `by`."""
    return -(-size // by) * by


def divisors(size: int, above: int) -> list[int]:
    return [n for n in range(above + 1, size + 1) if size % n == 0]


def called(axis: str) -> str:
    """What people call the size of an axis that no field holds."""
    return "head size" if axis.endswith(("key", "value")) else f"{axis} size"


def move_groups(z: Sizing) -> None:
    """Where a group's query heads stand beside its keys, more groups bring their query heads along."""
    for attention in z.family.attentions:
        size = z.family.axes.get(attention.group or "")
        if isinstance(size, Ratio) and size.by in z.asked and size.over not in z.asked:
            z.asked[size.over] = z.fields[size.by] * z.old[str(attention.group)]
            z.put(size.over, z.asked[size.over])
            z.moved.append(f"{size.over} -> {z.fields[size.over]}: a new group comes with its query heads")


def move_times(z: Sizing) -> None:
    for axis, size in z.family.axes.items():
        if not isinstance(size, Times):
            continue
        times = size.times if isinstance(size.times, int) else z.fields[size.times]
        z.new[axis] = times * z.fields[size.field]
        if z.new[axis] != z.old[axis]:
            z.moved.append(f"{axis} size {z.old[axis]} -> {z.new[axis]}: it is {size.times} x {size.field}")


def move_experts(z: Sizing) -> None:
    """Copies of experts share their router's weight, so that as many more are chosen; barred ones change nothing."""
    experts = z.family.experts
    if experts is None or experts.axis not in z.old or z.new[experts.axis] == z.old[experts.axis]:
        return
    name, was, now = field(z.family, experts.axis), z.old[experts.axis], z.new[experts.axis]
    odd = {switch: value for switch, value in experts.requires.items() if lookup(z.config, switch) != value}
    if now % was == 0 and not odd:
        how = f"every expert is split into {z.slices}" if z.slices > 1 else f"every expert is there {now // was} times"
        for count in (experts.chosen, *experts.groups):
            value = int(lookup(z.config, count))
            z.fields[count] = value * (now // was)
            if count not in z.asked:
                z.moved.append(f"{count} {value} -> {z.fields[count]}: {how}")
    elif z.family.odds(experts.axis):
        _bar_experts(z, experts, name, was, now)
    elif now % was:
        raise Refused(
            f"{name}={now}: experts grow by whole copies of all of them, for a router's weights must add up (and it "
            f"has no bias that could keep new ones from being chosen)",
            {name: up(now, was)},
        )
    else:
        switch, wanted = next(iter(odd.items()))
        raise RequestError(
            f"{name}={now}: copies of experts change what {z.family.name} computes while {switch}="
            f"{lookup(z.config, switch)!r}; they are exact with {wanted!r}; {name} stays {was}"
        )


def _bar_experts(z: Sizing, experts: Experts, name: str, was: int, now: int) -> None:
    """New experts that are never chosen: as many in each group of old ones, or whole groups of their own."""
    chosen = int(lookup(z.config, experts.chosen))
    groups, taken = (int(lookup(z.config, count)) for count in experts.groups) if experts.groups else (1, 1)
    if chosen > was // groups * taken:
        raise RequestError(
            f"{name}={now}: {experts.chosen}={chosen} of {was // groups * taken} experts are chosen, so that new ones "
            f"would be as well, however low their bias"
        )
    if now % groups == 0:
        z.blocks = groups
    elif (now - was) % (was // groups) == 0:
        z.blocks, count = 1, experts.groups[0]
        z.fields[count] = now // (was // groups)
        z.moved.append(f"{count} {groups} -> {z.fields[count]}: the new experts are groups of their own")
    else:
        size = was // groups
        raise Refused(
            f"{name}={now}: experts stand in {groups} groups of {size}, and new ones are as many in each, or whole "
            f"groups of {size}",
            *({name: n} for n in sorted({up(now, groups), was + up(now - was, size)})),
        )


def move_kv_heads(z: Sizing, attention: Attention) -> None:
    """Key/value heads that are as many as heads stay so; and what is asked must keep every query beside its keys."""
    heads, kv = attention.heads, attention.kv_heads
    if kv is None:
        return
    heads_field, kv_field = field(z.family, heads), field(z.family, kv)
    if kv_field not in z.asked and z.old[kv] == z.old[heads] != z.new[heads]:
        z.put(kv_field, z.new[heads])
        z.moved.append(
            f"{kv_field} {z.old[kv]} -> {z.new[kv]}: every head has its own keys and values, and so do the new ones "
            f"(ask {kv_field}={z.old[kv]} to share the old ones)"
        )
    more = divisors(z.new[heads], z.new[kv])
    if z.new[heads] % z.new[kv]:
        raise Refused(
            f"{heads_field}={z.new[heads]} is no multiple of {kv_field}={z.new[kv]}",
            {heads_field: up(z.new[heads], z.new[kv])},
            *({kv_field: n} for n in more[:1]),
        )
    group = z.old[heads] // z.old[kv]

    def copies(n: int) -> int:
        """How often each old key/value head must be there for its query heads, with n of them in all."""
        return -(-group // (z.new[heads] // n))

    if z.new[kv] < z.old[kv] * copies(z.new[kv]):
        raise Refused(
            f"{heads_field}={z.new[heads]} with {kv_field}={z.new[kv]} leaves {z.new[heads] // z.new[kv]} query heads "
            f"to a key/value head, where the source has {group}: each old key/value head must be copied "
            f"{copies(z.new[kv])} times",
            *([{kv_field: n} for n in more if n >= z.old[kv] * copies(n)][:1]),
            {heads_field: z.new[kv] * group},
        )


def move_ratios(z: Sizing) -> None:
    """A size that is one field divided by another keeps its value where only the divisor was asked for."""
    told: set[tuple[str, str]] = set()
    ratios = [(axis, size.over, size.by) for axis, size in z.family.axes.items() if isinstance(size, Ratio)]
    for axis, over, by in ratios:
        if by in z.asked and over not in z.asked and z.fields[over] < z.fields[by] * z.old[axis]:
            was = z.fields[over]
            z.put(over, z.fields[by] * z.old[axis])
            z.moved.append(
                f"{over} {was} -> {z.fields[over]}: it is {by} x the {called(axis)}, which stays {z.old[axis]}"
            )
    for axis, over, by in ratios:
        # Asked for, as it must be named: the head size alone would follow from the heads.
        wider = {over: max(up(z.fields[over], z.fields[by]), z.fields[by] * z.old[axis])}
        if z.fields[over] % z.fields[by]:
            more = [n for n in divisors(z.fields[over], z.fields[by]) if z.fields[over] // n >= z.old[axis]]
            raise Refused(
                f"{over}={z.fields[over]} is no multiple of {by}={z.fields[by]}", wider, *({by: n} for n in more[:1])
            )
        z.new[axis] = z.fields[over] // z.fields[by]
        if z.new[axis] < z.old[axis]:
            raise Refused(
                f"{over}={z.fields[over]} with {by}={z.fields[by]} makes the {called(axis)} {z.new[axis]}, smaller "
                f"than the source's {z.old[axis]}",
                wider,
            )
        if z.new[axis] != z.old[axis] and (over, by) not in told and called(axis) == "head size":
            told.add((over, by))
            z.moved.append(
                f"head size {z.old[axis]} -> {z.new[axis]} (key and value): it is {over} / {by}; "
                f"{over}={z.fields[over]} with {by}={z.fields[over] // z.old[axis]} would keep it"
                if z.fields[over] % z.old[axis] == 0
                else f"head size {z.old[axis]} -> {z.new[axis]} (key and value): it is {over} / {by}"
            )
