"""Apply: run a plan on any source of named tensors. Knows nothing of families or files."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from growformer.algebra.fill import numbers, quantiles
from growformer.algebra.scratch import Scratch
from growformer.planning.parts import halves, noised
from growformer.planning.plan import Block, Plan, TensorPlan
from growformer.planning.rows import gathered, gathers, identity

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Read = Callable[[str, "slice | None"], "torch.Tensor"]
"""Reads a source tensor by name, or those rows (indices of its first dim) of it.

What it returned may be overwritten when the same thread reads again.
"""

PIECE_BYTES = 16 << 20
"""Rows of a target tensor are made in pieces of about this many bytes of float32."""

MEASURED = 1 << 20
"""Entries of one piece of a tensor whose std or mean is measured."""

STRIPE = 1 << 16
"""Entries that are drawn or multiplied at once, so that what is in between stays in the processor's cache."""


class Applier:
    """Runs one plan; `measure` and `piece` may be called by several threads.

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
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._scratch = Scratch()

    def rows(self, tensor: TensorPlan, nbytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The target tensor in pieces of whole rows, in order, in storage dtype."""
        for start, stop in self.cuts(tensor, nbytes):
            yield self.piece(tensor, start, stop)

    @staticmethod
    def cuts(tensor: TensorPlan, nbytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        """Row ranges of about `nbytes` of float32 each, at least one row."""
        if not tensor.shape:
            yield 0, 1
            return
        step = max(1, nbytes // (4 * max(math.prod(tensor.shape[1:]), 1)))
        for start in range(0, tensor.shape[0], step):
            yield start, min(start + step, tensor.shape[0])

    def measured(self) -> list[tuple[str, str]]:
        """(source tensor, kind) of every figure that the plan's fills need."""
        needs: dict[tuple[str, str], None] = {}
        for tensor in self.plan.tensors:
            fill = tensor.fill
            if fill.kind in ("normal", "mean") and fill.std is None and fill.like is not None and _has_free(tensor):
                needs[fill.like, fill.kind] = None
            if tensor.source is not None and any(run.noise for dim in tensor.dims for run in dim.runs):
                needs[tensor.source, "normal"] = None
        return list(needs)

    def measure(self, name: str, kind: str) -> float:
        """The std (or mean) of a source tensor; where it is constant, the config's initializer_range.

        Read in pieces of fixed size and summed in a fixed order in float64, so that the figure is the same bits
        whatever the memory and the threads.
        """
        with self._locks[name]:
            if name not in self.stds:
                self.stds[name] = self._measure(name, kind)
            return self.stds[name]

    def _measure(self, name: str, kind: str) -> float:
        import numpy as np

        count, mean, squares = 0, 0.0, 0.0
        for values in self._pieces(name):
            n, total = values.size, count + values.size
            if not n:
                continue
            # In place what numpy's mean and var do, to the last bit: fresh memory for each step takes twice the time.
            with np.errstate(invalid="ignore"):  # an infinite weight gives a figure that is refused by name
                m = float(np.add.reduce(values) / n)
                np.subtract(values, m, out=values)
                np.multiply(values, values, out=values)
                s = float(np.add.reduce(values) / n) * n
            squares += s + (m - mean) ** 2 * count * n / total
            mean += (m - mean) * n / total
            count = total
        figure = mean if kind == "mean" else math.sqrt(squares / max(count, 1))
        matrix = any(len(t.source_shape) > 1 for t in self.plan.tensors if t.source == name)
        if kind != "mean" and figure == 0.0 and matrix:
            figure = float(self.plan.source_config.get("initializer_range", 0.02))
        return figure

    def _pieces(self, name: str) -> Iterator[NDArray[np.float64]]:
        """The entries of a source tensor in float64, flat, a piece at a time in the same memory."""
        import torch

        shape = self._shapes[name]
        if not shape:
            yield self.read(name, None).double().reshape(1).numpy().copy()
            return
        step = max(1, MEASURED // max(math.prod(shape[1:]), 1))
        bias = math.prod(shape) == max(shape)
        for start in range(0, shape[0], step):
            rows = self.read(name, slice(start, min(start + step, shape[0])))
            values = self._scratch.array("measured", rows.shape, "float64")
            torch.from_numpy(values).copy_(rows)
            # An earlier growth may have barred some of what a bias chooses from: these are no typical numbers.
            values = values.reshape(-1)
            yield values[values > torch.finfo(torch.float16).min] if bias else values

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {t.source: t.source_shape for t in self.plan.tensors if t.source is not None}

    def tensor(self, name: str) -> torch.Tensor:
        """A whole target tensor."""
        plan = self.plan.by_name[name]
        return self.piece(plan, 0, plan.shape[0] if plan.shape else 1)

    def _storage(self, source: str) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if source not in self._dtypes:
            self._dtypes[source] = self.read(source, slice(0, 1) if self._shapes.get(source, (1,)) else None).dtype
        return self._dtypes[source]

    def piece(self, tensor: TensorPlan, start: int, stop: int, scratch: Scratch | None = None) -> torch.Tensor:
        """Rows [start, stop) of a target tensor.

        Args:
            tensor: the tensor.
            start, stop: the rows.
            scratch: where to make them; what is returned is then good until the thread's next call. None: in memory
                of their own.
        """
        dtype = self._storage(tensor.source or tensor.fill.like or "")
        if not tensor.shape:
            # A single number of a new layer (an activation's constant) is its neighbour's: nothing spreads around it.
            # A copy: new layers would share it, and batch norms count in place.
            return self.read(tensor.source or tensor.fill.like or "", None).to(dtype, copy=True)
        if tensor.fill.kind == "identity":
            return identity(tensor.shape, start, stop, dtype)
        if gathers(tensor):
            return gathered(tensor, self.read, start, stop, dtype)
        blocks = list(tensor.blocks((start, stop)))
        if scratch is not None and len(blocks) == 1 and blocks[0].source is not None:
            values = self._old(tensor, blocks[0])
            if values.dtype == dtype and values.is_contiguous():
                return values
        memory = scratch or Scratch()
        out = _tensor(memory.array("out", (stop - start, *tensor.shape[1:]), f"int{8 * dtype.itemsize}"), dtype)
        free: list[tuple[tuple[slice, ...], tuple[int, ...]]] = []
        mirrored: list[tuple[tuple[slice, ...], tuple[int, ...]]] = []
        for block in blocks:
            first = (block.start[0] - start, *block.start[1:])
            box = tuple(slice(at, at + size) for at, size in zip(first, block.shape, strict=True))
            if block.source is not None:
                for rows, part in _parts(block):
                    out[box][rows] = self._old(tensor, part)
            elif block.free:
                (mirrored if any(block.mirror) else free).append((box, block.mirror))
            else:
                out[box] = -tensor.offset  # what is closed adds up to zero with what the model adds to it
        if free:
            self._draw(tensor, start, out, [box for box, _ in free], memory)
        for box, mirror in mirrored:
            self._mirror(tensor, start, out[box], box, mirror)
        return out

    def _old(self, tensor: TensorPlan, block: Block) -> torch.Tensor:
        """A block of old channels: the source's entries times their factor, in float64, or themselves."""
        assert tensor.source is not None and block.source is not None
        count = block.mean[0] or block.shape[0]
        name = tensor.ahead if block.ahead and tensor.ahead else tensor.source
        values = self.read(name, slice(block.source[0], block.source[0] + count))
        for dim in range(1, len(block.shape)):
            values = values.narrow(dim, block.source[dim], block.mean[dim] or block.shape[dim])
        if not block.portion:
            return values * 0
        exponent, shared = block.factor.exponent, any(block.shares)
        if exponent == 0 and not any(block.mean) and not shared:
            return values
        values = values.double() + tensor.offset
        if block.noise:
            values = noised(self.plan.seed, tensor, block, values, self.measure(tensor.source, "normal"))
        elif shared:
            values *= halves(self.plan.seed, tensor, block)
        for dim, mean in enumerate(block.mean):
            if mean:
                weigh = block.weigh[dim] if block.weigh else ""
                if weigh:
                    shape = [-1 if d == dim else 1 for d in range(len(block.shape))]
                    values = values * self.read(weigh, None).double().reshape(shape)
                values = values.mean(dim, keepdim=True)
        return (values * float(block.factor) - tensor.offset).expand(block.shape)

    def _draw(
        self, tensor: TensorPlan, start: int, out: torch.Tensor, boxes: Sequence[tuple[slice, ...]], scratch: Scratch
    ) -> None:
        """Fill the boxes of `out`, which holds the tensor's rows from `start` on."""
        values = self._fill(tensor, out.dtype)
        if len(values) == 1:
            for box in boxes:
                out[box] = values
            return
        low, high = min(box[0].start for box in boxes), max(box[0].stop for box in boxes)
        shape, width = (high - low, *tensor.shape[1:]), math.prod(tensor.shape[1:])
        flat = scratch.array("numbers", (math.prod(shape),), "uint16")
        numbers(self.plan.seed, tensor.name, tensor.shape, (start + low) * width, (start + high) * width, flat)
        which, table, there = flat.reshape(shape), _whole(values), _whole(out)
        for rows, *rest in boxes:
            box = (slice(rows.start - low, rows.stop - low), *rest)
            _look_up(table, which[box], there[(rows, *rest)], scratch)

    def _mirror(
        self, tensor: TensorPlan, start: int, out: torch.Tensor, box: tuple[slice, ...], mirror: tuple[int, ...]
    ) -> None:
        """Fill a box of the rows from `start` on with what is drawn at its mirror image, or its opposite."""
        import torch

        values = self._fill(tensor, out.dtype)
        if len(values) > 1:
            width = math.prod(tensor.shape[1:])
            first = start + box[0].start - abs(mirror[0])
            rows = numbers(self.plan.seed, tensor.name, tensor.shape, first * width, (first + len(out)) * width)
            there = tuple(slice(s.start - abs(m), s.stop - abs(m)) for s, m in zip(box[1:], mirror[1:], strict=True))
            which = rows.reshape(len(out), *tensor.shape[1:])[(slice(None), *there)]
            values = values[torch.from_numpy(which.astype("int64"))]
        out.copy_(values)
        if sum(m < 0 for m in mirror) % 2:
            out.neg_()

    def _fill(self, tensor: TensorPlan, dtype: torch.dtype) -> torch.Tensor:
        """What free entries of a tensor may be: one value, or as many as there are `quantiles`.

        Scaled in float32 whatever the storage dtype, so that every dtype holds the same numbers, rounded.
        """
        import torch

        fill = tensor.fill
        if fill.kind == "constant":
            return torch.tensor([float(fill.factor) - tensor.offset], dtype=torch.float64).to(dtype)
        level = fill.std if fill.std is not None else self.measure(fill.like or "", fill.kind)
        if fill.kind == "mean":
            level = (level + tensor.offset) * float(fill.factor) - tensor.offset
            if fill.std is not None:
                level = max(level, torch.finfo(dtype).min)  # see BARRED
            return torch.tensor([level], dtype=torch.float64).to(dtype)
        return torch.from_numpy(quantiles()).mul(level).to(dtype)


def _parts(block: Block) -> Iterator[tuple[slice, Block]]:
    """A block of old channels, a few rows at a time where they are multiplied, for products take more room."""
    count, source = block.shape[0], block.source
    assert source is not None
    step = max(count, 1)
    if (block.factor.exponent != 0 or any(block.shares)) and not any(block.mean):
        step = max(1, STRIPE // max(math.prod(block.shape[1:]), 1))
    for at in range(0, count, step):
        size = min(step, count - at)
        first = tuple(x + at * (dim == 0) for dim, x in enumerate(block.start))
        old = tuple(x + at * (dim == 0) for dim, x in enumerate(source))
        yield slice(at, at + size), replace(block, start=first, shape=(size, *block.shape[1:]), source=old)


def _tensor(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The torch tensor over the same memory, which numpy knows as whole numbers of that size."""
    import torch

    return torch.from_numpy(values).view(dtype)


def _whole(values: torch.Tensor) -> NDArray[Any]:
    """The array over the same memory, as whole numbers: numpy has no bfloat16."""
    import torch

    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    found: NDArray[Any] = values.view(sizes[values.element_size()]).numpy()
    return found


def _look_up(table: NDArray[Any], which: NDArray[Any], out: NDArray[Any], scratch: Scratch) -> None:
    """out = table[which], a stripe at a time."""
    import numpy as np

    step = max(1, STRIPE // max(math.prod(which.shape[1:]), 1))
    for start in range(0, len(which), step):
        part, there = which[start : start + step], out[start : start + step]
        # The type of index that `take` works with, so that it makes no copy of its own.
        index = scratch.array("index", part.shape, np.intp)
        np.copyto(index, part)
        if there.flags.c_contiguous:
            table.take(index, out=there, mode="wrap")
        else:
            found = scratch.array("found", part.shape, table.dtype)
            table.take(index, out=found, mode="wrap")
            there[...] = found


def _has_free(tensor: TensorPlan) -> bool:
    return any(block.source is None and block.free for block in tensor.sorts())


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
            old[there] += (grown[here] + tensor.offset) / float(inverse)
        old -= tensor.offset
        # Several tensors may hold one between them: copies of an expert, each with its share.
        out[tensor.source] = out[tensor.source] + old if tensor.source in out else old
    return out
