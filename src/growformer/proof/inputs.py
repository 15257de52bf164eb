"""Inputs for any stock model: token ids, pixels, spectrograms, padded or not, as its own forward pass names them.

Nothing here knows a model type. What a model takes is read off its forward signature and its config's sizes.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from growformer.checkpoint.stock import stock_class
from growformer.errors import UncheckedError
from growformer.proof.float64 import stock_config
from growformer.proof.probe import probe_tokens

__all__ = ["Batch", "Inputs", "Probe", "as_batches", "from_json", "kept_positions", "keywords", "probe_inputs", "size"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One set of a forward pass's keywords.

    Attributes:
        name: what is special about it ("plain", "left padded"), for reports.
        inputs: by keyword; every tensor has the batch first.
    """

    name: str
    inputs: Mapping[str, torch.Tensor]


Inputs = torch.Tensor | Mapping[str, torch.Tensor] | Sequence[Batch]
"""Token ids [sequence, position], or a forward pass's keywords with the batch first, or several of these."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Inputs for a comparison.

    Attributes:
        batches: what the models are compared on.
        kind: "text" for the packaged prose under the checkpoint's own tokenizer, else "random".
        reason: why the tokens are random; empty for text, and where there are no tokens.
    """

    batches: tuple[Batch, ...]
    kind: Literal["text", "random"]
    reason: str = ""

    @property
    def shapes(self) -> dict[str, dict[str, list[int]]]:
        """The shape of every input, by batch and keyword."""
        return {b.name: {name: list(x.shape) for name, x in b.inputs.items()} for b in self.batches}


def as_batches(inputs: Inputs) -> tuple[Batch, ...]:
    """Any kind of inputs as batches."""
    if isinstance(inputs, torch.Tensor):
        return (Batch("plain", {"input_ids": inputs}),)
    return (Batch("plain", inputs),) if isinstance(inputs, Mapping) else tuple(inputs)


def from_json(value: Any) -> Inputs:
    """Inputs that went through JSON: lists for tensors, and what was floating point has a fraction somewhere."""
    if isinstance(value, Mapping):
        return {name: torch.tensor(x) for name, x in value.items()}
    if value and isinstance(value[0], Mapping):
        return [Batch(b["name"], {name: torch.tensor(x) for name, x in b["inputs"].items()}) for b in value]
    return torch.tensor(value)


def size(config: Any, name: str) -> Any:
    """A field of a config, or of the first of its parts (text_config, vision_config, ...) that has it; None if none.

    The parts come first, for a config of several towers may carry leftovers of its own.
    """
    parts = [getattr(config, part, None) for part in config.sub_configs]
    found = (getattr(part, name, None) for part in [*filter(None, parts), config])
    return next((value for value in found if value is not None), None)


def keywords(cls: Any) -> list[str]:
    """The names of the data that a model's forward pass takes and that can be made for it, in its order."""
    taken = inspect.signature(cls.forward).parameters
    names = [name for name in ("input_ids", "pixel_values", "input_features") if name in taken]
    # A classifier on an encoder-decoder makes the decoder's ids of the encoder's, and looks for one in the other.
    if "decoder_input_ids" in taken and not _classifies(cls):
        names.append("decoder_input_ids")
    return names


def _classifies(cls: Any) -> bool:
    tables = (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    )
    return any(cls in (found if isinstance(found, tuple) else (found,)) for t in tables for found in t.values())


def kept_positions(inputs: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """For each padded length, which positions [sequence, position] are real: nothing is claimed of the others."""
    masks = (inputs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    return {mask.shape[1]: mask.bool() for mask in masks if mask is not None}


def probe_inputs(folder: Path, batch: int, length: int, seed: int) -> Probe:
    """Choose inputs to compare two models on, from the source's folder.

    Args:
        folder: a Hugging Face folder with config.json.
        batch: sequences or images of each batch.
        length: positions of the longest sequences; clipped to what the model takes.
        seed: of the draws; the same seed gives the same inputs on every machine.

    Returns:
        A plain batch and, for models of padded text, one padded on the right and one on the left, sequences of several
        lengths. Token ids are the packaged prose where there is a usable tokenizer, else random; images and
        spectrograms are normal noise.

    Raises:
        SourceError: the folder holds no stock config.
        UncheckedError: nothing that the model takes can be made.
    """
    config = stock_config(folder)
    cls = stock_class(config)
    names = keywords(cls)
    if not names:
        raise UncheckedError(f"{cls.__name__} takes no token ids, pixels or input features, so it cannot be compared.")
    generator = torch.Generator().manual_seed(seed)
    plain: dict[str, torch.Tensor] = {}
    kind: Literal["text", "random"] = "random"
    reason = ""
    for name in names:
        if name == "pixel_values":
            rows = batch if len(names) > 1 else 4 * batch  # an image may give no more than a few numbers
            plain[name] = torch.randn(image_shape(config, rows), generator=generator)
        elif name == "input_features":
            plain[name] = torch.randn(spectrogram_shape(config, batch), generator=generator)
        else:
            # Not as long as the encoder's, so that what is of which can be told by length.
            tokens = probe_tokens(folder, batch, length, seed)
            kind, reason = tokens.kind, tokens.reason
            if name != "input_ids":
                tokens = dataclasses.replace(tokens, tokens=tokens.tokens[:, : max(2, 2 * length // 3)].flip(0))
            plain[name] = _framed(config, tokens.tokens, generator, name.startswith("decoder"), kind == "text")
    segments = size(config, "type_vocab_size") or 0
    if "token_type_ids" in inspect.signature(cls.forward).parameters and segments > 1:
        plain["token_type_ids"] = torch.randint(segments, plain["input_ids"].shape, generator=generator)
    batches = (Batch("plain", plain), *_padded(config, cls, plain))
    return Probe(batches, kind, reason)


def image_shape(config: Any, batch: int) -> tuple[int, ...]:
    """[image, channel, row, column] as a model's config has them."""
    found = size(config, "image_size")
    height, width = (found, found) if isinstance(found, int) else found
    return batch, int(size(config, "num_channels") or 3), height, width


def spectrogram_shape(config: Any, batch: int) -> tuple[int, ...]:
    """[sequence, mel bin, frame]; the stem takes every other frame."""
    return batch, int(size(config, "num_mel_bins")), 2 * int(size(config, "max_source_positions"))


def special_ids(config: Any) -> set[int]:
    """Every id that the config names: padding, begin, end, decoder start."""
    texts = [config, config.get_text_config()]
    fields = {name: value for text in texts for name, value in text.to_dict().items() if name.endswith("_token_id")}
    values = [value for found in fields.values() for value in (found if isinstance(found, list) else [found])]
    return {value for value in values if isinstance(value, int)}


def _framed(config: Any, ids: torch.Tensor, generator: torch.Generator, decoder: bool, text: bool) -> torch.Tensor:
    """Ids as the model expects them: random ones that mean nothing special, an end where sequences end.

    Some models pool at the end token, or count padding ids into their positions.
    """
    vocab, special = size(config, "vocab_size"), special_ids(config)
    plain = torch.tensor([i for i in range(vocab) if i not in special])
    ids = ids.clone()
    if not text and len(plain):
        ids = plain[torch.randint(len(plain), ids.shape, generator=generator)]
    start, end = size(config, "decoder_start_token_id"), end_id(config)
    if decoder and isinstance(start, int):
        ids[:, 0] = start
    elif not decoder and end is not None:
        ids[ids == end] = plain[0] if len(plain) else ids[0, 0]
        ids[:, -1] = end
    return ids


def end_id(config: Any) -> int | None:
    """The id of the token that ends a sequence, where there is one in the vocabulary."""
    end = config.get_text_config().eos_token_id
    end = end[0] if isinstance(end, list) else end
    return end if isinstance(end, int) and 0 <= end < size(config, "vocab_size") else None


def _padded(config: Any, cls: Any, plain: Mapping[str, torch.Tensor]) -> Iterator[Batch]:
    """The plain batch cut to several lengths, with padding on the right and on the left."""
    taken = inspect.signature(cls.forward).parameters
    texts = {
        name: mask
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
        if name in plain and mask in taken
    }
    if not texts:
        return
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    vocab = size(config, "vocab_size")
    pad = pad if isinstance(pad, int) and 0 <= pad < vocab else 0
    for side in ("right", "left"):
        out = dict(plain)
        for name, mask_name in texts.items():
            ids = plain[name]
            rows, length = ids.shape
            # From the full length down to half of it.
            lengths = [max(1, length - (i * length) // (2 * max(1, rows - 1))) for i in range(rows)]
            real = torch.arange(length) < torch.tensor(lengths)[:, None]
            padded = torch.full_like(ids, pad)
            for row, n in enumerate(lengths):
                # The start and the end token stay where a sequence starts and ends.
                padded[row, :n] = torch.cat([ids[row, : n - 1], ids[row, -1:]]) if n > 1 else ids[row, -1:]
            if side == "left":
                padded, real = padded.flip(1), real.flip(1)
                for row, n in enumerate(lengths):
                    padded[row, length - n :] = padded[row, length - n :].flip(0)
            out[name], out[mask_name] = padded, real.long()
        yield Batch(f"padded on the {side}", out)
