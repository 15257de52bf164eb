"""The frequency of every rotary pair, worked out from what a config states: for sets whose rope types differ.

Written from what the stock rope functions compute, apart from the planner, whose lists this judges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from growformer.algebra.facts import Rotary

Rope = Mapping[str, Any]

ULP = 2.0**-52

LISTED = ("longrope", "proportional")
"""Rope types that a source of another type may be written as, for each keeps frequencies that it is given."""

_LONGROPE = {
    "rope_type",
    "short_factor",
    "long_factor",
    "attention_factor",
    "factor",
    "original_max_position_embeddings",
}


def frequencies(rope: Rope, theta: float, size: int) -> tuple[Tensor, float]:
    """The frequency of each pair of a head [size / 2], and what cosines and sines are multiplied by.

    Raises:
        ValueError: a type whose frequencies are not known, or change with the length of the text.
        KeyError, TypeError: a field is missing, or is no number.
    """
    kind = rope.get("rope_type", "default")
    powers = torch.tensor([2 * i / size for i in range(size // 2)], dtype=torch.float64)
    plain = torch.pow(torch.tensor(float(theta), dtype=torch.float64), -powers)
    if kind in ("default", "dynamic"):  # a dynamic one up to the longest text only
        return plain, 1.0
    if kind == "linear":
        return plain / float(rope["factor"]), 1.0
    if kind == "proportional":
        turning = int(float(rope["partial_rotary_factor"]) * size // 2)
        return torch.where(torch.arange(size // 2) < turning, plain, 0.0) / float(rope.get("factor", 1.0)), 1.0
    if kind == "longrope":
        short, long = (torch.tensor(rope[name], dtype=torch.float64) for name in ("short_factor", "long_factor"))
        if short.shape != plain.shape or not torch.equal(short, long):
            raise ValueError(f"its two lists of factors should be equal, with {size // 2} entries")
        return plain / short, float(rope["attention_factor"])
    if kind == "llama3":
        return _llama3(rope, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, float(theta), size), _yarn_attention(rope)
    raise ValueError(f"type {kind!r} is not covered")


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length, wave = float(rope["original_max_position_embeddings"]), 2 * math.pi / plain
    part = (length / wave - low) / (high - low)
    blended = (1 - part) * plain / factor + part * plain
    return torch.where(wave > length / low, plain / factor, torch.where(wave < length / high, plain, blended))


def _yarn(rope: Rope, plain: Tensor, theta: float, size: int) -> Tensor:
    length, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    ends = [
        size * math.log(length / (2 * math.pi * float(turns))) / (2 * math.log(theta))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    ]
    if rope.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    start, stop = max(ends[0], 0), min(ends[1], size - 1)
    span = (stop - start) or 0.001
    kept = 1 - ((torch.arange(len(plain), dtype=torch.float64) - start) / span).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept


def _yarn_attention(rope: Rope) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scale, all_dim, log = rope.get("mscale"), rope.get("mscale_all_dim"), math.log(max(float(rope["factor"]), 1.0))
    if scale and all_dim:
        return (0.1 * float(scale) * log + 1) / (0.1 * float(all_dim) * log + 1)
    return 0.1 * log + 1


def check_rewritten(
    rotary: Rotary,
    sizes: tuple[int, int],
    pairs: list[int],
    old: Rope,
    new: Rope,
    thetas: tuple[float, float],
    full: Rope,
) -> Iterator[str]:
    """What is wrong where a set of rope parameters was written as another type, or moves pairs that its type sees.

    Args:
        rotary: the facts.
        sizes: how many channels turn, in the source and in the target.
        pairs: for each old pair, the pair it moved to.
        old, new: the two sets, theta aside.
        thetas: of the source and of the target.
        full: the source's config.
    """
    kinds = [rope.get("rope_type", "default") for rope in (old, new)]
    if kinds[0] not in rotary.steady or (kinds[0] == "dynamic" and kinds[1] != "dynamic"):
        yield f"config field rope_parameters: type {kinds[0]!r} moves its frequencies"
        return
    try:
        (had, times), (have, new_times) = (
            frequencies(rope, theta, size) for rope, theta, size in zip((old, new), thetas, sizes, strict=True)
        )
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        yield f"config field rope_parameters: {new!r:.200}: {type(error).__name__}: {error}"
        return
    if kinds[0] != kinds[1]:
        yield from _others(old, new, full)
    # Rounding an exponent by half an ulp moves the power by that much of its logarithm; some products round as well.
    slack = (8 + 2 * max(abs(math.log(theta)) for theta in thetas)) * ULP
    if abs(times - new_times) > slack * times:
        yield f"config field rope_parameters: attention_factor {new_times!r}; required {times!r}, as in the source"
    for i, place in enumerate(pairs):
        if abs(float(have[place]) - float(had[i])) > slack * float(had[i]):
            yield (
                f"config field rope_parameters: rotary pair {i} sits at pair {place}, which turns with "
                f"{float(have[place])!r}; required {float(had[i])!r}"
            )
            return


def _others(old: Rope, new: Rope, full: Rope) -> Iterator[str]:
    """What a set written as another type must hold beside its frequencies, and may not."""
    if new.get("rope_type") == "proportional":
        wanted = {name: old[name] for name in ("factor",) if name in old}
        allowed = {"rope_type", "partial_rotary_factor", *wanted}
    else:
        # A softmax that is scaled by these (DeepSeek's) is so under every type but the default.
        scaled = bool(old.get("mscale_all_dim")) and old.get("rope_type", "default") != "default"
        wanted = {"original_max_position_embeddings": full.get("max_position_embeddings")}
        wanted |= {name: old.get(name) for name in ("factor", "mscale_all_dim")} if scaled else {"factor": 1.0}
        allowed = _LONGROPE | set(wanted)
    for name in sorted(set(new) - allowed):
        yield f"config field rope_parameters: {name}={new[name]!r:.80} has no place under type {new.get('rope_type')!r}"
    for name, value in wanted.items():
        if new.get(name) != value:
            yield f"config field rope_parameters: {name}={new.get(name)!r}; required {value!r}"
