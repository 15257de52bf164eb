"""Moments follow the dual of the weights: what Adam remembers of a tensor, carried through a growth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from growformer.algebra import Factor
from growformer.errors import SourceError
from growformer.planning import Plan, TensorPlan

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
    arXiv 2308.06103, Theorems 3.1 to 3.6.)

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
        if tensor.source is None or tensor.source not in tensors:
            continue
        values = tensors[tensor.source]
        if tuple(values.shape) != tensor.source_shape:
            raise SourceError(
                f"{tensor.source}: the state beside it has shape {list(values.shape)}, "
                f"the weight that the plan grows {list(tensor.source_shape)}"
            )
        out[tensor.name] = _grown(tensor, values, power)
    return out


def _grown(tensor: TensorPlan, values: torch.Tensor, power: int) -> torch.Tensor:
    grown = values.new_zeros(tensor.shape)
    for block in tensor.blocks():
        if block.source is None or block.back is None or any(block.mean):
            continue
        here = tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))
        there = tuple(slice(a, a + n) for a, n in zip(block.source, block.shape, strict=True))
        coefficient = float(Factor(block.back.square**power))
        grown[here] = values[there] if coefficient == 1.0 else values[there] * coefficient
    return grown
