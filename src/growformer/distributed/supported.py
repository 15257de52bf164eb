"""Which sharded models can grow, and what to do with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from growformer.errors import RequestError

SAVED = "save the model, grow the checkpoint (expand_checkpoint), and start from that"


def unwrapped(model: Any) -> Any:
    """The model within what torch.compile put around it."""
    while type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    return model


def require_supported(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
    """The model to grow, unwrapped.

    Raises:
        RequestError: it is in the hands of an engine that keeps parameters in ways of its own, by name.
    """
    import transformers

    inner = unwrapped(model)
    kind = type(inner).__name__
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in inner.modules()):
        raise RequestError(f"FSDP1 (FullyShardedDataParallel) flattens parameters: use fully_shard (FSDP2), or {SAVED}")
    theirs = any(type(each).__module__.partition(".")[0] == "deepspeed" for each in optimizers)
    if kind == "DeepSpeedEngine" or theirs or any(hasattr(x, "ds_id") for x in inner.parameters()):
        raise RequestError(f"DeepSpeed keeps parameters and moments in buffers of its own: use fully_shard, or {SAVED}")
    if kind in ("DistributedDataParallel", "DataParallel"):
        raise RequestError(
            f"{kind} holds whole parameters: grow model.module on every rank, without shard=, and wrap it again"
        )
    if not isinstance(inner, transformers.PreTrainedModel):
        raise RequestError(f"{kind} is no model of transformers; growformer.grow takes stock models")
    if not any(hasattr(x, "to_local") for x in inner.parameters()):
        raise RequestError(f"no parameter of {kind} is sharded: grow it without shard=")
    return inner
