"""The target's config.json: sizes, eps, rotary base, per-layer lists; nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from growformer.algebra import Family, Field
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth, Growth
from growformer.planning.ports import eps_factor
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


def check_fields(family: Family, full: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse a config whose switches the family does not describe.

    Args:
        family: the model family.
        full: the source's config with the class's defaults filled in.
        defaults: the class's config as it is without arguments.

    Raises:
        RequestError: a declared field that is not at its default and that no fact covers, by name; or an eps that is
            no finite number.
    """
    for name, value in family.requires.items():
        if full.get(name) != value:
            raise RequestError(
                f"config.json: {name}={full.get(name)!r} changes what {family.name} computes in a way that is not "
                f"served; only {name}={value!r} is"
            )
    for eps in dict.fromkeys(norm.eps for norm in family.norms.values()):
        value = full.get(eps)
        if not isinstance(value, float) or not 0 <= value < math.inf:
            raise RequestError(f"config.json: {eps}={value!r}; an eps is a finite number, 0 or more, such as 1e-05")
    known = BASE_FIELDS | set(family.neutral) | set(family.per_layer) | set(family.requires)
    known |= {size.name for size in family.axes.values() if isinstance(size, Field)}
    known |= {norm.eps for norm in family.norms.values()}
    for name, value in full.items():
        if name in defaults and name not in known and value != defaults[name]:
            raise RequestError(
                f"config.json: {name}={value!r} is not {family.name}'s default ({defaults[name]!r}), "
                f"and no fact of the family says what growth must do about it"
            )


def target_config(
    family: Family, raw: Mapping[str, Any], full: Mapping[str, Any], growth: Growth, sizes: Sizes
) -> tuple[dict[str, Any], list[str]]:
    """The grown model's config.json, and warnings.

    Args:
        family: the model family.
        raw: the source's config.json.
        full: the same with the class's defaults filled in.
        growth: the growth of every axis.
        sizes: old and new sizes.

    Raises:
        RequestError: where a field cannot say what the growth needs.
    """
    config = dict(raw)
    notes: list[str] = []
    for name, value in sizes.fields.items():
        config[name] = value
    for role, norm in family.norms.items():
        axis = growth.at(norm.axis)
        if eps_factor(axis) != 1:
            if family.shared_eps(norm):
                raise RequestError(f"{norm.eps} serves norms over several axes; it cannot be rescaled for {role} alone")
            config[norm.eps] = float(Fraction(full[norm.eps]) * eps_factor(axis))
    if family.attention.rotary is not None:
        notes += _rotary(family, raw, full, growth.at("key"), config)
    layers = growth.at(family.layer)
    for name in family.per_layer:
        old = full.get(name)
        if isinstance(old, list):
            config[name] = [old[layers.like[i] if s is None else s] for i, s in enumerate(layers.sources)]
    return config, notes


def _rotary(
    family: Family, raw: Mapping[str, Any], full: Mapping[str, Any], key: AxisGrowth, config: dict[str, Any]
) -> list[str]:
    """Write the rotary base in both key styles (older readers silently ignore the new one); theta' = theta^(k'/k)."""
    rotary = family.attention.rotary
    rope = dict(full.get("rope_parameters") or {})
    theta, kind = rope.get("rope_theta"), rope.get("rope_type", "default")
    if rotary is None or isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise RequestError(
            f"config.json: rope_parameters has rope_theta={theta!r}; one positive number is served, for all layers"
        )
    notes = []
    if key.new != key.old:
        if kind in rotary.inside:
            notes.append(f"rope_type {kind!r}: exact up to max_position_embeddings only")
        was, theta = float(theta), float(theta) ** (key.new / key.old)
        notes.append(f"rope_theta {was:g} -> {theta:g}: theta^({key.new}/{key.old}) keeps every old pair's frequency")
    rope["rope_theta"] = theta
    config["rope_parameters"] = rope
    config["rope_theta"] = theta
    if kind != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    elif raw.get("rope_scaling") is not None:
        config["rope_scaling"] = None
    return notes
