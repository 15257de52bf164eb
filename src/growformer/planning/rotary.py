"""Rotary positions under growth: which sizes keep the old pairs' frequencies, and what config.json must say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from growformer.algebra import Rotary
from growformer.errors import RequestError
from growformer.planning.frequencies import STATIC, listed
from growformer.planning.growth import AxisGrowth
from growformer.planning.moves import Refused, up

Rope = dict[str, Any]

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127

TYPES: Mapping[str, tuple[str, ...]] = {
    "strided": ("default", "linear", "llama3", "yarn", "dynamic"),
    "longrope": STATIC,
    "proportional": ("default", "linear"),
}
"""The rope types that each of the chosen ways (see `ROPES`) can start from."""

WARNINGS: Mapping[str, str] = {
    "longrope": (
        "rope=longrope: llama.cpp's converter drops the list of factors, and computes wrong logits without an error; "
        "vLLM ignores attention_factor"
    ),
    "proportional": (
        "rope=proportional: llama.cpp turns the new pairs as well, so that it drifts off once they are trained; "
        "float32 tables differ by 4e-7 of a frequency, and older transformers do not know the type"
    ),
}
"""What else a grown model runs in, and what becomes of it there (measured with llama.cpp 0.5 and vLLM 0.32)."""


def pair_places(old: int, new: int, layout: str = "half", *, strided: bool = False) -> list[int]:
    """Where the old channels of a rotary head go: pair i stays pair i, or becomes pair m i, m = new / old."""
    step = new // old if strided else 1
    if layout == "interleaved":  # channel 2i turns with 2i + 1
        return [2 * step * (i // 2) + i % 2 for i in range(old)]
    return [step * i if i < old // 2 else step * (i - old // 2) + new // 2 for i in range(old)]


def ropes(full: Mapping[str, Any]) -> dict[str, Rope]:
    """The sets of rope parameters of a config: one under the name "", or one for each layer type."""
    stated = full.get("rope_parameters") or {}
    if not isinstance(stated, Mapping):
        raise RequestError(f"config.json: rope_parameters is {stated!r}, not an object")
    if any(isinstance(value, Mapping) for value in stated.values()):
        return {name: dict(value) for name, value in stated.items() if isinstance(value, Mapping)}
    return {"": dict(stated)}


def rotary_config(
    rotary: Rotary,
    raw: Mapping[str, Any],
    full: Mapping[str, Any],
    key: AxisGrowth,
    config: dict[str, Any],
    way: str = "theta",
) -> tuple[dict[str, Any], list[str]]:
    """Write the rope fields of the grown model, in both key styles (older readers silently ignore the new one).

    Where all channels turn, the base becomes theta^(k'/k), which keeps every old pair's frequency, unless another of
    `ROPES` was chosen. Where only the first do, the new ones are not turned, and the fraction that is shrinks.

    Returns:
        The config with the fields written, and notes.

    Raises:
        RequestError: a set of rope parameters that has no positive base.
    """
    if rotary.turned:
        return config, []
    notes: list[str] = []
    sets = {
        name: _grown(rotary, rope, key, notes, way, full) if rotary.set in ("", name) else rope
        for name, rope in ropes(full).items()
    }
    if key.new != key.old and way in WARNINGS:
        notes.append(WARNINGS[way])
    flat = sets.get("")
    if flat is None:
        return {**config, "rope_parameters": sets}, notes
    out = {**config, "rope_parameters": flat, "rope_theta": flat["rope_theta"]}
    kind = flat.get("rope_type", "default")
    if rotary.partial:
        out[rotary.partial] = flat["partial_rotary_factor"]
    if kind != "default":
        # A fraction that a key of its own does not hold as well stays, for rope_scaling wins over rope_parameters.
        apart = {"rope_theta", *(["partial_rotary_factor"] if rotary.partial else [])}
        out["rope_scaling"] = {k: v for k, v in flat.items() if k not in apart}
    elif raw.get("rope_scaling") is not None:
        out["rope_scaling"] = None
    return out, notes


def _grown(rotary: Rotary, rope: Rope, key: AxisGrowth, notes: list[str], way: str, full: Mapping[str, Any]) -> Rope:
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
    if way == "strided":
        notes.append(f"rope_theta {theta:g} stays: pair i becomes pair {key.new // key.old} i, of the same frequency")
        return rope
    if way == "longrope":
        notes.append(f"rope_type {kind} -> longrope: the frequencies of {key.new // 2} pairs are listed one by one")
        return listed(rope, key.old, key.new // 2, full.get("max_position_embeddings"))
    base = float(theta) ** (key.new / key.old)
    if kind == "proportional":
        # It turns the first pairs of the whole head by its own fraction, and the others not at all.
        pairs = int(float(rope.get("partial_rotary_factor", 1.0)) * key.old // 2)
        rope = {**rope, "partial_rotary_factor": turned_fraction(2 * pairs, key.new)}
        notes.append(f"rope_type 'proportional': {pairs} pairs of a head turn, as before")
    elif way == "proportional":
        fraction = turned_fraction(key.old, key.new)
        notes.append(f"rope_type {kind} -> proportional: {key.old // 2} pairs turn as before, and new ones do not")
        rope = {**rope, "rope_type": "proportional", "partial_rotary_factor": fraction}
    notes.append(f"rope_theta {theta:g} -> {base:g}: theta^({key.new}/{key.old}) keeps every old pair's frequency")
    return {**rope, "rope_theta": base}


def check_way(rotary: Rotary, way: str, name: str, old: int, new: int, sets: Mapping[str, Rope]) -> None:
    """Refuse a size under which old pairs cannot keep their frequencies in the chosen way.

    Args:
        rotary: of an axis whose channels all turn.
        way: one of `ROPES`, other than "theta".
        name: of the config field that grows.
        old, new: its values.
        sets: see `ropes`.

    Raises:
        RequestError: naming the rope type, or the nearest size that works.
    """
    if way == "longrope" and rotary.unlisted:
        raise RequestError(
            f"rope='longrope': {name} {old} -> {new}: {rotary.unlisted}; rope='theta' (the default) needs no list"
        )
    known = [kind for kind in TYPES[way] if kind in rotary.steady]
    for part, rope in sets.items():
        kind = rope.get("rope_type", "default")
        if kind not in known:
            raise RequestError(
                f"rope={way!r}: {name} {old} -> {new} under rope_type {kind!r}: it starts from {', '.join(known)}; "
                f"rope='theta' (the default) keeps the frequencies of {', '.join(rotary.steady)}"
            )
        if way == "strided" and kind == "yarn" and (part or rope.get("truncate", True) is not False):
            raise RequestError(
                f"rope='strided': {name} {old} -> {new} under rope_type 'yarn': its ramp is rounded to whole pairs, "
                f"which other places do not survive, unless truncate is false; rope='theta' (the default) is exact"
            )
    if way == "strided" and new % old:
        raise Refused(f"rope='strided': {name}={new} is no whole multiple of {old}", {name: up(new, old)})


def turned_channels(rotary: Rotary, size: int, full: Mapping[str, Any]) -> list[bool]:
    """Which of a head's channels turn."""
    if rotary.turned:
        count = int(full[rotary.turned])
    elif rotary.partial:
        count = int(size * float(ropes(full).get("", {}).get("partial_rotary_factor", 1.0)))
    else:
        # Under rope type "proportional" the first pairs do, whichever channels make a pair.
        mine = [rope for name, rope in ropes(full).items() if rotary.set in ("", name)]
        kinds = [(rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)) for rope in mine]
        shares = [float(fraction) if kind == "proportional" else 1.0 for kind, fraction in kinds]
        share = max(shares, default=1.0)
        turns = set(pair_places(2 * int(share * size // 2), size, rotary.layout))
        return [share == 1.0 or i in turns for i in range(size)]
    return [i < count for i in range(size)]


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
