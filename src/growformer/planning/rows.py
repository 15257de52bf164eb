"""Rows of a target tensor that are not made block by block: old rows picked whole, and the identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from growformer.algebra import ONE
from growformer.planning.plan import TensorPlan, window

if TYPE_CHECKING:
    import torch


MANY = 256
"""Blocks from which on rows are picked whole where they can be."""


def gathers(tensor: TensorPlan) -> bool:
    """Whether rows are picked whole: every entry is one of the source's, times a factor that one dim alone has.

    Then what is made run by run of the rows is what would be made block by block, to the last bit.
    """
    if tensor.source is None or tensor.offset or math.prod(len(dim.runs) for dim in tensor.dims) <= MANY:
        return False
    runs = [run for dim in tensor.dims for run in dim.runs]
    plain = all(run.old is not None and not (run.mean or run.share or run.noise or run.ahead) for run in runs)
    scaled = sum(any(run.factor != ONE for run in dim.runs) for dim in tensor.dims)
    return len(tensor.dims) > 1 and plain and scaled < 2


def gathered(
    tensor: TensorPlan,
    read: Callable[[str, slice | None], torch.Tensor],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows [start, stop) of a tensor that `gathers`, a run of rows at a time.

    Args:
        tensor: the tensor.
        read: the source's tensors, by name and rows.
        start, stop: the rows.
        dtype: of the result.
    """
    import torch

    assert tensor.source is not None
    out = torch.empty((stop - start, *tensor.shape[1:]), dtype=dtype)
    picks: dict[int, torch.Tensor] = {}
    scales: dict[int, torch.Tensor] = {}
    for d, dim in enumerate(tensor.dims[1:], 1):
        if not dim.is_identity:
            picks[d] = torch.tensor([(run.old or 0) + i for run in dim.runs for i in range(run.count)])
        if any(run.factor != ONE for run in dim.runs):
            each = [float(run.factor) for run in dim.runs for _ in range(run.count)]
            shape = [-1 if place == d else 1 for place in range(len(tensor.dims))]
            scales[d] = torch.tensor(each, dtype=torch.float64).reshape(shape)
    for at, run in window(tensor.dims[0], (start, stop)):
        old = run.old or 0
        values = read(tensor.source, slice(old, old + run.count))
        for d, pick in picks.items():
            values = values.index_select(d, pick)
        for scale in scales.values():
            values = values.double() * scale
        there = slice(at - start, at - start + run.count)
        out[there] = values if run.factor == ONE else values.double() * float(run.factor)
    return out


def identity(shape: tuple[int, ...], start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [start, stop) of a kernel that passes every channel on as it is.

    Args:
        shape: [writes, reads, ...], with as many channels read as written.
        start, stop: the rows.
        dtype: of the result.
    """
    import torch

    out = torch.zeros((stop - start, *shape[1:]), dtype=dtype)
    rows = torch.arange(start, stop)
    place: list[Any] = [rows - start, rows, *(size // 2 for size in shape[2:])]
    out[tuple(place)] = 1
    return out
