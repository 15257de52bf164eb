"""What results say: FLOPs to equal loss, savings, token credit, noise. Numbers in, numbers out.

Losses are in bits per byte. C are FLOPs of training, F FLOPs per token, D tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MOST = 300.0
"""ln of more FLOPs than there will be: a curve that is all but flat would ask for them."""


@dataclass(frozen=True)
class Curve:
    """The loss of training from scratch, decayed to its end, over what it costs: L(C) = floor + A C^-a.

    Attributes:
        floor: E, the loss that no cost gets below.
        log_a: ln A.
        a: the exponent.
        low, high: the losses between which it was fitted.
    """

    floor: float
    log_a: float
    a: float
    low: float
    high: float

    def loss(self, flops: float) -> float:
        """What so many FLOPs give."""
        return self.floor + math.exp(self.log_a - self.a * math.log(flops))

    def flops(self, loss: float) -> float | None:
        """What a loss takes; None: the curve never gets there, or does not fall."""
        if self.a <= 0 or loss <= self.floor:
            return None
        found = (self.log_a - math.log(loss - self.floor)) / self.a
        return math.exp(found) if found < MOST else None

    def covers(self, loss: float) -> bool:
        """Whether a loss lies between those that were measured; beyond them, costs are extrapolated."""
        return self.low <= loss <= self.high


def fit_curve(flops: Sequence[float], losses: Sequence[float], floor: float = 0.0) -> Curve | None:
    """Fit the scratch curve: least squares of ln(L - floor) over ln C.

    Args:
        flops: of runs whose learning rate had fallen to its end: at least two different ones.
        losses: of the same runs.
        floor: E, chosen beforehand; with 0 the curve is a line in logarithms, which few points can bear.

    Returns:
        None: a loss is at the floor, or all runs cost the same.
    """
    x, y = np.log(np.asarray(flops, dtype=np.float64)), np.asarray(losses, dtype=np.float64) - floor
    if len(np.unique(x)) < 2 or (y <= 0).any():
        return None
    centred = x - x.mean()
    slope = float((centred * np.log(y)).sum() / (centred**2).sum())
    log_a = float(np.log(y).mean() - slope * x.mean())
    return Curve(floor, log_a, -slope, float(min(losses)), float(max(losses)))


def log_ratio(curve: Curve, loss: float, flops: float) -> float | None:
    """ln of (what scratch takes for this loss) / (what was taken); above 0, something was saved."""
    equal = curve.flops(loss)
    return None if equal is None else math.log(equal / flops)


def saving(ratio: float) -> float:
    """A log ratio as the share of FLOPs saved: 1 - C / C_equal."""
    return 1 - math.exp(-ratio)


def token_credit(curve: Curve, loss: float, flops_per_token: float, before: float, after: float) -> float | None:
    """kappa of D_eff = D2 + kappa D1: what a token seen before growth is worth beside one seen after.

    D_eff are the tokens after which the final size, from scratch, has this loss. At equal loss, growth saves
    f (kappa - 1/g) of the cost, where f = D1 / D_eff, and g is how much dearer a token is after growth: it pays where
    kappa > 1/g.

    Args:
        curve: of the final size from scratch.
        loss: that was reached.
        flops_per_token: of the final size.
        before, after: D1 and D2, tokens seen before and after growth.
    """
    equal = curve.flops(loss)
    return None if equal is None or before <= 0 else (equal / flops_per_token - after) / before


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its interval.

    Attributes:
        mean: of the values.
        low, high: of the interval; None where there is one value, which says nothing of its own spread.
        count: of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def map(self, rising: Callable[[float], float]) -> Interval:
        """The interval of a rising function of the value."""
        low, high = (None if end is None else rising(end) for end in (self.low, self.high))
        return Interval(rising(self.mean), low, high, self.count)


def interval(
    values: Sequence[float],
    confidence: float = 0.95,
    kind: Literal["t", "bootstrap"] = "t",
    draws: int = 10000,
) -> Interval:
    """The mean of paired values (one a seed) and where the true one lies.

    t: mean +- t(n - 1) s / sqrt(n), Student's, which takes the values to be normally distributed. bootstrap: the
    percentiles of the means of `draws` resamples of the seeds (Efron 1979): of any shape, and too narrow for few seeds.

    Raises:
        ValueError: there is no value.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError("no value to take the mean of")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, None, None, 1)
    if kind == "bootstrap":
        picks = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
        low, high = np.quantile(x[picks].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(mean, float(low), float(high), len(x))
    half = t_quantile((1 + confidence) / 2, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half, len(x))


def noise(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation of one run's loss over seeds, pooled over arms.

    Returns:
        None where no arm has two seeds.
    """
    several = [np.asarray(g, dtype=np.float64) for g in groups if len(g) > 1]
    if not several:
        return None
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in several)
    return math.sqrt(squares / sum(len(g) - 1 for g in several))


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t: the value below which it lies with a probability of at least 1/2."""
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 (Abramowitz & Stegun 26.7.3 and 26.7.4: finite sums for whole degrees of freedom)."""
    theta = math.atan(t / math.sqrt(freedom))
    cos2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 if odd else 1, freedom - 1, 2):
        term *= cos2 * k / (k + 1)
        total += term
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return (1 + inside) / 2


__all__ = ["Curve", "Interval", "fit_curve", "interval", "log_ratio", "noise", "saving", "t_quantile", "token_credit"]
