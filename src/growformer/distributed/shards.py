"""One tensor between its shards and the whole."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank that has a shard of it: a collective call."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def shard_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of `like`'s shape, which every rank has as a whole, placed as `like` is; nothing is sent.

    Its shard has memory of its own: `values` can go.
    """
    if not isinstance(like, DTensor):
        return values
    placed = distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
    return of_local(placed.to_local().clone(memory_format=torch.contiguous_format), like)


def of_local(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor of which `local` is this rank's shard, placed as `like` is."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def put(into: torch.Tensor, values: torch.Tensor) -> None:
    """Write the whole tensor `values`, which every rank has, into this rank's shard of `into`; nothing is sent."""
    there = into.detach()
    if isinstance(there, DTensor):
        values = distribute_tensor(values, there.device_mesh, there.placements, src_data_rank=None).to_local()
        there = there.to_local()
    there.copy_(values)


def place(tensor: torch.Tensor) -> str:
    """Where a tensor's shards lie, in words."""
    if not isinstance(tensor, DTensor):
        return f"whole, {list(tensor.shape)}"
    return f"{list(tensor.shape)} as {tensor.placements} on {tensor.device_mesh}"


def same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether each rank has the same entries of both."""
    if one.shape != other.shape or isinstance(one, DTensor) != isinstance(other, DTensor):
        return False
    if not isinstance(one, DTensor) or not isinstance(other, DTensor):
        return True
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def release(tensor: torch.Tensor) -> None:
    """Give this rank's memory of a tensor back, whoever still holds the tensor."""
    found = tensor.detach()
    local = found.to_local() if isinstance(found, DTensor) else found
    local.untyped_storage().resize_(0)
