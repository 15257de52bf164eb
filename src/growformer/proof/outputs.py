"""Every floating output of a stock model, and the old channels of outputs whose axis grew."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers

from growformer.algebra import Lift
from growformer.errors import UncheckedError
from growformer.proof.inputs import Batch, Inputs, as_batches, kept_positions, keywords

__all__ = [
    "Outputs",
    "Reads",
    "closed_tokens",
    "grown_axes",
    "is_logits",
    "outputs",
    "pools_unpadded",
    "raw_outputs",
    "read_back",
]

Outputs = Mapping[str, torch.Tensor]
"""By name, [row, channel] (any dims before the last); the name of a batch that is not plain stands behind a comma."""

Reads = Mapping[str, Lift]
"""By axis, how its old channels sit among the new."""


def is_logits(name: str) -> bool:
    """Whether an output's channels are a vocabulary or labels, which only ever grow at their end."""
    return name.partition(",")[0].rpartition(".")[2].endswith("logits")


def grown_axes(axes: Mapping[str, Any]) -> Reads:
    """The lifts of a receipt's axes that hold for the whole model."""
    lifts = {name: Lift.from_json(told["old"], told["lift"]) for name, told in axes.items() if "@" not in name}
    return {name: lift for name, lift in lifts.items() if not lift.is_identity}


def closed_tokens(axes: Mapping[str, Any]) -> bool:
    """Whether a receipt says that new tokens have the probability zero."""
    return axes.get("vocab", {}).get("barred") is True


def _floating(output: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of numbers in a model's output, by dotted name; caches and lists of layers are left out."""
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            yield prefix + name, value
        elif isinstance(value, transformers.utils.ModelOutput):
            yield from _floating(value, f"{prefix}{name}.")


def raw_outputs(model: Any, inputs: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """One forward pass: every floating output by name, as the model gives it.

    Args:
        model: in eval mode.
        inputs: by keyword; floating ones are cast to the model's dtype, and all go where its inputs live.
        options: further keywords, for instance a cache.

    Raises:
        UncheckedError: the model gives no numbers.
    """
    # No cache unless asked for: it saves nothing in one pass, and encoders do not take the keyword.
    if "use_cache" in inspect.signature(model.forward).parameters:
        options.setdefault("use_cache", False)
    found = dict(_floating(model(**inputs, **options)))
    if not found:
        raise UncheckedError(f"{type(model).__name__} gives neither logits nor hidden states to compare.")
    return found


@torch.no_grad()
def outputs(model: Any, inputs: Inputs, batch: int = 8, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Every floating output of a model, on the CPU, in the dtype in which the model gives it.

    Args:
        model: in eval mode.
        inputs: token ids (an encoder-decoder gets them on both sides), keywords, or several batches; see `Inputs`.
        batch: sequences per forward pass.
        device: where the inputs go; None is where the model's first parameter is.

    Returns:
        By name, [sequence, position, channel] or whatever the model gives; [row, channel] of the real positions where
        inputs are padded.

    Raises:
        UncheckedError: the model gives no numbers.
    """
    found: dict[str, torch.Tensor] = {}
    for one in as_batches(inputs):
        suffix = "" if one.name == "plain" else f", {one.name}"
        for name, value in _of_batch(model, one, batch, device or model.device).items():
            found[name + suffix] = value
    return found


def _of_batch(model: Any, given: Batch, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    inputs = dict(given.inputs)
    if set(inputs) == {"input_ids"} and "decoder_input_ids" in keywords(type(model)):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    kept = kept_positions(inputs)
    inputs = {k: x.to(device, model.dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
    rows = len(next(iter(inputs.values())))
    if "pixel_values" in inputs and "input_ids" in inputs:
        batch = rows  # every text is compared with every image
    elif pools_unpadded(model):
        batch = 1
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, rows, batch):
        chunk = {name: x[start : start + batch] for name, x in inputs.items()}
        for name, value in raw_outputs(model, chunk).items():
            parts.setdefault(name, []).append(value.cpu())
    whole = {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in parts.items()}
    return {name: _real(value, kept) for name, value in whole.items()}


def _real(value: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The real positions of an output that has positions."""
    mask = kept.get(value.shape[1]) if value.dim() == 3 else None
    return value if mask is None or mask.shape != value.shape[:2] else value[mask]


def pools_unpadded(model: Any) -> bool:
    """A classifier that looks for padding to find the last token, and has no padding token to look for."""
    tables = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values()
    classifies = any(type(model) in (found if isinstance(found, tuple) else (found,)) for found in tables)
    return classifies and getattr(model.config.get_text_config(), "pad_token_id", None) is None


def read_back(name: str, old: int, value: torch.Tensor, reads: Reads | None) -> tuple[torch.Tensor, int]:
    """The channels of a grown model's output that are the source's.

    Args:
        name: the output's.
        old: channels of the source's output.
        value: the grown model's output, channels last.
        reads: the axes that grew; None where that is not known, and then the first channels are meant.

    Returns:
        The output at those channels, and how many new logits were left out.

    Raises:
        UncheckedError: the output has another number of channels, and no axis that grew explains it.
    """
    new = value.shape[-1]
    if new == old:
        return value, 0
    if new > old and (is_logits(name) or reads is None):
        return value[..., :old], new - old if is_logits(name) else 0
    lifts = {lift for lift in (reads or {}).values() if (lift.old, lift.new) == (old, new)}
    places = {_places(lift) for lift in lifts}
    if len(places) != 1:
        found = "several axes" if places else "no axis"
        raise UncheckedError(
            f"The output {name} has {old} channels in the source and {new} in the other, and {found} of the receipt "
            "could say where the old ones are, so it cannot be compared."
        )
    return value[..., list(places.pop())], 0


def _places(lift: Lift) -> tuple[int, ...]:
    """Where R reads each old channel."""
    at: dict[int, int] = {}
    for start, run in lift.spans():
        if run.old is not None and run.back is not None and not run.mean:
            for i in range(run.count):
                at.setdefault(run.old + i, start + i)
    return tuple(at[i] for i in range(lift.old))
