"""What no gradient reaches for a reason that is not the growth's: idle weights of the source, experts never chosen."""

from collections.abc import Mapping
from typing import Any

import torch

from growformer.checkpoint.stock import disk_names
from growformer.planning import Plan
from growformer.planning.plan import TensorPlan
from growformer.proof.alive import still_dead
from growformer.proof.float64 import true_float64
from growformer.proof.loss import experts, losses

__all__ = ["excuse", "experts_never_chosen", "idle_weights"]


def idle_weights(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which entries of a model get no gradient within two passes, by name on disk.

    A pooler whose output nobody uses, a token that the data does not hold, a key bias that softmax does not see: what
    is idle in the source stays idle whatever is added to it.

    Args:
        model: the source's, in float64.
        inputs: as for the grown model; see `growformer.proof.loss.covering_inputs`.
    """
    everything = {name: torch.ones(x.shape, dtype=torch.bool) for name, x in model.named_parameters()}
    still = still_dead(model, everything, inputs)
    names = {id(x): name for name, x in model.named_parameters()}
    tied = {name: still[names[id(x)]].double() for name, x in model.named_parameters(remove_duplicate=False)}
    on_disk = disk_names(model, tied)
    prefix = f"{model.base_model_prefix}."
    short = {name.removeprefix(prefix): x != 0 for name, x in on_disk.items()}
    return short | {prefix + name: x for name, x in short.items()} | {name: x != 0 for name, x in on_disk.items()}


def excuse(plan: Plan, masks: Mapping[str, torch.Tensor], idle: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Take out of the masks of new entries what extends something idle in the source.

    Args:
        plan: the growth.
        masks: of the new entries, by name on disk; changed in place.
        idle: from `idle_weights`.

    Returns:
        How many entries were taken out, by tensor, where it was any.
    """
    out = {}
    for tensor in plan.tensors:
        mask = masks.get(tensor.name)
        of = idle.get(tensor.source or tensor.fill.like or "")
        if mask is None or of is None or not bool(of.any()):
            continue
        before = int(mask.sum())
        if bool(of.all()):
            mask.zero_()
        else:
            for dim in range(of.dim()):
                rest = [i for i in range(of.dim()) if i != dim]
                lines = of.all(dim=tuple(rest)) if rest else of
                mask[(slice(None),) * dim + (_target(tensor, dim, lines),)] = False
        if before > int(mask.sum()):
            out[tensor.name] = before - int(mask.sum())
    return out


def _target(tensor: TensorPlan, dim: int, idle: torch.Tensor) -> torch.Tensor:
    """Where the idle indices of one of the source tensor's dims end in the target."""
    lift = tensor.dims[dim]
    found = torch.zeros(lift.new, dtype=torch.bool)
    if tensor.source is None:
        return idle.clone() if len(idle) == lift.new else found
    for start, run in lift.spans():
        if run.old is not None and not run.mean:
            found[start : start + run.count] = idle[run.old : run.old + run.count]
    return found


def experts_never_chosen(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """The experts that no token is sent to, by the name of the module that holds a layer's experts.

    Stock modules of experts are told the numbers of the chosen ones as a tensor of whole numbers.

    Args:
        model: in float64.
        inputs: a forward pass's keywords.
    """
    modules = dict(model.named_modules())
    counts = {name: torch.zeros(count, dtype=torch.long) for name, count in experts(model)}

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype == torch.long:
                    chosen = value[(value >= 0) & (value < len(counts[name]))]
                    counts[name] += torch.bincount(chosen.flatten(), minlength=len(counts[name]))

        return hook

    handles = [modules[name].register_forward_pre_hook(count(name), with_kwargs=True) for name in counts]
    try:
        if counts:
            with true_float64(), torch.no_grad():
                for one in losses(model, inputs):
                    one(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (n == 0).nonzero().flatten().tolist() for name, n in counts.items() if bool((n == 0).any())}
