"""The layout of a stock model: which part of which parameter each tensor of its checkpoint is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from growformer.checkpoint.stock import disk_names
from growformer.errors import SourceError
from growformer.optim.layout import Layout, View

if TYPE_CHECKING:
    import transformers


def layout_of(model: transformers.PreTrainedModel) -> Layout:
    """Where every tensor that a model's checkpoint would hold lies in the model's memory.

    transformers renames, splits and turns what it saves. The same code, run on tensors without memory and with its
    copies left out, gives views of them.

    Args:
        model: a stock model, on any device.

    Raises:
        SourceError: a tensor on disk is no view of one in memory (it is put together from several), by name; or a
            tensor in memory is not covered once.
    """
    first, tied = shared_names(model)
    held: dict[int, str] = {}
    bare: dict[str, torch.Tensor] = {}
    for name, tensor in first.items():
        bare[name] = torch.empty(tensor.shape, device="meta")
        held[_memory(bare[name])] = name
    with _AsViews():
        disk = disk_names(model, bare)
    views = {}
    for name, tensor in disk.items():
        home = held.get(_memory(tensor))
        if home is None:
            raise SourceError(
                f"{name} on disk is put together from several tensors of {type(model).__name__}, or from a part of one "
                f"in another order, and cannot grow in memory; grow the saved checkpoint instead (save_pretrained, "
                f"then expand_checkpoint)"
            )
        views[name] = View(home, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
    layout = Layout(views, {name: tuple(x.shape) for name, x in first.items()}, tied)
    layout.require_whole()
    return layout


def disk_shapes(model: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model's checkpoint would hold; nothing is copied."""
    bare = {name: torch.empty(x.shape, device="meta") for name, x in shared_names(model)[0].items()}
    return {name: tuple(x.shape) for name, x in disk_names(model, bare).items()}


def shared_names(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A model's saved tensors, a shared one once under its first name; and the other names with that first one."""
    first: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        nowhere = (
            tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local")
        )  # a DTensor's memory has no address
        place = id(tensor) if nowhere else (tensor.device, tensor.data_ptr())
        if place in seen:
            tied[name] = seen[place]
        else:
            first[name] = tensor
            seen[place] = name
    return first, tied


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _AsViews(TorchFunctionMode):
    """Leaves copies out: `contiguous` and `clone` give the tensor itself."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))
