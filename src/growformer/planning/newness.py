"""Which entries of a grown model are new: drawn, zero, means, or copies but for the first of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from growformer.planning.plan import Plan

if TYPE_CHECKING:
    import torch


def new_entries(plan: Plan) -> dict[str, torch.Tensor]:
    """For every target tensor, a bool tensor of its shape: True where the entry is new.

    Of several copies of an old entry, that R reads, the first in the plan's order is the old one.
    """
    import torch

    out: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    for tensor in plan.tensors:
        mask = torch.ones(tensor.shape, dtype=torch.bool)
        for block in tensor.blocks():
            if block.source is None or block.back is None or any(block.mean):
                continue
            assert tensor.source is not None
            seen = held.setdefault(tensor.source, torch.zeros(tensor.source_shape, dtype=torch.bool))
            there = tuple(slice(a, a + n) for a, n in zip(block.source, block.shape, strict=True))
            mask[tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))] = seen[there]
            seen[there] = True
        out[tensor.name] = mask
    return out
