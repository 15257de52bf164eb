"""The target's config.json: sizes, eps, rotary base, per-layer lists; nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

from growformer.algebra import Family, Field, Layered, PerLayer, assigned, fields_of, lookup
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.ports import eps_factor
from growformer.planning.rotary import rotary_config
from growformer.planning.sizes import Sizes

# Keys of PretrainedConfig itself, which say nothing of the function that weights compute.
BASE_FIELDS = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path"),
        *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "id2label", "label2id", "problem_type", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "rope_theta", "rope_scaling"),
    }
)


def check_fields(
    family: Family,
    full: Mapping[str, Any],
    defaults: Mapping[str, Any],
    read: Collection[str] = (),
    ignored: Collection[str] = (),
) -> list[str]:
    """Refuse a config whose switches the family does not describe.

    Args:
        family: the model family.
        full: the source's config with the class's defaults filled in.
        defaults: the class's config as it is without arguments.
        read: names of config fields that the modelling code reads.
        ignored: fields that the user takes upon himself.

    Returns:
        Notes: fields that nobody declares and nobody reads, which are carried along, and those that were ignored.

    Raises:
        RequestError: a field that is not at its default, or that the class does not declare and its code reads, and
            that no fact covers, by name; or an eps that is no finite number.
    """
    for name, value in family.requires.items():
        if lookup(full, name) != value:
            raise RequestError(
                f"config.json: {name}={lookup(full, name)!r} changes what {family.name} computes in a way that is not "
                f"served; only {name}={value!r} is"
            )
    for eps in dict.fromkeys(norm.eps for norm in family.norms.values() if isinstance(norm.eps, str)):
        value = lookup(full, eps)
        if not isinstance(value, float) or not 0 <= value < math.inf:
            raise RequestError(f"config.json: {eps}={value!r}; an eps is a finite number, 0 or more, such as 1e-05")
    _check_keyed(family, full)
    known = BASE_FIELDS | known_fields(family)
    carried, notes = list[str](), list[str]()
    for name, value in _leaves(known, full):
        if name in known:
            continue
        declared = _declared(defaults, name)
        matters = value != lookup(defaults, name) if declared else name.split(".")[-1] in read and value is not None
        if matters and name in ignored:
            notes.append(f"{name}={value!r} is ignored, as asked: no fact of {family.name} covers it")
        elif matters:
            default = f"not {family.name}'s default ({lookup(defaults, name)!r})" if declared else "read by its code"
            raise RequestError(
                f"config.json: {name}={value!r} is {default}, and no fact of the family says what growth must do about "
                f"it (--ignore-field {name} goes on)"
            )
        elif not declared:
            carried.append(name)
    if carried:
        notes.append(f"carried along, read by no code: {', '.join(carried)}")
    return notes


def _check_keyed(family: Family, full: Mapping[str, Any]) -> None:
    """Refuse what a config states of single layers and no size of the family is."""
    owns = [size.default if isinstance(size, Field) else size for size in family.axes.values()]
    sizes = [size for size in owns if isinstance(size, Layered)]
    for name in (name for name, kind in family.per_layer.items() if kind == "keyed"):
        for layer, entry in (lookup(full, name) or {}).items():
            served = {s.field for s in sizes if s.overrides == name and full[s.types][int(layer)] == s.type}
            if odd := sorted(set(entry) - served):
                raise RequestError(
                    f"config.json: {name} gives layer {int(layer)} a {odd[0]} of its own ({entry[odd[0]]!r}), which no "
                    f"fact of {family.name} covers as the config stands"
                )


def known_fields(family: Family) -> set[str]:
    """The config fields that some fact of the family speaks of."""
    known = {*family.neutral, *family.per_layer, *family.requires, *family.optional.values(), *family.follows}
    known |= {*family.aliases, *(name for frozen in family.frozen for name in frozen.unless)}
    for size in family.axes.values():
        known |= fields_of(size)
    known |= {norm.eps for norm in family.norms.values() if isinstance(norm.eps, str)}
    known |= {norm.length for norm in family.norms.values() if norm.length}
    for rotary in (attention.rotary for attention in family.attentions):
        known |= {name for name in (rotary.partial, rotary.turned) if name} if rotary is not None else set()
    if family.experts is not None:
        known |= {family.experts.chosen, *family.experts.groups, *family.experts.requires}
    if family.tied is not None:
        known.add(family.tied.field)
    known |= {name for fields in family.kinds.values() for name in fields}
    return known | ({family.lends.types, family.lends.count} if family.lends is not None else set())


def _leaves(known: frozenset[str], full: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every field with its value; of a part of the config that some fact reaches into, its fields one by one."""
    parts = {name.split(".")[0] for name in known if "." in name} - BASE_FIELDS
    out: list[tuple[str, Any]] = []
    for name, value in full.items():
        if name in parts and isinstance(value, Mapping):
            out += [(f"{name}.{k}", v) for k, v in value.items() if k not in BASE_FIELDS]
        else:
            out.append((name, value))
    return out


def _declared(config: Mapping[str, Any], name: str) -> bool:
    first, _, rest = name.partition(".")
    if first not in config:
        return False
    return not rest or (isinstance(config[first], Mapping) and _declared(config[first], rest))


def target_config(
    family: Family,
    raw: Mapping[str, Any],
    full: Mapping[str, Any],
    growth: Growth,
    sizes: Sizes,
    rope: str = "theta",
) -> tuple[dict[str, Any], list[str]]:
    """The grown model's config.json, and warnings.

    Args:
        family: the model family.
        raw: the source's config.json.
        full: the same with the class's defaults filled in.
        growth: the growth of every axis.
        sizes: old and new sizes.
        rope: how rotary positions are to grow; one of `ROPES`.

    Raises:
        RequestError: where a field cannot say what the growth needs.
    """
    config = dict(raw)
    notes: list[str] = []
    for name, part in family.aliases.items():
        if isinstance(older := lookup(raw, name), Mapping):
            # A part of the config is there twice. The older one counts, and where it says nothing its class's default.
            both = {**(lookup(raw, part) or {}), **older}
            meant = {key: lookup(full, f"{part}.{key}") if key in lookup(full, part) else both[key] for key in both}
            config = assigned(assigned(config, part, meant), name, None)
    for name, value in sizes.fields.items():
        config = assigned(config, name, value)
    for role, norm in family.norms.items():
        factor = eps_factor(growth.at(norm.axes[0])) if len(norm.axes) == 1 else Fraction(1)
        if factor != 1:
            if family.fixed_eps(norm) or not isinstance(norm.eps, str):
                raise RequestError(f"the eps of norm {role} ({norm.eps}) is not its own; it cannot be rescaled")
            config = assigned(config, norm.eps, float(Fraction(lookup(full, norm.eps)) * factor))
        if norm.length and any(not growth.at(axis).is_identity for axis in norm.axes):
            config = assigned(config, norm.length, lookup(full, norm.length))
    stated = dict(full)
    for attention in family.attentions:
        if attention.rotary is not None:
            key = growth.at(attention.rotary.axis)
            config, said = rotary_config(attention.rotary, raw, stated, key, config, rope)
            notes += said
            if attention.rotary.set:  # another attention's set stands beside it
                stated["rope_parameters"] = config["rope_parameters"]
    for name, field in family.aliases.items():
        if lookup(raw, name) is not None and field in sizes.fields:
            config = assigned(config, name, sizes.fields[field])
    layers = growth.at(family.layer)
    for name, kind in family.per_layer.items():
        value = lookup(full, name)
        if value is not None and (kind != "runs" or layers.new != layers.old):
            config = assigned(config, name, per_layer(value, kind, layers))
    for axis, size in family.axes.items():
        own = size.default if isinstance(size, Field) else size
        if isinstance(own, Layered):
            config = _layered(own, config, sizes.new[axis])
    return config, notes


def _layered(size: Layered, config: Mapping[str, Any], value: int) -> dict[str, Any]:
    """The config with a size that layers of one type have to themselves written for each of them."""
    stated = {int(layer): dict(entry) for layer, entry in (lookup(config, size.overrides) or {}).items()}
    for layer, kind in enumerate(lookup(config, size.types)):
        if kind == size.type:
            stated.setdefault(layer, {})[size.field] = value
    return assigned(config, size.overrides, _keyed(stated))


def _keyed(entries: Mapping[int, Any]) -> dict[str, Any]:
    """Entries by layer number, padded as transformers pads them, so that JSON keeps their order."""
    digits = len(str(max(entries, default=0)))
    return {str(layer).zfill(digits): entry for layer, entry in sorted(entries.items())}


def per_layer(value: Any, kind: PerLayer, layers: AxisGrowth) -> Any:
    """What a config field that speaks of single layers becomes; a new layer is like the one before it."""
    olds = [layers.like[i] if source is None else source for i, source in enumerate(layers.sources)]
    if kind == "each":
        return [value[old] for old in olds]
    if kind == "numbers":
        return [i for i, old in enumerate(olds) if old in value]
    if kind in ("first", "last"):
        return sum(1 for old in olds if (old < value if kind == "first" else old >= layers.old - value))
    if kind == "keyed":
        stated = {int(layer): entry for layer, entry in value.items()}
        return _keyed({i: stated[old] for i, old in enumerate(olds) if old in stated})
    entries = [entry for names, times in value for _ in range(times) for entry in names]
    return [[[entries[old] for old in olds], 1]]
