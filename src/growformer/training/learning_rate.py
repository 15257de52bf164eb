"""Learning rate schedules: what part of its peak the rate has at each step, from the shares of the budget alone."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = float


class LearningRate(BaseModel):
    """How the learning rate goes from the first step to the last; its peak is the optimizer's `lr`.

    wsd: warm-up, stable, decay (Hu et al., arXiv 2404.06395): rises linearly, stays, falls linearly. cosine and linear
    fall from the end of the warm-up on; constant never falls.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["wsd", "cosine", "linear", "constant"] = Field(
        default="wsd", description="The curve after the warm-up."
    )
    warmup: float = Field(default=0.02, ge=0, lt=1, description="Share of the budget over which the rate rises from 0.")
    decay: float = Field(
        default=0.2, ge=0, le=1, description="Share of the budget over which it falls at the end (wsd only)."
    )
    floor: float = Field(default=0.0, ge=0, le=1, description="What it falls to, as a part of its peak.")

    @model_validator(mode="after")
    def _fits(self) -> LearningRate:
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup={self.warmup:g} and decay={self.decay:g} are {self.warmup + self.decay:g} of the budget "
                "together; they may be 1 at most"
            )
        if self.shape != "wsd" and "decay" in self.model_fields_set:
            raise ValueError(f"decay belongs to shape: wsd; {self.shape} has none: leave it out")
        return self


def part_of_peak(schedule: LearningRate, start: Share, end: Share) -> float:
    """The learning rate of one step, as a part of its peak.

    A step takes the budget from one share to another. The warm-up looks at its end and the decay at its start, so that
    neither the first step nor the last is taken at a rate of zero.

    Args:
        schedule: the curve.
        start, end: shares of the budget used before and after the step, 0 <= start < end.
    """
    warm = min(1.0, end / schedule.warmup) if schedule.warmup else 1.0
    begins = {"wsd": 1 - schedule.decay, "constant": 1.0}.get(schedule.shape, schedule.warmup)
    # One step may overrun a budget that is no whole number of steps.
    along = min(1.0, max(0.0, start - begins) / (1 - begins)) if begins < 1 else 0.0
    fallen = (1 - math.cos(math.pi * along)) / 2 if schedule.shape == "cosine" else along
    return warm * (1 - (1 - schedule.floor) * fallen)
