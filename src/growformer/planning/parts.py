"""What each of several copies holds of the weights that read the one old channel, where that is drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from growformer.algebra.fill import draw, numbers, shares
from growformer.planning.plan import Block, TensorPlan

if TYPE_CHECKING:
    import torch


def halves(seed: int, tensor: TensorPlan, block: Block) -> torch.Tensor:
    """What part of each source entry of a block is this copy's: 0, a half or all, by the entry's own draw."""
    import torch

    assert tensor.source is not None and block.source is not None
    width = math.prod(tensor.source_shape[1:])
    first, rows = block.source[0], block.mean[0] or block.shape[0]
    drawn = numbers(seed, tensor.source, tensor.source_shape, first * width, (first + rows) * width)
    out: torch.Tensor | None = None
    for share in block.shares:
        if share is not None:
            part = torch.from_numpy(shares(drawn, *share)).reshape(rows, *tensor.source_shape[1:])
            out = part if out is None else out * part
    assert out is not None
    for dim in range(1, len(block.shape)):
        out = out.narrow(dim, block.source[dim], block.mean[dim] or block.shape[dim])
    return out


def noised(seed: int, tensor: TensorPlan, block: Block, values: torch.Tensor, std: float) -> torch.Tensor:
    """This copy's equal part of a block, and what is added to it and taken off its neighbour.

    Args:
        seed: of the draws.
        tensor: that the block is of.
        block: with its share (k, m).
        values: the source's entries, in float64.
        std: of the source tensor.
    """
    import torch

    assert tensor.source is not None and block.source is not None
    k, m = next(share for share in block.shares if share is not None)
    values = values / m
    if k == m - 1 and m % 2:
        return values  # the last of an odd number has no neighbour
    width, first, rows = math.prod(tensor.source_shape[1:]), block.source[0], block.mean[0] or block.shape[0]
    label = f"{tensor.source} shared by {k // 2}"
    drawn = draw(seed, label, tensor.source_shape, first * width, (first + rows) * width)
    noise = torch.from_numpy(drawn).double().reshape(rows, *tensor.source_shape[1:])
    for dim in range(1, len(block.shape)):
        noise = noise.narrow(dim, block.source[dim], block.mean[dim] or block.shape[dim])
    level = block.noise * std
    return values + noise * (level if k % 2 == 0 else -level)
