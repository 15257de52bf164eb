"""The line search: how much of what a growth's new entries could become lowers the loss most, from nothing on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from growformer.errors import RequestError
from growformer.optim.fade import Behind

SCALES = (0.0, 0.125, 0.25, 0.5, 1.0)
"""What is tried."""


@dataclass(frozen=True)
class Searched:
    """What a line search found.

    Attributes:
        scale: the c whose c T the new entries now are.
        losses: of every c that was tried, in its order.
    """

    scale: float
    losses: Mapping[float, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{scale:g}: {loss:.4f}" for scale, loss in self.losses.items())
        return f"new entries at {self.scale:g} of their target (loss at {tried})"


@torch.no_grad()
def line_search(
    model: torch.nn.Module, closure: Callable[[], torch.Tensor | float], scales: Sequence[float] = SCALES
) -> Searched:
    """Set the new entries of the last growth to the part c of what they could become that has the lowest loss.

    At c = 0, which is always tried, the model computes what it did before it grew: on the closure's batches the loss
    is never higher than that. Of equal losses the smaller c is kept.

    Args:
        model: grown by a method that fades in, by `growformer.expand`, or by `growformer.grow(..., fade=0)`, and not
            trained since.
        closure: the loss of the model on batches that stay the same; called once for each c, without gradients, in
            eval mode.
        scales: the c to try, each once.

    Returns:
        What was found; printed, a sentence.

    Raises:
        RequestError: there is nothing to search, it has been trained since, or the loss before is no number.
    """
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    held: dict[str, Behind] = getattr(model, "growformer_behind", {})
    if not held:
        raise RequestError(
            "the last growth left nothing to search: grow with method='gated' (or msg) and fade=0, search, train on"
        )
    named = {name: model.get_parameter(name) for name in held}
    for name, behind in held.items():
        if bool((named[name][behind.at.to(named[name].device)] != -behind.offset).any()):
            raise RequestError(f"{name} has been trained since the model grew; search right after the growth")
    training, losses = model.training, {}
    model.eval()
    try:
        for scale in dict.fromkeys((0.0, *map(float, scales))):
            _put(named, held, scale)
            losses[scale] = float(closure())
        if not math.isfinite(losses[0.0]):
            raise RequestError(f"the loss is {losses[0.0]} with the new entries at zero; no scale is better or worse")
        best = min((c for c in losses if math.isfinite(losses[c])), key=lambda c: (losses[c], abs(c)))
    except BaseException:
        _put(named, held, 0.0)
        raise
    finally:
        model.train(training)
    _put(named, held, best)
    model.__dict__["growformer_behind"] = {}
    return Searched(best, losses)


def _put(named: Mapping[str, Any], held: Mapping[str, Behind], scale: float) -> None:
    for name, behind in held.items():
        parameter, dtype = named[name], behind.target.dtype
        wide = behind.target.double() if dtype == torch.float64 else behind.target.float()
        values = (wide * scale - behind.offset).to(dtype)
        parameter.data[behind.at.to(parameter.device)] = values.to(parameter.device)
