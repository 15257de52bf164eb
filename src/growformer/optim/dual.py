"""Moments follow the dual of the weights: what Adam remembers of a tensor, carried through a growth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from growformer.algebra import Factor
from growformer.errors import SourceError
from growformer.planning import Plan, TensorPlan
from growformer.planning.plan import Block

if TYPE_CHECKING:
    import torch


def grow_moments(plan: Plan, tensors: Mapping[str, torch.Tensor], power: int) -> dict[str, torch.Tensor]:
    """What an optimizer keeps beside every weight, carried to where that weight went.

    A growth turns y = W x into y' = W' x' with x' = E_in x, W' = E_out W R_in on old channels, and whatever reads y'
    reads y = R_out y' (R E = 1 on every axis). Hence dL/dy' = R_out' dL/dy, and the gradient of the grown weight is

        G' = dL/dy' x'' = R_out' G E_in'

    on the old blocks, while new entries owe their gradients to no old one. Entry by entry that is G times
    `Block.back`, the coefficient that undoes the weight's own factor: a weight times s has a gradient times 1/s. The
    first moment is a mean of gradients and the second a mean of their squares, so m' = back m and v' = back^2 v. New
    entries, and copies that nobody reads, have no past and get zero. (Design, section 9; growths of Gesmundo & Maile,
    arXiv 2308.06103, Theorems 3.1 to 3.6.) Where this is not exact, `approximate` says so.

    Args:
        plan: the growth.
        tensors: one tensor for each source tensor, by its on-disk name and of its shape (dims by the pattern's axes);
            any device and dtype.
        power: how the tensors scale with the gradient: 1 for the first moment, 2 for the second, 0 for what is only
            moved to its new place (ages, masks).

    Returns:
        By the target's on-disk names, tensors of the target's shapes, in each source's dtype and on its device.
        Tensors that are new as a whole, and those whose source is not among `tensors`, are left out.

    Raises:
        SourceError: a tensor has another shape than its weight.
    """
    out = {}
    for tensor in plan.tensors:
        if tensor.source is not None and tensor.source in tensors:
            values = tensors[tensor.source]
            out[tensor.name] = values.new_zeros(tensor.shape)
            carry_moment(tensor, values, power, out[tensor.name])
    return out


def carry_moment(tensor: TensorPlan, values: torch.Tensor, power: int, out: torch.Tensor) -> None:
    """Write one tensor of `grow_moments` into `out` (of the target's shape), whose new entries are left as they are.

    Raises:
        SourceError: `values` has another shape than the source tensor.
    """
    if tuple(values.shape) != tensor.source_shape:
        raise SourceError(
            f"{tensor.source}: the state beside it has shape {list(values.shape)}, "
            f"the weight that the plan grows {list(tensor.source_shape)}"
        )
    for block in tensor.blocks():
        if has_past(block):
            assert block.source is not None and block.back is not None
            there = tuple(slice(a, a + n) for a, n in zip(block.source, block.shape, strict=True))
            coefficient = float(Factor(block.back.square**power))
            out[box(block)] = values[there] if coefficient == 1.0 else values[there] * coefficient


def has_past(block: Block) -> bool:
    """Whether a block continues a block of the source; others are drawn, zero, means, or copies that begin afresh."""
    read = block.source is not None and block.back is not None
    return read and not any(block.mean) and not block.fresh


def box(block: Block) -> tuple[slice, ...]:
    """Where a block stands in its tensor."""
    return tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))


def approximate(plan: Plan) -> dict[str, str]:
    """The target tensors whose moments are not the grown model's own to the last bit, with why.

    A writer of a carried mean shares its gradient with the mean's channels, and a writer of copies with its copies, in
    parts that no moment of the source tells (see `growformer.planning.inexact`). Where whole layers stand again, the
    grown model has another loss, and no moment of the source's is its own.
    """
    changed = f"the function changes: {plan.changes[0]}" if plan.changes else ""
    return {t.name: changed or t.inexact for t in plan.tensors if t.source is not None and (changed or t.inexact)}
