"""From a request in config.json's words to the new value of every size, with what must move along."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growformer.algebra import OUTSIDE, Attention, Family, Field, Layered, Ratio, Size, Times, layered, lookup
from growformer.errors import RequestError
from growformer.planning.choices import Choices
from growformer.planning.moves import (
    Refused,
    Sizing,
    called,
    divisors,
    field,
    move_experts,
    move_groups,
    move_kv_heads,
    move_ratios,
    move_times,
    up,
)
from growformer.planning.rotary import check_way, ropes, widest
from growformer.planning.split import check_taken, move_slices, slices_of, split_axis, taken

MOST_CHANNELS, MOST_LAYERS = 2**18, 2**12
"""What is larger is a slip of the hand (published models stay below half of it), and its plan would take minutes."""

_ELSEWHERE = {"hidden_size": "hidden", "n_embd": "hidden", "d_model": "hidden", "num_hidden_layers": "layer"}
_ELSEWHERE |= {"n_layer": "layer", "num_layers": "layer", "layers": "layer", "num_attention_heads": "heads"}
_ELSEWHERE |= {"n_head": "heads", "intermediate_size": "mlp", "n_inner": "mlp", "d_ff": "mlp", "ffn_dim": "mlp"}
"""Other families' names for an axis."""


@dataclass(frozen=True)
class Sizes:
    """Old and new sizes.

    Attributes:
        old, new: by axis.
        fields: config fields to write, with their new values.
        moved: in words, what changes though nobody asked.
        blocks: see `Sizing`.
        chosen: how many experts a token takes, where they stand under a new router; None: the router stays.
        split: the axis of the experts' width, and in how many slices it is split; None: it is not.
    """

    old: Mapping[str, int]
    new: Mapping[str, int]
    fields: Mapping[str, int]
    moved: tuple[str, ...]
    blocks: int = 0
    chosen: int | None = None
    split: tuple[str, int] | None = None


def size_of(size: Size, config: Mapping[str, Any]) -> int:
    """The value of a declared size in `config`."""
    match size:
        case Times():
            times = size.times if isinstance(size.times, int) else lookup(config, size.times)
            return int(times * int(lookup(config, size.field)))
        case Ratio():
            return int(lookup(config, size.over)) // int(lookup(config, size.by))
        case Layered():
            values = layered(size, config)
            if len(values) > 1:
                raise RequestError(
                    f"config.json: {size.overrides} gives layers of {size.type} {size.field}s of {sorted(values)}; "
                    f"one for all of them is served"
                )
            return size_of(Field("one"), {"one": next(iter(values))})
    value = lookup(config, size.name)
    if value is None and size.default is not None:
        return size_of(size.default, config)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"config.json: {size.name} should be a positive whole number, not {value!r}")
    return value


def growable(family: Family) -> list[str]:
    """The config fields of `family` that a request may name."""
    names: dict[str, None] = {}
    # Tables of tokens and positions come last: they are no part of the Transformer's own size.
    for axis in sorted(family.axes, key=lambda axis: axis in OUTSIDE):
        size = family.axes[axis]
        if isinstance(size, Field):
            names[size.name] = None
        elif isinstance(size, Times) and isinstance(size.times, str):
            names[size.times] = None
    return list(names)


def read_request(family: Family, request: Mapping[str, Any], also: Sequence[str] = ()) -> dict[str, int]:
    """Check a request's keys and values.

    Args:
        family: the model family.
        request: values by config field, or by an older name of one.
        also: fields that may be asked for beside those it grows by, and those that count the experts of a token.

    Returns:
        Whole numbers by config field.

    Raises:
        RequestError: nothing asked, an unknown key (with the nearest name), or a value that is no whole number.
    """
    names = growable(family)
    if not request:
        raise RequestError(f"nothing was asked; {family.name} grows by {', '.join(f'{n}=SIZE' for n in names)}")
    out: dict[str, int] = {}
    for said, value in request.items():
        key = alias if (alias := family.aliases.get(said)) in names else said
        if key not in (*names, *taken(family), *also):
            raise RequestError(_unknown(family, key, names))
        if key in out:
            older = next(name for name, meant in family.aliases.items() if meant == key)
            raise RequestError(f"{key} is asked for twice, for {older} is an older name of it; say it once")
        digits = isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value) is not None
        if not digits and (not isinstance(value, int) or isinstance(value, bool)):
            raise RequestError(f"{key}={value!s:.40}: a size is a whole number, such as {key}=1024")
        if (number := int(value)) < 1:
            raise RequestError(f"{key}={value}: a size is a positive whole number")
        out[key] = number
    return out


def _unknown(family: Family, key: str, names: list[str]) -> str:
    if key in family.follows:
        return f"{key} repeats {family.follows[key]}; ask for {family.follows[key]}=... and it follows"
    part, _, last = key.rpartition(".")
    for axis, size in family.axes.items():
        if isinstance(size, Ratio) and last in ("head_dim", axis, f"{axis}_size") and size.over.startswith(part):
            return (
                f"{key}: {family.name} has no such field: its {called(axis)} is {size.over} / {size.by}; "
                f"ask for {size.over}=... and the {called(axis)} follows"
            )
    own = field(family, _ELSEWHERE.get(key, key))
    inside = [name for name in names if name.rpartition(".")[2] == key]  # the same word in parts of the config
    near = [own] if own else inside or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{family.name} grows by {', '.join(names)}"
    return f"unknown key {key}: {hint}"


def resolve_sizes(
    family: Family,
    config: Mapping[str, Any],
    request: Mapping[str, Any],
    choices: Choices | None = None,
    chosen: int | None = None,
) -> Sizes:
    """The new value of every size.

    Args:
        family: the model family.
        config: the source's config with the class's defaults filled in.
        request: new sizes by config field.
        choices: the recipes of the request.
        chosen: how many experts a token takes, where they get a new router; None: it stays.

    Raises:
        RequestError: where no such model exists, with the nearest requests that work.
    """
    asked, choices = read_request(family, request), choices or Choices()
    try:
        return _resolve(family, config, asked, choices, chosen)
    except Refused as refused:
        granted = (_granted(family, config, {**asked, **repair}, choices, chosen) for repair in refused.repairs)
        changes = [[f"{k}={v}" for k, v in new.items() if asked.get(k) != v] for new in granted if new]
        near = [", ".join(change) for change in changes if len(change) == min(map(len, changes))]
        hint = f"; {' or '.join(near)} works with the rest of the request" if near else ""
        raise RequestError(f"{refused}{hint}") from None


def _granted(
    family: Family,
    config: Mapping[str, Any],
    asked: Mapping[str, int],
    choices: Choices,
    chosen: int | None,
    depth: int = 3,
) -> Mapping[str, int] | None:
    """The request itself where it is granted, or what becomes of it after at most `depth` repairs."""
    try:
        _resolve(family, config, asked, choices, chosen)
        return asked
    except Refused as refused:
        tries = [{**asked, **repair} for repair in refused.repairs if depth]
        found = (_granted(family, config, new, choices, chosen, depth - 1) for new in tries)
        return next((each for each in found if each), None)
    except RequestError:
        return None


def _resolve(
    family: Family, config: Mapping[str, Any], asked: Mapping[str, int], choices: Choices, chosen: int | None
) -> Sizes:
    old = {axis: size_of(size, config) for axis, size in family.axes.items()}
    _check_source(family, config, old)
    new = dict(old)
    slices = slices_of(family, config, asked, old) if chosen is None else 1
    narrower = split_axis(family, asked, old) if slices > 1 else ""
    fields: dict[str, int] = {}
    for axis, size in family.axes.items():
        if isinstance(size, Field):
            fields[size.name] = new[axis] = asked.get(size.name, old[axis])
            if new[axis] < old[axis] and axis != narrower:
                raise RequestError(
                    f"{size.name}={new[axis]} is smaller than the source's {old[axis]}; growing never takes away"
                )
            if new[axis] > _most(family, axis):
                raise RequestError(f"{size.name}={new[axis]}: at most {_most(family, axis)} is planned")
        elif isinstance(size, Times) and isinstance(size.times, str):
            fields[size.times] = asked.get(size.times, int(lookup(config, size.times)))
    moved: list[str] = []
    sizing = Sizing(family, config, dict(asked), old, new, fields, moved, slices=slices)
    move_groups(sizing)
    for attention in family.attentions:
        move_kv_heads(sizing, attention)
    move_ratios(sizing)
    move_slices(sizing)
    move_times(sizing)
    if chosen is None:
        move_experts(sizing)
        check_taken(sizing)
    elif family.experts is not None:
        fields[family.experts.chosen] = chosen
    asked = sizing.asked
    for name, leader in family.follows.items():
        fields[name] = fields[leader]  # written in any case: left out, it may have another field's default
        if fields[leader] != lookup(config, leader):
            moved.append(f"{name} -> {fields[name]}: it repeats {leader}")
    for axis, size in family.axes.items():
        # What stood at a default that follows another field is written down, so that it stays.
        if not isinstance(size, Field) or size.default is None or lookup(config, size.name) is not None:
            continue
        if size.name not in asked and size_of(size, {**config, **fields, size.name: None}) != new[axis]:
            moved.append(f"{size.name} is written as {new[axis]}; config.json left it to follow another field")
    if new == old and chosen is None and choices.same == "refused":
        said = ", ".join(f"{k}={v}" for k, v in asked.items())
        raise RequestError(f"{said} is the source's own size; ask for a larger one")
    _check_copied(family, old, new)
    _check_rules(family, fields)
    for attention in family.attentions:
        _check_rotary(family, attention, config, old, new, choices.rope)
    if choices.rope != "theta":
        _check_turned(family, old, new, choices.rope)
    if choices.new_tokens == "closed":
        _check_closed(family, old, new)
    split = (narrower, slices) if narrower else None
    return Sizes(old, new, fields, tuple(dict.fromkeys(moved)), sizing.blocks, chosen, split)


def _most(family: Family, axis: str) -> int:
    return MOST_LAYERS if axis in family.layers else MOST_CHANNELS


def _check_source(family: Family, config: Mapping[str, Any], old: Mapping[str, int]) -> None:
    """Refuse a config.json that breaks a rule by itself, before a request is blamed for it."""
    axis_of = {size.name: axis for axis, size in family.axes.items() if isinstance(size, Field)}
    pairs = [(axis_of[rule.over], axis_of[rule.by]) for rule in family.rules]
    pairs += [(a.heads, a.kv_heads) for a in family.attentions if a.kv_heads is not None]
    for over, by in pairs:
        if old[over] % old[by]:
            raise RequestError(
                f"config.json: {field(family, over)}={old[over]} is no multiple of {field(family, by)}={old[by]}; "
                f"no {family.name} has such sizes"
            )
    for axis, size in old.items():
        if axis not in OUTSIDE and size > _most(family, axis):
            raise RequestError(
                f"config.json: {field(family, axis) or axis}={size}: at most {_most(family, axis)} is planned"
            )
    for name, leader in family.follows.items():
        if lookup(config, name) != lookup(config, leader):
            raise RequestError(
                f"config.json: {name}={lookup(config, name)!r} is other than {leader}={lookup(config, leader)!r}, "
                f"and no fact of {family.name} says what growth must do about it"
            )


def _check_copied(family: Family, old: Mapping[str, int], new: Mapping[str, int]) -> None:
    for axis, reason in family.copied.items():
        name = field(family, axis)
        if axis in new and new[axis] % old[axis]:
            raise Refused(
                f"{name}={new[axis]}: {reason}, so only whole copies of its channels are exact",
                {name: up(new[axis], old[axis])},
            )


def _check_rules(family: Family, fields: Mapping[str, int]) -> None:
    for rule in family.rules:
        by, over = fields[rule.by], fields[rule.over]
        if over % by:
            raise Refused(
                f"{rule.over}={over} is no multiple of {rule.by}={by}, which {family.name}'s config class refuses",
                {rule.over: up(over, by)},
                *({rule.by: n} for n in divisors(over, by)[:1]),
            )


def _check_closed(family: Family, old: Mapping[str, int], new: Mapping[str, int]) -> None:
    """Refuse to close new tokens where there are none, or no bias to close them by."""
    name = field(family, "vocab")
    if "vocab" not in old or old["vocab"] == new["vocab"]:
        raise RequestError(f"new_tokens='closed': no token is new; ask for {name or 'a vocabulary'}=... as well")
    if not family.odds("vocab"):
        raise RequestError(
            f"new_tokens='closed': the head of {family.name} has no bias, which alone could give new tokens the "
            f"probability zero; new_tokens='open' (the default) keeps every old logit"
        )


def _check_turned(family: Family, old: Mapping[str, int], new: Mapping[str, int], way: str) -> None:
    """Refuse a way to place rotary pairs where no pair has to be placed."""
    rotaries = [attention.rotary for attention in family.attentions if attention.rotary is not None]
    if not rotaries:
        raise RequestError(f"rope={way!r}: {family.name} has no rotary positions")
    if not any(rotary.whole for rotary in rotaries):
        raise RequestError(
            f"rope={way!r}: {family.name} turns the first channels of a head only; new ones come behind them and do "
            f"not turn, so that no pair is to be placed"
        )
    if all(old[rotary.axis] == new[rotary.axis] for rotary in rotaries):
        name = field(family, rotaries[0].axis) or "the head size"
        raise RequestError(f"rope={way!r} says where rotary pairs go when {name} grows, and it stays")


def _check_rotary(
    family: Family,
    attention: Attention,
    config: Mapping[str, Any],
    olds: Mapping[str, int],
    news: Mapping[str, int],
    way: str,
) -> None:
    """Refuse a key size under which the old pairs cannot keep their frequencies: the base becomes theta^(new/old)."""
    rotary = attention.rotary
    if rotary is None:
        return
    old, new, name = olds[rotary.axis], news[rotary.axis], field(family, rotary.axis) or "the head size"
    if new == old:
        return
    turning = {kind: rope for kind, rope in ropes(config).items() if rotary.set in ("", kind)}
    if rotary.set and not turning:
        raise RequestError(f"{name} {old} -> {new}: config.json: rope_parameters has no set for {rotary.set}")
    for rope in turning.values() if rotary.partial else ():
        kind = rope.get("rope_type", "default")
        if kind not in (*rotary.steady, "longrope"):
            raise RequestError(f"{name} {old} -> {new}: rope_type {kind!r} turns by the whole head; it stays {old}")
    if not rotary.whole:
        return
    if new % 2:
        # Under a norm over each head, what is below twice the size is exact but cannot learn.
        normed = family.norm_over(rotary.axis) or family.norm_across(rotary.axis)
        least = 2 * old if normed is not None else 0
        raise Refused(f"{name}={new}: rotary positions turn channels in pairs", {name: max(new + 1, least)})
    if way != "theta":
        check_way(rotary, way, name, old, new, turning)
    for rope in turning.values() if way in ("theta", "proportional") else ():
        kind = rope.get("rope_type", "default")
        if kind not in rotary.steady:
            raise RequestError(
                f"{name} {old} -> {new}: under rope_type {kind!r} no new base keeps the old frequencies "
                f"(it does under {', '.join(rotary.steady)}); leave {name} as it is"
            )
        most = widest(rope, old)
        if most is not None and new > most:
            raise Refused(
                f"{name}={new}: rope_theta would become {rope.get('rope_theta'):g}^({new}/{old}), beyond float32, in "
                f"which models compute their rotary tables (up to {name}={most} it is not)",
                *([{name: most}] if most > old else []),
            )
