"""The processes that train together: one, or those that torchrun started."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from growformer.errors import ChangedError, GrowformerError, RequestError

T = TypeVar("T")


@dataclass(frozen=True)
class Machines:
    """One process among those that train together.

    Attributes:
        rank: which one this is; the first (0) decides, writes and speaks.
        count: how many there are.
        device: where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model whose gradients are averaged over all processes; alone, the model itself."""
        if self.count == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def unsynced(self, wrapped: torch.nn.Module, last: bool) -> Any:
        """A context for one pass of several before a step: gradients are averaged in the last one."""
        return nullcontext() if self.count == 1 or last else wrapped.no_sync()  # type: ignore[operator]

    def mean(self, value: torch.Tensor) -> float:
        """A number's mean over all processes."""
        if self.count == 1:
            return float(value)
        total = value.detach().double().clone()
        dist.all_reduce(total)
        return float(total) / self.count

    def decided(self, decide: Callable[[], bool]) -> bool:
        """What the first process decides."""
        if self.count == 1:
            return decide()
        said = torch.tensor([int(self.first and decide())], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())

    def on_first(self, run: Callable[[], T]) -> T:
        """Run something on the first process alone; all get its result, or its error."""
        if self.count == 1:
            return run()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = run()
            except GrowformerError as error:
                told[1] = error
        dist.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise told[1]
        return told[0]  # type: ignore[no-any-return]

    def all(self, value: T) -> list[T]:
        """A value of every process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def require_same(self, model: torch.nn.Module, when: str) -> None:
        """Check that every process has the same weights, to the last bit.

        Raises:
            ChangedError: they differ.
        """
        if self.count == 1:
            return
        found = self.all(digest(model))
        odd = [rank for rank, other in enumerate(found) if other != found[0]]
        if odd:
            raise ChangedError(f"{when}: process {odd[0]} has other weights than process 0; they must be the same")


def digest(model: torch.nn.Module) -> str:
    """A hash of a model's parameters, names and shapes included."""
    made = hashlib.sha256()
    for name, parameter in model.named_parameters():
        made.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
        made.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


@contextmanager
def started(device: str) -> Iterator[Machines]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    Args:
        device: auto, cpu or cuda.

    Raises:
        RequestError: cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("device: cuda is asked for, and torch sees no GPU here; auto takes what there is")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Machines(0, 1, place)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Machines(rank, count, place)
    finally:
        dist.destroy_process_group()
