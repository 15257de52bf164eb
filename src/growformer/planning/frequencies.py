"""The frequencies of rotary pairs under each rope type, in float64, and those written out in a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from growformer.errors import RequestError

Rope = Mapping[str, Any]


def periods(rope: Rope, size: int, pairs: int) -> list[float]:
    """For each pair, what positions are divided by: the inverse of its frequency.

    Pairs beyond `size` / 2 go on downward as the rope type does at theta^(n'/n).

    Args:
        rope: a set of rope parameters whose frequencies do not change with the length of the text.
        size: how many channels turn in the source.
        pairs: how many pairs to give.
    """
    kind = rope.get("rope_type", "default")
    plain = [float(rope["rope_theta"]) ** (2 * i / size) for i in range(pairs)]
    return _SCALED[kind](rope, size, plain)


def _default(rope: Rope, size: int, plain: list[float]) -> list[float]:
    return plain


def _linear(rope: Rope, size: int, plain: list[float]) -> list[float]:
    return [period * float(rope["factor"]) for period in plain]


def _llama3(rope: Rope, size: int, plain: list[float]) -> list[float]:
    """Llama 3.1: short wavelengths stay, long ones are stretched by `factor`, and between the two it is blended."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(rope["original_max_position_embeddings"])

    def one(period: float) -> float:
        turns = length / (2 * math.pi * period)  # within the original length
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        return period / ((1 - smooth) / factor + smooth)

    return [one(period) for period in plain]


def _yarn(rope: Rope, size: int, plain: list[float]) -> list[float]:
    """YaRN (arXiv 2309.00071): a ramp over the pairs, from plain frequencies to those stretched by `factor`."""
    factor, base = float(rope["factor"]), float(rope["rope_theta"])
    length = float(rope["original_max_position_embeddings"])

    def at(turns: float) -> float:
        """The pair, in general between two, that turns so often within the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = at(rope.get("beta_fast") or 32), at(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last = last + 0.001 if first == last else last
    ramp = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(len(plain))]
    return [period / (share / factor + 1 - share) for period, share in zip(plain, ramp, strict=True)]


_SCALED: Mapping[str, Callable[[Rope, int, list[float]], list[float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}

STATIC = tuple(_SCALED)
"""Rope types whose frequencies are the same for every length of text."""


def attention_factor(rope: Rope) -> float:
    """What YaRN multiplies queries and keys by; 1 for the other static types."""
    if rope.get("rope_type", "default") != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, whole, part = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(float(whole)) / scale(float(part)) if whole and part else scale(1.0)


def listed(rope: Rope, size: int, pairs: int, longest: Any) -> dict[str, Any]:
    """The same frequencies under rope type "longrope", which divides each pair's by a number of its own.

    A base of 1 leaves these numbers alone.

    Args:
        rope: see `periods`.
        size: see `periods`.
        pairs: see `periods`.
        longest: the config's max_position_embeddings.

    Raises:
        RequestError: the config has no longest text, or rope parameters that are no numbers.
    """
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise RequestError(f"rope='longrope': config.json has max_position_embeddings={longest!r}; a number is needed")
    try:
        table, attention = periods(rope, size, pairs), attention_factor(rope)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        said = f"config.json: rope_parameters {dict(rope)!r:.200} give no frequencies"
        raise RequestError(f"{said}: {type(error).__name__}: {error}") from error
    out = {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": table,
        "long_factor": table,
        "attention_factor": attention,
        "factor": 1.0,
        "original_max_position_embeddings": longest,
    }
    if rope.get("mscale_all_dim") and rope.get("rope_type", "default") != "default":
        # DeepSeek's softmax is scaled by these two, whatever the type.
        out |= {"factor": rope["factor"], "mscale_all_dim": rope["mscale_all_dim"]}
    return out
