"""Whether two attributes of modules say the same, and what of one model they mean in another."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch

SKIPPED = frozenset(
    {
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"),
        *(f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")),
        *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        *("_is_full_backward_hook", "_compiled_call_impl", "_weight_conversions"),
        *("growformer_plan", "growformer_behind"),
    }
)
"""Attributes of every module that are no facts of its config."""


def same(one: Any, other: Any, seen: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Whether two attributes, of models built alike from two configs, say the same.

    Plain data is compared by value; tensors by value (on the meta device by shape); functions, and methods whatever
    they are bound to, by their code; other objects by their attributes. Modules and configs, which have partners of
    their own, count as the same.
    """
    if one is other or (id(one), id(other)) in seen:
        return True
    if type(one) is not type(other):
        return False
    seen |= {(id(one), id(other))}
    if isinstance(one, (torch.nn.Module, config_type())):
        return True
    if isinstance(one, torch.Tensor):
        return same_tensor(one, other)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key], seen) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b, seen) for a, b in zip(one, other, strict=True))
    if isinstance(one, functools.partial):
        return same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords), seen)
    if isinstance(one, types.MethodType):
        return one.__func__ is other.__func__
    if isinstance(one, types.FunctionType):
        cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (one, other)]
        return one.__code__ is other.__code__ and same(cells[0], cells[1], seen)
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return same(vars(one), vars(other), seen)
    return bool(one == other)


def same_tensor(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and (one.is_meta or torch.equal(one, other))


def meant(value: Any, partners: Mapping[int, Any]) -> Any:
    """An attribute of the grown model as the live one should hold it: with the live one's modules and configs."""
    if id(value) in partners:
        return partners[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in partners:
        return types.MethodType(value.__func__, partners[id(value.__self__)])
    if type(value) in (list, tuple):
        return type(value)(meant(x, partners) for x in value)
    if type(value) is dict:
        return {key: meant(x, partners) for key, x in value.items()}
    return value


@functools.cache
def config_type() -> type:
    from transformers import PreTrainedConfig

    return PreTrainedConfig
