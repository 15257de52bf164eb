"""Can every new weight learn? Counts the new entries that no gradient reaches within a few backward passes.

A new entry is alive if its gradient is non-zero in one of two backward passes with one optimizer step between them
(design, section 1): a block that is closed on one side moves in the first step, and opens the way to the other side for
the second. Entries zero on both sides never get a gradient at all. The comparison with zero is exact: a closed path
multiplies by exact zeros, so rounding cannot make a dead entry look alive.

What has no gradient for another reason, because its effect cancels, is not judged well here: a key's bias shifts all
scores of a query alike, which softmax does not see, so its gradient is rounding, and mostly but not always non-zero.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

from growformer.errors import UncheckedError
from growformer.proof.barred import level
from growformer.proof.float64 import build64_from, require_float64, true_float64
from growformer.proof.loss import Loss, covering_tokens, losses, next_token_loss

__all__ = ["covering_tokens", "dead_entries", "next_token_loss", "parameter_masks", "still_dead"]

STEP = 1e-2
"""Length of the step between two passes: each tensor moves by this much of the model's typical weight.

What counts is only that every entry with a gradient moves by a number that survives further products, so any length
between rounding and divergence gives the same counts.
"""


class _Leaky(TorchFunctionMode):
    """ReLU, and GELU where it rounds to zero, with a slope below zero.

    A unit that is off for all of the data has no gradient, though other data would turn it on: that says nothing of the
    growth. Leaking, it has one, unless it is closed on both sides, for 0 stays 0. At 0 itself a ReLU has the slope that
    it has in training, which is 0: a unit that is written with zeros alone stands there whatever the data is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, torch.nn.functional.relu):
            return torch.where(args[0] < 0, 0.1 * args[0], torch.nn.functional.threshold(args[0], 0.0, 0.0))
        if func is torch.nn.functional.gelu:
            out = func(*args, **(kwargs or {}))
            return torch.where(out == 0, 0.1 * args[0], out)
        return func(*args, **(kwargs or {}))


def dead_entries(
    model: torch.nn.Module,
    new_mask: Mapping[str, torch.Tensor],
    data: torch.Tensor | Mapping[str, torch.Tensor] | Loss,
    passes: int = 2,
) -> dict[str, int]:
    """Count, tensor by tensor, the new entries whose gradient is exactly zero in every pass.

    See `still_dead`, which says which entries they are.

    Returns:
        For every tensor in the mask the number of its new entries that are dead; 0 where all are alive.
    """
    return {name: int(still.sum()) for name, still in still_dead(model, new_mask, data, passes).items()}


def still_dead(
    model: torch.nn.Module,
    new_mask: Mapping[str, torch.Tensor],
    data: torch.Tensor | Mapping[str, torch.Tensor] | Loss,
    passes: int = 2,
) -> dict[str, torch.Tensor]:
    """The new entries whose gradient is exactly zero in every pass.

    The model runs in true float64 and eval mode (no dropout). Between passes every tensor takes a plain gradient step,
    scaled by its own root-mean-square gradient: an entry moves if and only if it has a gradient (weight decay or noise
    would move dead entries too), by amounts that differ from entry to entry (equal steps, as of Adam, could cancel),
    and a tensor with small gradients moves as far as the others. The weights are put back afterwards.

    Args:
        model: a float64 model, from `build64`.
        new_mask: by parameter name, a boolean tensor of the parameter's shape, true at new entries; see
            `parameter_masks` for on-disk names. Tied tensors may go by any of their names, and are counted once, under
            the first name the model gives them.
        data: token ids (see `covering_tokens`), a forward pass's keywords, or a function from the model to its loss.
        passes: backward passes, with a step between each two; a chain of growths needs one more.

    Returns:
        For every tensor in the mask a mask of those of its new entries that are dead.

    Raises:
        UncheckedError: the mask names an unknown tensor or has another shape, the loss is not finite, or the model is
            not float64.
    """
    require_float64(model, "The model whose new entries are to be checked")
    masks = _canonical_masks(model, new_mask)
    each = [data] if callable(data) and not isinstance(data, torch.Tensor) else losses(model, data)
    parameters = dict(model.named_parameters())
    before = {name: (x.detach().clone(), x.requires_grad, x.grad) for name, x in parameters.items()}
    dead = {name: mask.clone() for name, mask in masks.items()}
    training = model.training
    model.eval().requires_grad_(True)
    try:
        with true_float64(), _Leaky():
            # A bias that bars something (-1e30) is no typical weight, and a step of its size would be the end of all.
            scale = STEP * _rms(x[x.abs() < -level(torch.float16)] for x in parameters.values())
            for step in range(passes):
                gradients = _gradients(model, each, parameters)
                for name, still in dead.items():
                    still &= gradients[name] == 0
                if step + 1 < passes:
                    _move(parameters, gradients, scale)
    finally:
        for name, (values, requires_grad, gradient) in before.items():
            parameters[name].data.copy_(values)
            parameters[name].requires_grad_(requires_grad)
            parameters[name].grad = gradient
        model.train(training)
    return dead


def _gradients(
    model: torch.nn.Module, each: Sequence[Loss], parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The gradient of the sum of the losses, by parameter name; zero where a loss does not reach."""
    total = {name: torch.zeros_like(x) for name, x in parameters.items()}
    for loss in each:
        value = loss(model)
        if not bool(value.isfinite()):
            raise UncheckedError(
                f"The loss is {value.item()}: its gradients say nothing about which entries can learn."
            )
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for sums, gradient in zip(total.values(), found, strict=True):
            if gradient is not None:
                sums += gradient
    return total


def _rms(tensors: Any) -> float:
    """Root mean square over every entry of several tensors."""
    squares, count = 0.0, 0
    for x in tensors:
        squares += float(x.detach().square().sum())
        count += x.numel()
    return math.sqrt(squares / max(count, 1))


@torch.no_grad()
def _move(parameters: Mapping[str, torch.nn.Parameter], gradients: Mapping[str, torch.Tensor], scale: float) -> None:
    for name, x in parameters.items():
        size = _rms([gradients[name]])
        if size > 0:
            x.sub_(gradients[name], alpha=scale / size)


def _canonical_masks(model: torch.nn.Module, new_mask: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masks under the first name of each parameter; the masks of tied names are joined."""
    names = {id(x): name for name, x in model.named_parameters()}
    aliases = dict(model.named_parameters(remove_duplicate=False))
    masks: dict[str, torch.Tensor] = {}
    for alias, mask in new_mask.items():
        if alias not in aliases:
            near = ", ".join(itertools.islice(aliases, 3))
            raise UncheckedError(f"The mask names {alias}, which is no parameter of the model ({near}, ...).")
        if mask.shape != aliases[alias].shape:
            raise UncheckedError(
                f"The mask of {alias} has shape {list(mask.shape)}, the tensor {list(aliases[alias].shape)}."
            )
        name = names[id(aliases[alias])]
        masks[name] = masks[name] | mask if name in masks else mask.bool()
    return masks


def parameter_masks(config: Mapping[str, Any], on_disk: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks by parameter name, from masks by on-disk name, which differ where experts are fused or heads are tied.

    The masks go through the very loader that the weights go through, so they end where the weights end.

    Args:
        config: what the grown model's config.json holds.
        on_disk: for every tensor of the checkpoint a boolean tensor of its shape, true at new entries.

    Returns:
        A mask for every parameter that has new entries.

    Raises:
        UncheckedError: a tensor of the checkpoint has no mask.
    """
    model: transformers.PreTrainedModel = build64_from(config, {name: x.double() for name, x in on_disk.items()})
    masks = {name: parameter.detach() != 0 for name, parameter in model.named_parameters()}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}
