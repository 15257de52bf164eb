"""Apply: run a plan on any source of named tensors. Knows nothing of families or files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from growformer.algebra.fill import draw
from growformer.planning.plan import Block, Plan, TensorPlan

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Read = Callable[[str, "slice | None"], "torch.Tensor"]
"""Reads a source tensor by name, or those rows (indices of its first dim) of it."""

PIECE_BYTES = 16 << 20
"""Rows of a target tensor are made in pieces of about this many bytes of float32."""

MEASURED = 1 << 20
"""Entries of one piece of a tensor whose std or mean is measured."""


class Applier:
    """Runs one plan. Once `measure` has been called, `piece` may be called by several threads.

    Args:
        plan: the plan.
        read: the source's tensors.
        dtype: storage dtype of the target; None keeps each source tensor's own.

    Attributes:
        stds: the measured figure of every source tensor whose std or mean filled something.
    """

    def __init__(self, plan: Plan, read: Read, dtype: torch.dtype | None = None) -> None:
        self.plan = plan
        self.read = read
        self.dtype = dtype
        self.stds: dict[str, float] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def rows(self, tensor: TensorPlan, nbytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The target tensor in pieces of whole rows, in order, in storage dtype."""
        for start, stop in self.cuts(tensor, nbytes):
            yield self.piece(tensor, start, stop)

    @staticmethod
    def cuts(tensor: TensorPlan, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        """Row ranges of about `nbytes` of float32 each, at least one row."""
        step = max(1, nbytes // (4 * max(math.prod(tensor.shape[1:]), 1)))
        for start in range(0, tensor.shape[0], step):
            yield start, min(start + step, tensor.shape[0])

    def measured(self) -> list[tuple[str, str]]:
        """(source tensor, kind) of every figure that the plan's fills need."""
        needs: dict[tuple[str, str], None] = {}
        for tensor in self.plan.tensors:
            if tensor.fill.std is None and tensor.fill.like is not None and _has_free(tensor):
                needs[tensor.fill.like, tensor.fill.kind] = None
        return list(needs)

    def measure(self, name: str, kind: str) -> float:
        """The std (or mean) of a source tensor; where it is constant, the config's initializer_range.

        Read in pieces of fixed size and summed in a fixed order in float64, so that the figure is the same bits
        whatever the memory and the threads.
        """
        import numpy as np

        if name not in self.stds:
            count, mean, squares = 0, 0.0, 0.0
            for values in self._pieces(name):
                n, total = values.size, count + values.size
                with np.errstate(invalid="ignore"):  # an infinite weight gives a figure that is refused by name
                    m, s = float(values.mean()), float(values.var()) * n
                squares += s + (m - mean) ** 2 * count * n / total
                mean += (m - mean) * n / total
                count = total
            figure = mean if kind == "mean" else math.sqrt(squares / count)
            matrix = any(len(t.source_shape) > 1 for t in self.plan.tensors if t.source == name)
            if kind != "mean" and figure == 0.0 and matrix:
                figure = float(self.plan.source_config.get("initializer_range", 0.02))
            self.stds[name] = figure
        return self.stds[name]

    def _pieces(self, name: str) -> Iterator[NDArray[np.float64]]:
        shape = self._shapes[name]
        step = max(1, MEASURED // max(math.prod(shape[1:]), 1))
        for start in range(0, shape[0], step):
            rows = self.read(name, slice(start, min(start + step, shape[0])))
            yield rows.double().numpy()

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {t.source: t.source_shape for t in self.plan.tensors if t.source is not None}

    def tensor(self, name: str) -> torch.Tensor:
        """A whole target tensor."""
        plan = self.plan.by_name[name]
        return self.piece(plan, 0, plan.shape[0])

    def _storage(self, source: str) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if source not in self._dtypes:
            self._dtypes[source] = self.read(source, slice(0, 1)).dtype
        return self._dtypes[source]

    def piece(self, tensor: TensorPlan, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a target tensor."""
        import torch

        shape = (stop - start, *tensor.shape[1:])
        out = torch.zeros(shape, dtype=self._storage(tensor.source or tensor.fill.like or ""))
        noise: torch.Tensor | None = None
        for block in tensor.blocks((start, stop)):
            box = tuple(
                slice(at - (start if dim == 0 else 0), at - (start if dim == 0 else 0) + size)
                for dim, (at, size) in enumerate(zip(block.start, block.shape, strict=True))
            )
            if block.source is not None:
                out[box] = self._old(tensor, block).to(out.dtype)
            elif block.free:
                if noise is None:
                    noise = self._fill(tensor, start, stop).reshape(shape)
                out[box] = noise[box].to(out.dtype)
        return out

    def _old(self, tensor: TensorPlan, block: Block) -> torch.Tensor:
        """A block of old channels: the source's entries times their factor, in float64, or themselves."""
        assert tensor.source is not None and block.source is not None
        count = block.mean[0] or block.shape[0]
        values = self.read(tensor.source, slice(block.source[0], block.source[0] + count))
        for dim in range(1, len(block.shape)):
            values = values.narrow(dim, block.source[dim], block.mean[dim] or block.shape[dim])
        exponent = block.factor.exponent
        if exponent == 0 and not any(block.mean):
            return values
        values = values.double()
        for dim, mean in enumerate(block.mean):
            if mean:
                values = values.mean(dim, keepdim=True)
        return (values * float(block.factor)).expand(block.shape)

    def _fill(self, tensor: TensorPlan, start: int, stop: int) -> torch.Tensor:
        """Values for the free entries of rows [start, stop), flat (only the free ones are used).

        Drawn and scaled in float32 whatever the storage dtype, so that every dtype holds the same numbers, rounded.
        """
        import torch

        width = math.prod(tensor.shape[1:])
        fill = tensor.fill
        level = fill.std if fill.std is not None else self.measure(fill.like or "", fill.kind)
        if fill.kind == "mean":
            value = torch.tensor(level * float(fill.factor), dtype=torch.float64)
            return value.expand((stop - start) * width)
        drawn = torch.from_numpy(draw(self.plan.seed, tensor.name, tensor.shape, start * width, stop * width))
        return drawn.mul_(level)


def _has_free(tensor: TensorPlan) -> bool:
    return any(block.source is None and block.free for block in tensor.blocks())


def apply(plan: Plan, source: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Run `plan` in memory.

    Args:
        plan: the plan.
        source: the source's tensors by name on disk.
        dtype: storage dtype of the result; None keeps each source tensor's own.

    Returns:
        The target's tensors by name on disk.
    """
    applier = Applier(plan, lambda name, rows: source[name] if rows is None else source[name][rows], dtype)
    return {tensor.name: applier.tensor(tensor.name) for tensor in plan.tensors}


def pull_back(plan: Plan, target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The source that a grown model stands for: R applied to every tensor, in float64.

    Args:
        plan: the plan that grew it.
        target: the grown model's tensors by name on disk.

    Returns:
        float64 tensors by the source's names.
    """
    import torch

    out: dict[str, torch.Tensor] = {}
    for tensor in plan.tensors:
        if tensor.source is None:
            continue
        grown = target[tensor.name].double()
        old = torch.zeros(tensor.source_shape, dtype=torch.float64)
        for block in tensor.blocks():
            if block.source is None or block.back is None or any(block.mean):
                continue
            here = tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))
            there = tuple(slice(a, a + n) for a, n in zip(block.source, block.shape, strict=True))
            # Divided by the factor where back is its inverse: one rounding less than multiplying by the inverse.
            inverse = block.back.inverse
            old[there] += grown[here] / float(inverse)
        out[tensor.source] = old
    return out
