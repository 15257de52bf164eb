"""Rotary positions under growth: which sizes keep the old pairs' frequencies, and what config.json must say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from growformer.algebra import Rotary
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth

Rope = dict[str, Any]

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


def ropes(full: Mapping[str, Any]) -> dict[str, Rope]:
    """The sets of rope parameters of a config: one under the name "", or one for each layer type."""
    stated = full.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise RequestError(f"config.json: rope_parameters is {stated!r}, not an object")
    if any(isinstance(value, Mapping) for value in stated.values()):
        return {name: dict(value) for name, value in stated.items() if isinstance(value, Mapping)}
    return {"": dict(stated)}


def rotary_config(
    rotary: Rotary, raw: Mapping[str, Any], full: Mapping[str, Any], key: AxisGrowth, config: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Write the rope fields of the grown model, in both key styles (older readers silently ignore the new one).

    Where all channels turn, the base becomes theta^(k'/k), which keeps every old pair's frequency. Where only the
    first do, the new ones are not turned, and the fraction that is shrinks.

    Returns:
        The config with the fields written, and notes.

    Raises:
        RequestError: a set of rope parameters that has no positive base.
    """
    if rotary.turned:
        return config, []
    notes: list[str] = []
    sets = {
        name: _grown(rotary, rope, key, notes) if rotary.set in ("", name) else rope
        for name, rope in ropes(full).items()
    }
    flat = sets.get("")
    if flat is None:
        return {**config, "rope_parameters": sets}, notes
    out = {**config, "rope_parameters": flat, "rope_theta": flat["rope_theta"]}
    kind = flat.get("rope_type", "default")
    if rotary.partial:
        out[rotary.partial] = flat["partial_rotary_factor"]
    if kind != "default":
        out["rope_scaling"] = {k: v for k, v in flat.items() if k not in ("rope_theta", "partial_rotary_factor")}
    elif raw.get("rope_scaling") is not None:
        out["rope_scaling"] = None
    return out, notes


def _grown(rotary: Rotary, rope: Rope, key: AxisGrowth, notes: list[str]) -> Rope:
    theta, kind = rope.get("rope_theta"), rope.get("rope_type", "default")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise RequestError(
            f"config.json: rope_parameters has rope_theta={theta!r}; one positive number is served, for each layer type"
        )
    if key.new == key.old:
        return rope
    if rotary.partial:
        old = float(rope["partial_rotary_factor"])
        turned = int(key.old * old)
        new = turned_fraction(turned, key.new)
        notes.append(f"partial_rotary_factor {old:g} -> {new:g}: {turned} channels of a head turn, as before")
        return {**rope, "partial_rotary_factor": new}
    if kind in rotary.inside:
        notes.append(f"rope_type {kind!r}: exact up to max_position_embeddings only")
    base = float(theta) ** (key.new / key.old)
    if kind == "proportional":
        # It turns the first pairs of the whole head by its own fraction, and the others not at all.
        pairs = int(float(rope.get("partial_rotary_factor", 1.0)) * key.old // 2)
        rope = {**rope, "partial_rotary_factor": turned_fraction(2 * pairs, key.new)}
        notes.append(f"rope_type 'proportional': {pairs} pairs of a head turn, as before")
    notes.append(f"rope_theta {theta:g} -> {base:g}: theta^({key.new}/{key.old}) keeps every old pair's frequency")
    return {**rope, "rope_theta": base}


def turned_channels(rotary: Rotary, size: int, full: Mapping[str, Any]) -> int:
    """How many of a head's channels turn."""
    if rotary.turned:
        return int(full[rotary.turned])
    if not rotary.partial:
        return size
    return int(size * float(ropes(full).get("", {}).get("partial_rotary_factor", 1.0)))


def turned_fraction(turned: int, size: int) -> float:
    """The fraction f with int(size * f) == turned, nearest to turned / size (a plain quotient misses one in many)."""
    fraction = turned / size
    while int(size * fraction) < turned:
        fraction = math.nextafter(fraction, 1.0)
    return fraction


def widest(rope: Mapping[str, Any], size: int) -> int | None:
    """The largest size at which the base theta^(size'/size) is still a float32, in which models compute their tables.

    None where the base is none that grows.
    """
    theta = rope.get("rope_theta")
    if not isinstance(theta, (int, float)) or not 1 < theta < math.inf:
        return None
    return int(size * math.log(FLOAT32_MAX) / math.log(theta)) // 2 * 2
