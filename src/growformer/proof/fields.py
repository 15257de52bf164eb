"""Whether a target config differs from its source only in what the receipt's axes demand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from growformer.algebra.family import Family, Field, Size, Times
from growformer.proof.facts import Facts

Config = Mapping[str, Any]

_NOTES = ("transformers_version", "dtype", "torch_dtype")
"""Fields that say how the files were written; the files themselves are looked at."""
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
_BY_FREQUENCY = ("default", "linear", "llama3")
"""Rope types that treat each frequency for itself, whatever its place, so that pairs may move among places."""


def size_of(config: Config, size: Size, source: Config, full: Config) -> int:
    """How many channels `config` gives an axis.

    Raises:
        ValueError: where neither the config nor a default says.
    """
    if isinstance(size, Field):
        value = config.get(size.name)
        if value is None and source.get(size.name) is None:
            # What the class fills in: a constant, unless it is what other fields give, which then decide.
            filled = full.get(size.name)
            if size.default is None or (filled is not None and filled != size_of(full, size.default, source, full)):
                value = filled
        if value is None and size.default is not None:
            return size_of(config, size.default, source, full)
        if value is None:
            raise ValueError(f"config field {size.name} is missing")
        return int(value)
    if isinstance(size, Times):
        return size.times * size_of(config, Field(size.field), source, full)
    over, by = (size_of(config, Field(name), source, full) for name in (size.over, size.by))
    if by < 1 or over % by:
        raise ValueError(f"config: {size.over} {over} is no multiple of {size.by} {by}")
    return over // by


def size_fields(size: Size | None) -> set[str]:
    """Every config field that a size is made of."""
    if isinstance(size, Field):
        return {size.name} | size_fields(size.default)
    return set() if size is None else {size.field} if isinstance(size, Times) else {size.over, size.by}


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


def check_fields(facts: Facts, layers: Sequence[int | None], source: Config, target: Config, full: Config) -> list[str]:
    """What in the target config is other than the axes and the layer map demand.

    Args:
        facts: the axes and what follows from them.
        layers: the source layer of each target layer, None for a new one.
        source: config.json of the source.
        target: config.json of the target.
        full: the source's config with every default filled in, or `source` again.
    """
    family, problems = facts.family, list[str]()
    sizes = {name for size in family.axes.values() for name in size_fields(size)}
    eps = {norm.eps for norm in family.norms.values()}
    handled = {*sizes, *eps, *family.per_layer, *_NOTES, *(_ROPE if family.attention.rotary else ())}
    for name in sorted({*source, *target} - handled):
        found = _plain(target.get(name))
        if found != _plain(source.get(name)) and (name not in target or found != _plain(full.get(name))):
            problems.append(f"config field {name}: found {found!r}; required {source.get(name, full.get(name))!r}")
    for name, wanted in family.requires.items():
        if full.get(name, wanted) != wanted:
            problems.append(f"config field {name}: {full.get(name)!r} is not covered; required {wanted!r}")
    for rule in family.rules:
        over, by = (target.get(name, full.get(name)) for name in (rule.over, rule.by))
        if isinstance(over, int) and isinstance(by, int) and over % by:
            problems.append(f"config field {rule.over}: found {over}; required a multiple of {rule.by} = {by}")
    for name in sorted(eps):
        problems += _eps(facts, name, target, full)
    for name in family.per_layer:
        problems += _per_layer(name, layers, target, full)
    if family.attention.rotary is not None:
        problems += _rotary(facts, source, target, full)
    return problems


def _plain(value: object) -> object:
    """As JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def _eps(facts: Facts, name: str, target: Config, full: Config) -> list[str]:
    axes = {norm.axis for norm in facts.family.norms.values() if norm.eps == name}
    rhos = {axis: facts.rho[axis] for axis in axes if axis in facts.rho}
    if not rhos:
        return []  # said already: these norms see what they cannot
    if len(set(rhos.values())) > 1:
        said = ", ".join(f"{axis} x {rho}" for axis, rho in sorted(rhos.items()))
        return [f"config field {name}: norms over several axes share it, and their mean squares change apart: {said}"]
    rho, old, found = next(iter(rhos.values())), full.get(name), target.get(name, full.get(name))
    if rho == 1 and name not in target and name not in full:
        return []
    if not isinstance(old, int | float) or not isinstance(found, int | float):
        return [f"config field {name}: source {old!r}, target {found!r}; both are needed"]
    if rho != 1 and name not in target:
        return [f"config field {name}: missing in the target, where it must be {float(rho * Fraction(old))!r}"]
    required = float(rho * Fraction(old))
    if abs(found - required) > (math.ulp(required) if rho != 1 else 0.0):
        return [f"config field {name}: found {found!r}; required {required!r} ({old!r} x {rho})"]
    return []


def _per_layer(name: str, layers: Sequence[int | None], target: Config, full: Config) -> list[str]:
    old, new = full.get(name), target.get(name)
    if old is None or (new is None and list(layers) == list(range(len(layers)))):
        return [] if new is None or new == old else [f"config field {name}: found {new!r}; required {old!r}"]
    if new is None and len(set(old)) == 1:
        return []
    if new is None:
        # The class fills the list by a rule on the layer's number, which moves with the layers.
        return [f"config field {name}: missing in the target; layers moved, so it must be written"]
    if not isinstance(new, list | tuple) or len(new) != len(layers):
        return [f"config field {name}: found {new!r}; required one entry for each of {len(layers)} layers"]
    for i, layer in enumerate(layers):
        if layer is not None:
            required = old[layer]
        elif i:
            required = new[i - 1]
        else:
            first = next((layer for layer in layers if layer is not None), 0)
            required = old[first]
        if new[i] != required:
            return [f"config field {name}[{i}]: found {new[i]!r}; required {required!r}"]
    return []


def _rope(config: Config) -> tuple[list[float], list[dict[str, Any]]]:
    """Every theta that a config states, and every statement of the other rope fields."""
    thetas = [config["rope_theta"]] if config.get("rope_theta") is not None else []
    rest = []
    for name in ("rope_parameters", "rope_scaling"):
        stated = config.get(name)
        if isinstance(stated, Mapping):
            fields = dict(stated)
            if "rope_theta" in fields:
                thetas.append(fields.pop("rope_theta"))
            fields["rope_type"] = fields.pop("type", None) or fields.get("rope_type") or "default"
            rest.append({k: v for k, v in fields.items() if k != "type"})
        elif name == "rope_scaling" and name in config and not isinstance(config.get("rope_parameters"), Mapping):
            rest.append({"rope_type": "default"})
    return [float(theta) for theta in thetas], rest


def _rotary(facts: Facts, source: Config, target: Config, full: Config) -> list[str]:
    rotary, pairs = facts.family.attention.rotary, facts.rotary_positions()
    if facts.key is None or rotary is None or pairs is None:
        return []
    axis = facts.axes[facts.key]
    still = axis.old == axis.new and pairs == list(range(len(pairs)))
    (old_thetas, old_rest), (thetas, rest) = _rope(full), _rope(target)
    # A config class may add to the rope fields what it derives: either way of writing them is the source's.
    kept = [*old_rest, *_rope(source)[1]] or [{"rope_type": "default"}]
    if any(isinstance(v, Mapping) for fields in (*kept, *rest) for v in fields.values()):
        return ["config field rope_parameters: one set for each layer type is not covered"]
    for side, stated in (("source", old_thetas), ("target", thetas)):
        if len(set(stated)) > 1:
            return [f"config field rope_theta: the {side} contradicts itself: {stated}"]
    if not old_thetas and not thetas and still:
        old_thetas = thetas = [1.0]  # both fall back on the same default
    if not old_thetas or not (thetas or still):
        return [f"config field rope_theta: source {old_thetas}, target {thetas}; both are needed"]
    if any(fields not in kept for fields in rest or [{"rope_type": "default"}]):
        return [f"config field rope_parameters: found {rest}; required {kept[0]}"]
    theta, found = old_thetas[0], (thetas or old_thetas)[0]
    if still:
        return [] if found == theta else [f"config field rope_theta: found {found!r}; required {theta!r}"]
    places = rotary.steady if pairs == list(range(len(pairs))) else _BY_FREQUENCY
    if kept[0]["rope_type"] not in places:
        return [f"config field rope_parameters: type {kept[0]['rope_type']!r} moves its frequencies"]
    for i, place in enumerate(pairs):
        # theta'^(-2 i'/key') = theta^(-2 i/key), solved for theta'.
        if (place == 0) != (i == 0):
            return [f"axis {axis.name}: rotary pair {i} sits at pair {place}, which turns with another frequency"]
        required = theta ** float(Fraction(i * axis.new, axis.old * place)) if i else found
        if abs(found - required) > 4 * 2.0**-52 * required:
            return [
                f"config field rope_theta: found {found!r}; required {required!r} = {theta!r} ^ "
                f"({i} x {axis.new} / ({axis.old} x {place})), for rotary pair {i} to keep its frequency"
            ]
    return []
