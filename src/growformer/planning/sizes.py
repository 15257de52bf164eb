"""From a request in config.json's words to the new value of every size, with what must move along."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growformer.algebra import Family, Field, Ratio, Size, Times
from growformer.errors import RequestError

FIXED = ("vocab", "positions")
"""Axes that this version keeps."""

MOST_CHANNELS, MOST_LAYERS = 2**18, 2**12
"""What is larger is a slip of the hand (published models stay below half of it), and its plan would take minutes."""

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127

_ELSEWHERE = {"hidden_size": "hidden", "n_embd": "hidden", "d_model": "hidden", "num_hidden_layers": "layer"}
_ELSEWHERE |= {"n_layer": "layer", "num_layers": "layer", "layers": "layer", "num_attention_heads": "heads"}
_ELSEWHERE |= {"n_head": "heads", "intermediate_size": "mlp", "n_inner": "mlp", "d_ff": "mlp", "ffn_dim": "mlp"}
"""Other families' names for an axis."""


class _Refused(RequestError):
    """A request without an answer, and changes to it that may lead to one."""

    def __init__(self, text: str, *repairs: Mapping[str, int]) -> None:
        super().__init__(text)
        self.repairs = repairs


@dataclass(frozen=True)
class Sizes:
    """Old and new sizes.

    Attributes:
        old, new: by axis.
        fields: config fields to write, with their new values.
        moved: in words, what changes though nobody asked.
    """

    old: Mapping[str, int]
    new: Mapping[str, int]
    fields: Mapping[str, int]
    moved: tuple[str, ...]


def size_of(size: Size, config: Mapping[str, Any]) -> int:
    """The value of a declared size in `config`."""
    if isinstance(size, Times):
        return size.times * int(config[size.field])
    if isinstance(size, Ratio):
        return int(config[size.over]) // int(config[size.by])
    value = config.get(size.name)
    if value is None and size.default is not None:
        return size_of(size.default, config)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"config.json: {size.name} should be a positive whole number, not {value!r}")
    return value


def growable(family: Family) -> list[str]:
    """The config fields of `family` that a request may name."""
    names: dict[str, None] = {}
    for axis, size in family.axes.items():
        if axis not in FIXED and isinstance(size, Field):
            names[size.name] = None
    return list(names)


def read_request(family: Family, request: Mapping[str, Any]) -> dict[str, int]:
    """Check a request's keys and values.

    Raises:
        RequestError: nothing asked, an unknown key (with the nearest name), or a value that is no whole number.
    """
    names = growable(family)
    if not request:
        raise RequestError(f"nothing was asked; {family.name} grows by {', '.join(f'{n}=SIZE' for n in names)}")
    out: dict[str, int] = {}
    for key, value in request.items():
        if key not in names:
            raise RequestError(_unknown(family, key, names))
        digits = isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value) is not None
        if not digits and (not isinstance(value, int) or isinstance(value, bool)):
            raise RequestError(f"{key}={value!s:.40}: a size is a whole number, such as {key}=1024")
        if (number := int(value)) < 1:
            raise RequestError(f"{key}={value}: a size is a positive whole number")
        out[key] = number
    return out


def _unknown(family: Family, key: str, names: list[str]) -> str:
    for axis, size in family.axes.items():
        fixed = axis in FIXED and isinstance(size, Field) and size.name == key
        if fixed:
            return f"{key}: the {axis} axis is not grown by this version; {family.name} grows by {', '.join(names)}"
        if isinstance(size, Ratio) and key in ("head_dim", axis, f"{axis}_size"):
            return (
                f"{key}: {family.name} has no such field: its head size is {size.over} / {size.by}; "
                f"ask for {size.over}=... and the head size follows"
            )
    own = _field(family, _ELSEWHERE.get(key, key))
    near = [own] if own else difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"{family.name} grows by {', '.join(names)}"
    return f"unknown key {key}: {hint}"


def resolve_sizes(family: Family, config: Mapping[str, Any], request: Mapping[str, Any]) -> Sizes:
    """The new value of every size.

    Args:
        family: the model family.
        config: the source's config with the class's defaults filled in.
        request: new sizes by config field.

    Raises:
        RequestError: where no such model exists, with the nearest requests that work.
    """
    asked = read_request(family, request)
    try:
        return _resolve(family, config, asked)
    except _Refused as refused:
        granted = (_granted(family, config, {**asked, **repair}) for repair in refused.repairs)
        changes = [[f"{k}={v}" for k, v in new.items() if asked.get(k) != v] for new in granted if new]
        near = [", ".join(change) for change in changes if len(change) == min(map(len, changes))]
        hint = f"; {' or '.join(near)} works with the rest of the request" if near else ""
        raise RequestError(f"{refused}{hint}") from None


def _granted(
    family: Family, config: Mapping[str, Any], asked: Mapping[str, int], depth: int = 3
) -> Mapping[str, int] | None:
    """The request itself where it is granted, or what becomes of it after at most `depth` repairs."""
    try:
        _resolve(family, config, asked)
        return asked
    except _Refused as refused:
        tries = ({**asked, **repair} for repair in refused.repairs if depth)
        return next((found for new in tries if (found := _granted(family, config, new, depth - 1))), None)
    except RequestError:
        return None


def _resolve(family: Family, config: Mapping[str, Any], asked: Mapping[str, int]) -> Sizes:
    old = {axis: size_of(size, config) for axis, size in family.axes.items()}
    _check_source(family, old)
    new = dict(old)
    fields: dict[str, int] = {}
    for axis, size in family.axes.items():
        if isinstance(size, Field):
            fields[size.name] = new[axis] = asked.get(size.name, old[axis])
            if new[axis] < old[axis]:
                raise RequestError(
                    f"{size.name}={new[axis]} is smaller than the source's {old[axis]}; growing never takes away"
                )
            if axis not in FIXED and new[axis] > _most(family, axis):
                raise RequestError(f"{size.name}={new[axis]}: at most {_most(family, axis)} is planned")
    moved: list[str] = []
    _move_kv_heads(family, asked, old, new, fields, moved)
    _move_ratios(family, asked, old, new, fields, moved)
    for axis, size in family.axes.items():
        # What stood at a default that follows another field is written down, so that it stays.
        if not isinstance(size, Field) or size.default is None or config.get(size.name) is not None:
            continue
        if size.name not in asked and size_of(size, {**config, **fields, size.name: None}) != new[axis]:
            moved.append(f"{size.name} is written as {new[axis]}; config.json left it to follow another field")
    if new == old:
        said = ", ".join(f"{k}={v}" for k, v in asked.items())
        raise RequestError(f"{said} is the source's own size; ask for a larger one")
    _check_rules(family, fields)
    _check_rotary(family, config, old["key"], new["key"])
    return Sizes(old, new, fields, tuple(moved))


def _most(family: Family, axis: str) -> int:
    return MOST_LAYERS if axis == family.layer else MOST_CHANNELS


def _check_source(family: Family, old: Mapping[str, int]) -> None:
    """Refuse a config.json that breaks a rule by itself, before a request is blamed for it."""
    axis_of = {size.name: axis for axis, size in family.axes.items() if isinstance(size, Field)}
    pairs = [(axis_of[rule.over], axis_of[rule.by]) for rule in family.rules]
    if family.attention.kv_heads is not None:
        pairs.append((family.attention.heads, family.attention.kv_heads))
    for over, by in pairs:
        if old[over] % old[by]:
            raise RequestError(
                f"config.json: {_field(family, over)}={old[over]} is no multiple of {_field(family, by)}={old[by]}; "
                f"no {family.name} has such sizes"
            )
    for axis, size in old.items():
        if axis not in FIXED and size > _most(family, axis):
            raise RequestError(
                f"config.json: {_field(family, axis) or axis}={size}: at most {_most(family, axis)} is planned"
            )


def _field(family: Family, axis: str) -> str:
    size = family.axes.get(axis)
    return size.name if isinstance(size, Field) else ""


def _up(size: int, by: int) -> int:
    """The next multiple of `by`."""
    return -(-size // by) * by


def _divisors(size: int, above: int) -> list[int]:
    return [n for n in range(above + 1, size + 1) if size % n == 0]


def _move_kv_heads(
    family: Family,
    asked: Mapping[str, int],
    old: Mapping[str, int],
    new: dict[str, int],
    fields: dict[str, int],
    moved: list[str],
) -> None:
    heads, kv = family.attention.heads, family.attention.kv_heads
    if kv is None:
        return
    heads_field, kv_field = _field(family, heads), _field(family, kv)
    if kv_field not in asked and old[kv] == old[heads] != new[heads]:
        new[kv] = fields[kv_field] = new[heads]
        moved.append(
            f"{kv_field} {old[kv]} -> {new[kv]}: every head has its own keys and values, and so do the new ones "
            f"(ask {kv_field}={old[kv]} to share the old ones)"
        )
    more = _divisors(new[heads], new[kv])
    if new[heads] % new[kv]:
        raise _Refused(
            f"{heads_field}={new[heads]} is no multiple of {kv_field}={new[kv]}",
            {heads_field: _up(new[heads], new[kv])},
            *({kv_field: n} for n in more[:1]),
        )
    group = old[heads] // old[kv]

    def copies(n: int) -> int:
        """How often each old key/value head must be there for its query heads, with n of them in all."""
        return -(-group // (new[heads] // n))

    if new[kv] < old[kv] * copies(new[kv]):
        raise _Refused(
            f"{heads_field}={new[heads]} with {kv_field}={new[kv]} leaves {new[heads] // new[kv]} query heads to a "
            f"key/value head, where the source has {group}: each old key/value head must be copied "
            f"{copies(new[kv])} times",
            *([{kv_field: n} for n in more if n >= old[kv] * copies(n)][:1]),
            {heads_field: new[kv] * group},
        )


def _move_ratios(
    family: Family,
    asked: Mapping[str, int],
    old: Mapping[str, int],
    new: dict[str, int],
    fields: dict[str, int],
    moved: list[str],
) -> None:
    axis_of = {size.name: axis for axis, size in family.axes.items() if isinstance(size, Field)}
    told: set[tuple[str, str]] = set()
    for axis, size in family.axes.items():
        if not isinstance(size, Ratio):
            continue
        over, by = size.over, size.by
        if by in asked and over not in asked and fields[over] != fields[by] * old[axis]:
            was = fields[over]
            fields[over] = new[axis_of[over]] = fields[by] * old[axis]
            moved.append(f"{over} {was} -> {fields[over]}: it is {by} x the head size, which stays {old[axis]}")
        # Asked for, as it must be named: the head size alone would follow from the heads.
        wider = {over: max(_up(fields[over], fields[by]), fields[by] * old[axis])}
        if fields[over] % fields[by]:
            more = [n for n in _divisors(fields[over], fields[by]) if fields[over] // n >= old[axis]]
            raise _Refused(
                f"{over}={fields[over]} is no multiple of {by}={fields[by]}", wider, *({by: n} for n in more[:1])
            )
        new[axis] = fields[over] // fields[by]
        if new[axis] < old[axis]:
            raise _Refused(
                f"{over}={fields[over]} with {by}={fields[by]} makes the head size {new[axis]}, smaller than the "
                f"source's {old[axis]}",
                wider,
            )
        if new[axis] != old[axis] and (over, by) not in told:
            told.add((over, by))
            moved.append(
                f"head size {old[axis]} -> {new[axis]} (key and value): it is {over} / {by}; "
                f"{over}={fields[over]} with {by}={fields[over] // old[axis]} would keep it"
                if fields[over] % old[axis] == 0
                else f"head size {old[axis]} -> {new[axis]} (key and value): it is {over} / {by}"
            )


def _check_rules(family: Family, fields: Mapping[str, int]) -> None:
    for rule in family.rules:
        by, over = fields[rule.by], fields[rule.over]
        if over % by:
            raise _Refused(
                f"{rule.over}={over} is no multiple of {rule.by}={by}, which {family.name}'s config class refuses",
                {rule.over: _up(over, by)},
                *({rule.by: n} for n in _divisors(over, by)[:1]),
            )


def _check_rotary(family: Family, config: Mapping[str, Any], old: int, new: int) -> None:
    """Refuse a key size under which the old pairs cannot keep their frequencies: the base becomes theta^(new/old)."""
    rotary, name = family.attention.rotary, _field(family, "key") or "the head size"
    if rotary is None or new == old:
        return
    if new % 2:
        # Under a norm over each head, what is below twice the size is exact but cannot learn.
        least = 2 * old if family.norm_over("key") is not None else 0
        raise _Refused(f"{name}={new}: rotary positions turn channels in pairs", {name: max(new + 1, least)})
    rope = config.get("rope_parameters") or {}
    theta, kind = rope.get("rope_theta"), rope.get("rope_type", "default")
    if kind not in rotary.steady:
        raise RequestError(
            f"{name} {old} -> {new}: under rope_type {kind!r} no new base keeps the old frequencies "
            f"(it does under {', '.join(rotary.steady)}); leave {name} as it is"
        )
    if not isinstance(theta, (int, float)) or not 1 < theta < math.inf:
        return
    widest = int(old * math.log(FLOAT32_MAX) / math.log(theta)) // 2 * 2
    if new > widest:
        raise _Refused(
            f"{name}={new}: rope_theta would become {theta:g}^({new}/{old}), beyond float32, in which models compute "
            f"their rotary tables (up to {name}={widest} it is not)",
            *([{name: widest}] if widest > old else []),
        )
