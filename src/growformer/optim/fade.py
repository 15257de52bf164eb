"""What fades in: closed entries of a grown model become a target T, as c T with c from 0 to 1 over steps of training.

MSG (arXiv 2305.02869; FLM-101B, arXiv 2309.03852) has masks c beside the weights. Here the mask is folded into them, so
that the model stays a stock one. After the j-th of K steps the entries are c_j T_j, with c_j = j/K, and an update U of
T counts as c U for them:

    w_1 = c_1 T,    w_j = (c_j / c_(j-1)) (w_(j-1) + c_(j-1) U_j)

T itself is needed up to the first step only. The block rates carry this out (`growformer.optim.rates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from growformer.errors import RequestError

if TYPE_CHECKING:
    import torch

    from growformer.optim.carry import Carry, Whole
    from growformer.planning import Plan


@dataclass(frozen=True)
class Behind:
    """What some entries of a parameter fade in to.

    Attributes:
        at: bool, of the parameter's shape: which entries.
        target: [entry]: T of each, in the order of the parameter's memory.
        offset: what the model adds to the stored numbers: T and c T are of the sum.
    """

    at: torch.Tensor
    target: torch.Tensor
    offset: int = 0


def behind(carry: Carry, whole: Whole, figures: Mapping[str, float] | None = None) -> dict[str, Behind]:
    """What fades in in each grown parameter, by name; those where nothing does are left out.

    Args:
        carry: the growth.
        whole: gives the source's tensors.
        figures: measured already for the growth's fills (`Applier.stds`).
    """
    import torch

    from growformer.optim.carry import Carry

    plan = carry.plan
    if not plan.behind:
        return {}
    fading = {tensor.name: tensor.offset for tensor in plan.behind}
    opened = Carry(plan.opened, carry.old, carry.new)
    applier = opened.applier(whole)
    applier.stds |= figures or {}
    out = {}
    for name in opened.names:
        offsets = {fading[disk] for disk in carry.new.within[name] if disk in fading}
        if not offsets:
            continue
        at = _closed(carry, name) & ~_closed(opened, name)
        values = torch.empty(carry.new.shapes[name], dtype=whole(carry.like(name) or "").dtype)
        opened.weight(name, applier, values)
        (offset,) = offsets  # all tensors within a parameter are of one pattern
        out[name] = Behind(at, values[at] + offset, offset)
    return out


def require_fade(plan: Plan, fade: int | None, say: str = "fade=K") -> None:
    """Refuse a growth that fades in over no number of steps, or a number where nothing does.

    Args:
        plan: the growth.
        fade: what was asked for.
        say: how to ask.

    Raises:
        RequestError: naming the method.
    """
    if plan.behind and fade is None:
        raise RequestError(
            f"{plan.method}: new entries of {len(plan.behind)} tensors fade in over steps of training; say how many: "
            f"{say}"
        )
    if not plan.behind and fade is not None:
        raise RequestError(f"fade={fade}: {plan.method} has nothing that fades in; msg and gated do")
    if fade is not None and fade < 0:
        raise RequestError(f"fade={fade}: a number of steps is at least 0")


def _closed(carry: Carry, name: str) -> torch.Tensor:
    """Which entries of a grown parameter are new and zero: bool, of its shape."""
    index, meanings = carry.kinds(name)
    out = index.bool().zero_()
    for number, kind in enumerate(meanings):
        if kind.closed:
            out |= index == number
    return out
