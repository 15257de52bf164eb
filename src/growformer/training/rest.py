"""Whether a model is between two steps: parameters that something still holds cannot be exchanged for grown ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch

from growformer.errors import RequestError


def require_at_rest(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors on several devices, with gradients, or with hooks on their gradients.

    Raises:
        RequestError: naming the first, and what to do.
    """
    devices = {x.device for x in tensors.values()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise RequestError(
            f"the model lies on {', '.join(sorted(map(str, devices)))}; a model on one device can grow in memory, "
            f"others as a saved checkpoint (save_pretrained, then expand_checkpoint)"
        )
    for name, tensor in tensors.items():
        if tensor.grad is not None:
            raise RequestError(
                f"{name} has a gradient, which would not fit the grown parameter: grow between steps, after "
                f"optimizer.step() and optimizer.zero_grad(set_to_none=True)"
            )
        if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise RequestError(
                f"{name} has hooks on its gradient, which hold the old parameter: remove them (handle.remove()), "
                f"grow, and register them again"
            )


def require_swappable(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Refuse parameters that something else holds on to.

    Raises:
        RequestError: naming the first, and what to do.
    """
    for name, live in parameters:
        if weakref.getweakrefs(live):
            raise RequestError(
                f"something holds a weak reference to {name} (a compiled function, a cache), and would go on with "
                f"the old parameter: drop it, or call torch.compiler.reset(), and grow then"
            )
        if live._use_count() > 2 or not live.is_leaf:  # type: ignore[attr-defined]
            raise RequestError(
                f"a forward pass still holds {name}: grow between steps, after loss.backward() and with no outputs "
                f"kept that have a gradient to give (del them)"
            )
