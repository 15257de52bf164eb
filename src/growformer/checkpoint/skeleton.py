"""Skeletons: stock models of a config with their modules and computed buffers, but without memory for parameters."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from growformer.checkpoint.layout import shared_names
from growformer.errors import RequestError

if TYPE_CHECKING:
    import transformers


def skeleton(model: transformers.PreTrainedModel, config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """A model of the same class and kernels as `model`, as `config` has it.

    Parameters are on the meta device, tied as the class ties them; buffers are computed on `model`'s device.

    Args:
        model: a stock model, sharded or not.
        config: what config.json would hold.
    """
    from transformers.initialization import no_init_weights

    made = type(model.config).from_dict(copy.deepcopy(dict(config)))
    kernels = {"attn_implementation": model.config._attn_implementation}
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None:
        kernels["experts_implementation"] = experts
    with no_init_weights(), _parameters_on_meta(), torch.device(model.device):
        built = stock_type(model)._from_config(made, dtype=model.dtype, **kernels)
    built.tie_weights()
    if hasattr(model, "_weight_conversions"):
        built._weight_conversions = model._weight_conversions
    return built


def stock_skeleton(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A skeleton of a model as it is; for only models that are as their class builds them can grow in memory.

    Raises:
        RequestError: the model has other modules or parameters than its class makes of its config, by name.
    """
    kind = stock_type(model).__name__
    stock = skeleton(model, model.config.to_dict() | {"architectures": [kind]})  # as a plan of the model has it
    live = dict(model.named_modules())
    for path, module in stock.named_modules():
        found = live.get(path)
        if found is None or stock_type(found) is not type(module):
            raise RequestError(
                f"{path or 'the model'} is {type(found).__name__}, and {type(module).__name__} in a stock {kind}: only "
                f"stock models grow in memory (undo the change, or grow the saved checkpoint)"
            )
        for name, value in module._parameters.items():
            if name not in found._parameters or (found._parameters[name] is None) != (value is None):
                raise RequestError(
                    f"{path}.{name} is not where a stock {kind} has it; only stock models grow in memory"
                )
    shapes = {name: list(x.shape) for name, x in shared_names(stock)[0].items()}
    for name, tensor in shared_names(model)[0].items():
        if shapes.get(name) != list(tensor.shape):
            there = shapes.get(name, "no tensor of its own")
            raise RequestError(f"{name} is {list(tensor.shape)}, and {there} in a stock {kind} of the model's config")
    return stock


def stock_type(module: torch.nn.Module) -> Any:
    """A module's class as its library has it: `fully_shard` gives a module a class of its own, derived from that."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded: nothing can be sharded
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return type(module)
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, fsdp.FSDPModule))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as soon as a module takes them; a shared one stays one."""
    register = torch.nn.Module.register_parameter

    def bare(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = torch.nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = bare  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
