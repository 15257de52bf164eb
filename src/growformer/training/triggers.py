"""When to grow: rules as data, and pure functions of what a run has seen.

Every rule looks at the run after a step. What a rule remembers between steps is plain data, kept in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Memory = Mapping[str, Any]
"""What a rule remembers: JSON data; empty at the start of each stage."""


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Plateau(Rule):
    """Grow when the training loss has stopped falling.

    The loss is averaged over windows of steps that do not overlap. A window is better if its mean is below the best
    one's by more than `improvement` of it; growth comes after `patience` windows in a row that are not.
    """

    window: PositiveInt = Field(default=100, description="Steps that one mean is taken over.")
    improvement: float = Field(default=0.005, ge=0, description="Relative fall of the mean that counts.")
    patience: PositiveInt = Field(default=2, description="Windows in a row without such a fall.")


class Law(Rule):
    """A scaling law of the loss in nats per token, L(N, D) = E + A / N^a + B / D^b, fitted to this kind of text.

    N counts all parameters and D tokens (Hoffmann et al., arXiv 2203.15556, eq. 2). Its five constants depend on the
    text and the tokenizer, so there are no defaults.
    """

    E: float = Field(ge=0, description="Nats per token that no model of any size gets below.")
    A: PositiveFloat
    B: PositiveFloat
    a: PositiveFloat = Field(description="Exponent of N.")
    b: PositiveFloat = Field(description="Exponent of D.")


class Slope(Rule):
    """Grow when the loss falls more slowly than it should in the larger model (Staged Training, arXiv 2203.06211).

    The slope is that of the least-squares line through the last `window` steps. With `law`, it is dL/dC, C in FLOPs,
    and growth comes when -dL/dC is at most what the law expects of the larger model at the same loss. With
    `per_decade`, it is dL/dlog10(C), and growth comes when it falls by no more than so many nats: the paper's way with
    slopes that were measured beforehand.
    """

    window: int = Field(default=200, ge=3, description="Steps that the slope is measured over.")
    law: Law | None = None
    per_decade: PositiveFloat | None = Field(default=None, description="Nats per tenfold of FLOPs.")

    @model_validator(mode="after")
    def _one(self) -> Slope:
        if (self.law is None) == (self.per_decade is None):
            raise ValueError(
                "takes either law: {E, A, B, a, b}, or per_decade: nats per tenfold of FLOPs; "
                f"{'both are' if self.law else 'neither is'} given"
            )
        return self


class At(Rule):
    """When to grow: exactly one rule."""

    step: PositiveInt | None = Field(default=None, description="After so many steps of the run.")
    tokens: PositiveFloat | None = Field(default=None, description="Once the run has seen so many tokens.")
    flops: PositiveFloat | None = Field(default=None, description="Once training has taken so many FLOPs.")
    share: float | None = Field(default=None, gt=0, lt=1, description="Once this share of the budget is used.")
    plateau: Plateau | None = None
    slope: Slope | None = None
    tokens_per_parameter: PositiveFloat | None = Field(
        default=None,
        description="Once the run has seen so many tokens for each parameter of the present model (say 20).",
    )

    @model_validator(mode="after")
    def _one(self) -> At:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"takes exactly one of {', '.join(type(self).model_fields)}; "
                f"{' and '.join(given) if given else 'none'} {'are' if len(given) > 1 else 'is'} given"
            )
        return self

    @property
    def kind(self) -> str:
        """The name of the rule."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def remembers(self) -> bool:
        """Whether the rule looks at more than the present step."""
        return self.plateau is not None or self.slope is not None

    def said(self) -> str:
        """The rule in the words of the file."""
        value = getattr(self, self.kind)
        return f"{self.kind}: {value:g}" if isinstance(value, (int, float)) else self.kind


@dataclass(frozen=True)
class Size:
    """What a rule needs to know of a model.

    Attributes:
        parameters: all of them.
        flops_per_token: of training, forward and backward.
    """

    parameters: int
    flops_per_token: float


@dataclass(frozen=True)
class Now:
    """A run after a step.

    Attributes:
        step, tokens, flops: used so far, by training.
        share: of the budget.
        loss: of this step, nats per token.
        size: of the present model.
        larger: of the model that the growth would make.
    """

    step: int
    tokens: int
    flops: float
    share: float
    loss: float
    size: Size
    larger: Size


def fires(at: At, now: Now, memory: Memory) -> tuple[bool, Memory]:
    """Whether it is time to grow, and what to remember if not.

    Args:
        at: the rule.
        now: the run after a step; every step must be shown once, in order.
        memory: what the call before returned; {} at the start of a stage.
    """
    if at.plateau is not None:
        return _plateau(at.plateau, now, memory)
    if at.slope is not None:
        return _slope(at.slope, now, memory)
    if at.tokens_per_parameter is not None:
        return now.tokens >= at.tokens_per_parameter * now.size.parameters, {}
    found = getattr(now, at.kind)
    return bool(found >= getattr(at, at.kind)), {}


def _plateau(rule: Plateau, now: Now, memory: Memory) -> tuple[bool, Memory]:
    total, seen = memory.get("total", 0.0) + now.loss, memory.get("seen", 0) + 1
    best, stale = memory.get("best"), memory.get("stale", 0)
    if seen < rule.window:
        return False, {"total": total, "seen": seen, "best": best, "stale": stale}
    mean = total / seen
    if best is None or mean < best * (1 - rule.improvement):
        best, stale = mean, 0
    else:
        stale += 1
    return stale >= rule.patience, {"best": best, "stale": stale}


def _slope(rule: Slope, now: Now, memory: Memory) -> tuple[bool, Memory]:
    points = [*memory.get("points", ()), [now.flops, now.loss]][-rule.window :]
    kept = {"points": points}
    if len(points) < rule.window:
        return False, kept
    if rule.per_decade is not None:
        return -_line([(math.log10(c), loss) for c, loss in points]) <= rule.per_decade, kept
    assert rule.law is not None
    loss = sum(loss for _, loss in points) / len(points)
    expected = expected_slope(rule.law, now.larger, loss)
    return expected is not None and -_line(points) <= expected, kept


def expected_slope(law: Law, size: Size, loss: float) -> float | None:
    """How fast a model of some size, at some loss, gets better by a scaling law: -dL/dC, nats per token and FLOP.

    L(N, D) is solved for the tokens D after which a model of this size has this loss; then
    -dL/dC = b B D^(-b-1) / (FLOPs per token).

    Returns:
        None where the law says that this size never gets to this loss.
    """
    above = loss - law.E - law.A * size.parameters**-law.a
    if above <= 0:
        return None
    tokens = (law.B / above) ** (1 / law.b)
    return law.b * law.B * tokens ** (-law.b - 1) / size.flops_per_token


def _line(points: list[Any]) -> float:
    """The slope of the least-squares line through points (x, y)."""
    x0 = sum(x for x, _ in points) / len(points)
    y0 = sum(y for _, y in points) / len(points)
    spread = sum((x - x0) ** 2 for x, _ in points)
    return float(sum((x - x0) * (y - y0) for x, y in points) / spread)
