"""Which models, and which growths of them, there are in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growformer.errors import RequestError
from growformer.planning import Plan
from growformer.planning.plan import ALLOWED

if TYPE_CHECKING:
    import torch
    import transformers

SHARDS = "say growformer.grow(..., shard=function), with what sharded it by fully_shard (FSDP2)"


def stock(model: Any) -> transformers.PreTrainedModel:
    """The stock model within what torch.compile or an average put around it.

    Raises:
        RequestError: it is in a wrapper that holds its old parameters, or it is no model of transformers.
    """
    import transformers

    kind = type(model).__name__
    while kind in ("OptimizedModule", "AveragedModel"):
        model = model._orig_mod if kind == "OptimizedModule" else model.module
        kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel"):
        raise RequestError(f"{kind} holds the old parameters: grow model.module, and wrap it again")
    if kind == "FullyShardedDataParallel" or kind.startswith("FSDP"):
        raise RequestError(f"{kind} holds shards of the parameters: {SHARDS}")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise RequestError(
            f"{kind} has adapters of PEFT: merge_and_unload() them first, or remove them and add new ones"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise RequestError(f"{kind} is quantised; dequantise it first")
    if not isinstance(model, transformers.PreTrainedModel):
        raise RequestError(f"{kind} is no model of transformers; growformer.grow takes stock models")
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        raise RequestError(f"the parameters of {kind} are sharded (DTensor): {SHARDS}")
    return model


def require_live(plan: Plan, model: torch.nn.Module, *, change: bool = False) -> None:
    """Refuse a growth that live modules cannot follow, or that nobody asked for by name (`change`: another function).

    Raises:
        RequestError: some new entries could never learn, the function would change, or the grown modules are of other
            classes.
    """
    plan.require_allowed(dead=False, change=change, say=ALLOWED)
    if plan.source_family or plan.within_eps:
        what = f"becomes a {plan.family}" if plan.source_family else "has layers that hand their last norm to new ones"
        raise RequestError(
            f"{type(model).__name__} {what}, which its live modules cannot follow; grow the saved checkpoint instead "
            f"(save_pretrained, then expand_checkpoint)"
        )
