"""Whether a target config differs from its source only in what the receipt's axes demand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from growformer.algebra.facts import Experts, Norm
from growformer.algebra.family import Family, PerLayer
from growformer.algebra.sizes import Field, Layered, Size, Times, lookup
from growformer.proof.barred import check_groups
from growformer.proof.facts import Facts
from growformer.proof.layers import likes
from growformer.proof.positions import ROPE, check_rotary

Config = Mapping[str, Any]

_NOTES = ("transformers_version", "dtype", "torch_dtype")
"""Fields that say how the files were written; the files themselves are looked at."""


def size_of(config: Config, size: Size, source: Config, full: Config) -> int:
    """How many channels `config` gives an axis.

    Raises:
        ValueError: where neither the config nor a default says.
    """
    if isinstance(size, Field):
        value = lookup(config, size.name)
        if value is None and lookup(source, size.name) is None:
            # What the class fills in: a constant, unless it is what other fields give, which then decide.
            filled = lookup(full, size.name)
            if size.default is None or (filled is not None and filled != size_of(full, size.default, source, full)):
                value = filled
        if value is None and size.default is not None:
            return size_of(config, size.default, source, full)
        if value is None:
            raise ValueError(f"config field {size.name} is missing")
        return int(value)
    if isinstance(size, Times):
        times = size.times
        many = times if isinstance(times, int) else size_of(config, Field(times), source, full)
        return many * size_of(config, Field(size.field), source, full)
    if isinstance(size, Layered):
        entries = _by_number(lookup(config, size.overrides))
        common = lookup(config, size.field)
        kinds = lookup(config, size.types) or []
        values = {entries.get(i, {}).get(size.field, common) for i, kind in enumerate(kinds) if kind == size.type}
        if len(values) > 1:
            raise ValueError(f"config field {size.overrides}: layers of {size.type} differ in {size.field}")
        return int(next(iter(values), common))
    over, by = (size_of(config, Field(name), source, full) for name in (size.over, size.by))
    if by < 1 or over % by:
        raise ValueError(f"config: {size.over} {over} is no multiple of {size.by} {by}")
    return over // by


def size_fields(size: Size | None) -> set[str]:
    """Every config field that a size is made of."""
    if isinstance(size, Field):
        return {size.name} | size_fields(size.default)
    if isinstance(size, Times):
        return {size.field} | ({size.times} if isinstance(size.times, str) else set())
    if isinstance(size, Layered):
        return {size.field, size.types, size.overrides}
    return set() if size is None else {size.over, size.by}


def check_sizes(
    family: Family, axes: Mapping[str, tuple[int, int]], source: Config, target: Config, full: Config
) -> list[str]:
    """Where the (old, new) size of an axis is not what the two configs say."""
    problems = []
    for name, said in axes.items():
        for side, config, number in (("source", full, said[0]), ("target", target, said[1])):
            try:
                found = size_of(config, family.axes[name], source, full)
            except (ValueError, TypeError) as error:
                problems.append(f"axis {name}: {side} {error}")
                continue
            if found != number:
                problems.append(f"axis {name}: {side} config says {found}, the receipt {number}")
    return problems


def check_fields(
    facts: Facts, layers: Mapping[str, Sequence[int | None]], source: Config, target: Config, full: Config
) -> list[str]:
    """What in the target config is other than the axes and the layer maps demand.

    Args:
        facts: the axes and what follows from them.
        layers: by layer axis, the source layer of each target layer, None for a new one.
        source: config.json of the source.
        target: config.json of the target.
        full: the source's config with every default filled in, or `source` again.
    """
    family = facts.family
    problems = list(_others(facts, source, target, full))
    for name, wanted in family.requires.items():
        if _has(full, name) and lookup(full, name) != wanted:
            problems.append(f"config field {name}: {lookup(full, name)!r} is not covered; required {wanted!r}")
    for rule in family.rules:
        over, by = (lookup(target if _has(target, name) else full, name) for name in (rule.over, rule.by))
        if isinstance(over, int) and isinstance(by, int) and over % by:
            problems.append(f"config field {rule.over}: found {over}; required a multiple of {rule.by} = {by}")
    for name in sorted({norm.eps for norm in family.norms.values() if isinstance(norm.eps, str)}):
        problems += _eps(facts, name, target, full)
    for norm in family.norms.values():
        problems += _length(facts, norm, target, full)
    for name, kind in family.per_layer.items():
        if kind == "keyed":
            problems += _keyed(facts, name, layers[family.layer], target, full)
        else:
            problems += _per_layer(name, kind, layers[family.layer], target, full)
    problems += _lends(family, layers[family.layer], target, full)
    for name, leader in {**family.follows, **family.aliases}.items():
        found, required = lookup(target, name), lookup(target, leader)
        if found != required and (found is not None or lookup(source, name) is not None):
            problems.append(f"config field {name}: found {found!r}; required {required!r}, as {leader}")
    for frozen in family.frozen:
        free = frozen.unless and all(lookup(full, name) == value for name, value in frozen.unless.items())
        grown = [name for name in frozen.axes if name in facts.axes and not facts.axes[name].is_identity]
        problems += [f"axis {name}: it may not grow, for {frozen.reason}" for name in grown if not free]
    problems += _experts(facts, target, full)
    for attention in family.attentions:
        rotary = attention.rotary
        if rotary is not None and (not rotary.whole or rotary.axis in facts.attending.rotary):
            pairs = facts.attending.rotary.get(rotary.axis, [])
            problems += check_rotary(rotary, facts.axes[rotary.axis], pairs, source, target, full)
    return problems


def _handled(family: Family) -> set[str]:
    """The config fields that some rule here looks at."""
    out = {*_NOTES, *family.per_layer, *family.follows, *family.aliases}
    for size in family.axes.values():
        out |= size_fields(size)
    out |= {family.lends.types, family.lends.count} if family.lends is not None else set()
    out |= {norm.eps for norm in family.norms.values() if isinstance(norm.eps, str)}
    out |= {norm.length for norm in family.norms.values()}
    for rotary in (attention.rotary for attention in family.attentions):
        out |= {*ROPE, rotary.partial, rotary.turned} if rotary is not None else set()
    if family.experts is not None:
        out |= {family.experts.chosen, *family.experts.groups}
    return out - {""}


def _others(facts: Facts, source: Config, target: Config, full: Config) -> Iterator[str]:
    """Every field that no rule looks at must be the source's, or what its class fills in."""
    experts = facts.family.experts
    handled = _handled(facts.family) | set((experts.whole if experts is not None and facts.routed else None) or ())
    parts = {name[:at] for name in handled for at, letter in enumerate(name) if letter == "."}
    names = {name for config in (source, target) for name in _names(config, parts)}
    for name in sorted(names - handled):
        found = _plain(lookup(target, name))
        if found != _plain(lookup(source, name)) and (not _has(target, name) or found != _plain(lookup(full, name))):
            required = lookup(source if _has(source, name) else full, name)
            yield f"config field {name}: found {found!r}; required {required!r}"


def _names(config: Config, parts: set[str]) -> Iterator[str]:
    """The names of all fields; of a part of the config that some rule reaches into, of its fields."""
    for name, value in config.items():
        if name in parts and isinstance(value, Mapping):
            inner = {part.partition(".")[2] for part in parts if part.startswith(f"{name}.")}
            yield from (f"{name}.{field}" for field in _names(value, inner))
        else:
            yield name


def _has(config: Config, name: str) -> bool:
    first, _, rest = name.partition(".")
    inner = config.get(first)
    return first in config and (not rest or (isinstance(inner, Mapping) and _has(inner, rest)))


def _plain(value: object) -> object:
    """As JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def _eps(facts: Facts, name: str, target: Config, full: Config) -> list[str]:
    roles = {role: norm for role, norm in facts.family.norms.items() if norm.eps == name and role in facts.norms.seen}
    rhos = {", ".join(norm.axes): facts.norms.rho(role) for role, norm in roles.items()}
    if not rhos:
        return []  # said already: these norms see what they cannot
    if len(set(rhos.values())) > 1:
        said = ", ".join(f"{axis} x {rho}" for axis, rho in sorted(rhos.items()))
        return [f"config field {name}: norms over several axes share it, and their mean squares change apart: {said}"]
    rho, old = next(iter(rhos.values())), lookup(full, name)
    found = lookup(target if _has(target, name) else full, name)
    if rho == 1 and not _has(target, name) and not _has(full, name):
        return []
    if not isinstance(old, int | float) or not isinstance(found, int | float):
        return [f"config field {name}: source {old!r}, target {found!r}; both are needed"]
    if rho != 1 and not _has(target, name):
        return [f"config field {name}: missing in the target, where it must be {float(rho * Fraction(old))!r}"]
    required = float(rho * Fraction(old))
    if abs(found - required) > (math.ulp(required) if rho != 1 else 0.0):
        return [f"config field {name}: found {found!r}; required {required!r} ({old!r} x {rho})"]
    return []


def _length(facts: Facts, norm: Norm, target: Config, full: Config) -> list[str]:
    """The length that a norm over a sum gives stays, and is stated, for its class may work out another from the size.

    Where its axis stays, the source need not state it either.
    """
    still = all(facts.axes[axis].is_identity for axis in norm.axes)
    if not norm.length or (still and not _has(target, norm.length)):
        return []
    found, required = lookup(target, norm.length), lookup(full, norm.length)
    said = f"config field {norm.length}: found {found!r}; required {required!r}, whatever the size of"
    return [] if found == required and found is not None else [f"{said} {', '.join(norm.axes)}"]


def _experts(facts: Facts, target: Config, full: Config) -> list[str]:
    """As often as every expert is there, so many more are chosen, of so many more groups; barred ones change neither.

    Barred experts stand in groups of their own, or among those of the old groups.
    """
    experts = facts.family.experts
    axis = None if experts is None else facts.axes.get(experts.axis)
    if experts is None or axis is None:
        return []
    if facts.routed:
        return _chosen(experts, axis.new, target)
    times, problems = 1 if axis.barred else axis.times or 1, list[str]()
    counts = dict.fromkeys((experts.chosen, *experts.groups), times)
    if axis.barred:
        counts.pop(next(iter(experts.groups), ""), None)
        problems += check_groups(experts, axis, target, full)
    for name, by in counts.items():
        old = lookup(full, name)
        found = lookup(target if _has(target, name) or by > 1 else full, name)
        required = old * by if isinstance(old, int) else old
        if found != required or (by > 1 and not isinstance(old, int)):
            problems.append(f"config field {name}: found {found!r}; required {required!r} ({old!r} x {by})")
    for name, wanted in experts.requires.items() if times > 1 else ():
        if lookup(full, name) != wanted:
            problems.append(f"config field {name}: {lookup(full, name)!r} with copies of experts; required {wanted!r}")
    return problems


def _chosen(experts: Experts, count: int, target: Config) -> list[str]:
    """A new router takes any number of whole copies, where the weights of those it takes add up to one."""
    found, problems = lookup(target, experts.chosen), []
    if not isinstance(found, int) or not 1 <= found <= count:
        problems.append(f"config field {experts.chosen}: found {found!r}; required 1 to {count}, the experts there are")
    for name, wanted in (experts.whole or {}).items():
        if lookup(target, name) != wanted:
            problems.append(
                f"config field {name}: found {lookup(target, name)!r}; required {wanted!r}, for the weights of "
                f"a token's experts must add up to one"
            )
    return problems


def _per_layer(name: str, kind: PerLayer, layers: Sequence[int | None], target: Config, full: Config) -> list[str]:
    old, new = lookup(full, name), lookup(target, name)
    if old is None or (new is None and list(layers) == list(range(len(layers)))):
        return [] if new is None or new == old else [f"config field {name}: found {new!r}; required {old!r}"]
    try:
        return list(_BY_KIND[kind](name, old, new, layers))
    except (TypeError, ValueError, IndexError):
        return [f"config field {name}: found {new!r}, which cannot be read as {old!r}; both must speak of layers"]


def _each(name: str, old: Sequence[Any], new: Any, layers: Sequence[int | None]) -> Iterator[str]:
    if new is None and len({str(entry) for entry in old}) == 1:
        return
    if new is None:
        # The class fills the list by a rule on the layer's number, which moves with the layers.
        yield f"config field {name}: missing in the target; layers moved, so it must be written"
    elif not isinstance(new, list | tuple) or len(new) != len(layers):
        yield f"config field {name}: found {new!r}; required one entry for each of {len(layers)} layers"
    else:
        for i, like in enumerate(likes(layers)):
            if new[i] != old[like]:
                yield f"config field {name}[{i}]: found {new[i]!r}; required {old[like]!r}"
                return


def _runs(name: str, old: Any, new: Any, layers: Sequence[int | None]) -> Iterator[str]:
    flat = [[entry for entries, times in runs for _ in range(times) for entry in entries] for runs in (old, new or [])]
    yield from _each(name, flat[0], flat[1], layers)


def _numbers(name: str, old: Sequence[int], new: Any, layers: Sequence[int | None]) -> Iterator[str]:
    required = [i for i, like in enumerate(likes(layers)) if like in old]
    if new is None and not required:
        return
    if new is None or sorted(new) != required:
        yield f"config field {name}: found {new!r}; required {required!r}"


def _first(name: str, old: int, new: Any, layers: Sequence[int | None]) -> Iterator[str]:
    required = sum(like < old for like in likes(layers))
    if new != required:
        yield f"config field {name}: found {new!r}; required {required!r}, the first layers of their kind"


def _last(name: str, old: int, new: Any, layers: Sequence[int | None]) -> Iterator[str]:
    count = len(layers) - list(layers).count(None)
    required = sum(like >= count - old for like in likes(layers))
    if new != required:
        yield f"config field {name}: found {new!r}; required {required!r}, the last layers of their kind"


def _by_number(entries: Any) -> dict[int, Mapping[str, Any]]:
    return {int(layer): entry for layer, entry in (entries or {}).items()}


def _keyed(facts: Facts, name: str, layers: Sequence[int | None], target: Config, full: Config) -> Iterator[str]:
    """What single layers have of their own must be sizes of the family's axes, and those that the receipt says."""
    defaults = {axis: s.default if isinstance(s, Field) else s for axis, s in facts.family.axes.items()}
    own = {axis: size for axis, size in defaults.items() if isinstance(size, Layered) and size.overrides == name}
    try:
        old, new = (_by_number(lookup(config, name)) for config in (full, target))
        for i, like in enumerate(likes(layers)):
            required = {
                s.field: facts.axes[axis].new for axis, s in own.items() if lookup(full, s.types)[like] == s.type
            }
            for field in sorted({*old.get(like, {}), *new.get(i, {}), *required}):
                found = new.get(i, {}).get(field, lookup(target if _has(target, field) else full, field))
                if field not in required:
                    yield f"config field {name}[{i}]: it has a {field} of its own, which no axis is; not covered"
                elif found != required[field]:
                    yield f"config field {name}[{i}]: {field} is {found!r}; required {required[field]!r}"
    except (AttributeError, TypeError, ValueError, IndexError):
        yield f"config field {name}: found {lookup(target, name)!r}, which cannot be read as sizes by layer"


def _lends(family: Family, layers: Sequence[int | None], target: Config, full: Config) -> Iterator[str]:
    """The layers that lend keys and values to the last ones must be those that did."""
    if family.lends is None:
        return
    found = []
    for config in (full, target):
        kinds = lookup(config if _has(config, family.lends.types) else full, family.lends.types)
        count = lookup(config if _has(config, family.lends.count) else full, family.lends.count)
        if not isinstance(kinds, list | tuple) or not isinstance(count, int) or not 0 <= count <= len(kinds):
            yield f"config field {family.lends.count}: found {count!r} of layers {kinds!r}; not covered"
            return
        first = len(kinds) - count
        found.append(
            {max(i for i in range(first) if kinds[i] == kind) for kind in {*kinds[:first]}} if count else set()
        )
    lenders = {list(layers).index(old) for old in found[0] if old in layers}
    if found[1] != lenders:
        yield (
            f"config field {family.lends.count}: layers {sorted(found[1])} lend keys and values to the last ones; "
            f"required {sorted(lenders)}, those that did in the source"
        )


_BY_KIND = {"each": _each, "runs": _runs, "numbers": _numbers, "first": _first, "last": _last}
