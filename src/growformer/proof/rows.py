"""Tensors in pieces of rows: no more is ever in memory than a small multiple of a piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from growformer.proof.reading import Tensors

PIECE = 1 << 20
"""Entries of a tensor that are looked at at once."""


def pieces(shape: Sequence[int]) -> Iterator[slice]:
    """Row ranges of at most PIECE entries."""
    rows, width = shape[0], max(1, torch.Size(shape[1:]).numel())
    step = max(1, PIECE // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def same(tensors: Tensors, a: str, b: str) -> bool:
    """Whether two tensors have one shape and the same values, whatever their dtypes: they are so in any dtype then."""
    shape, read = tensors.shape(a), tensors.read
    return shape == tensors.shape(b) and all(
        torch.equal(read(a, rows).double(), read(b, rows).double()) for rows in (pieces(shape) if shape else [None])
    )


def read_rows(tensors: Tensors, name: str, rows: Tensor) -> Tensor:
    """The rows with these numbers, in this order; few reads, and no more memory than a small multiple of the rows."""
    if not len(rows):
        return tensors.read(name, slice(0, 0))
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= 4 * len(rows):
        return take(tensors.read(name, slice(low, high)), 0, rows - low)
    cuts = [0, *(rows.diff() != 1).nonzero().flatten().add(1).tolist(), len(rows)]
    return torch.cat([tensors.read(name, slice(int(rows[a]), int(rows[b - 1]) + 1)) for a, b in pairwise(cuts)])


def take(x: Tensor, d: int, index: Tensor) -> Tensor:
    """The entries with these numbers along dim d, in this order: a view where they are neighbours."""
    count = len(index)
    if count and int(index[-1] - index[0]) == count - 1 and bool((index.diff() == 1).all()):
        return x.narrow(d, int(index[0]), count)
    return x[(slice(None),) * d + (index,)]


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def half_ulp(x: Tensor) -> Tensor:
    """By how much rounding once may have moved each entry (float64)."""
    info = torch.finfo(x.dtype)
    exponent = torch.frexp(x.double()).exponent.double()
    return torch.exp2(exponent - 2).clamp(min=info.tiny) * info.eps
