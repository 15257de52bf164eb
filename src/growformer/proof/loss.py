"""A loss for any stock model, and inputs that reach every token, position and segment of it."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from growformer.proof.inputs import end_id, image_shape, keywords, size, spectrogram_shape
from growformer.proof.outputs import pools_unpadded, raw_outputs
from growformer.proof.probe import position_limits

__all__ = ["Loss", "covering_inputs", "covering_tokens", "experts", "losses", "next_token_loss", "output_loss"]

Loss = Callable[[torch.nn.Module], torch.Tensor]

LOGITS_AT_ONCE = 2**25
"""Logits per backward pass over token data: 256 MB in float64, and a few times that with their gradients."""

TOKENS = 4096
"""Tokens that aliveness is judged on at most (each row of an embedding stands for the others; rows unseen are not
counted, and the claim says how many were seen)."""

PLAIN_LENGTH = 128
"""Positions of a sequence where the model has no table of positions to reach."""

IMAGES = 16
"""Images; every patch and channel is in each of them."""

TOKENS_AN_EXPERT = 64
"""Tokens for each expert of a layer, so that a router is likely to choose all of them."""


def covering_tokens(vocab: int, positions: int, seed: int, least: int = 0) -> torch.Tensor:
    """Token ids that hold every id of the vocabulary at least once, in sequences that fill every position.

    Args:
        vocab: number of token ids.
        positions: length of a sequence; give the number of learned positions where the model has a table of them.
        seed: shuffles the ids.
        least: tokens in all, at least.

    Returns:
        [sequence, position] ids, ceil(vocab / positions) sequences, at least two: the last position is reached by every
        sequence, and a repeated id fills what is left over.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(2, math.ceil(max(vocab, least) / positions))
    copies = math.ceil(rows * positions / vocab)
    ids = torch.cat([torch.randperm(vocab, generator=generator) for _ in range(copies)])
    return ids[: rows * positions].view(rows, positions)


def covering_inputs(model: Any, learned: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs that reach all of a model: ids, positions, segments, patches, experts.

    Args:
        model: a stock model.
        learned: whether it has a table of positions, so that sequences must be as long as that.
        seed: of the draws.

    Returns:
        A forward pass's keywords, floating ones in float64; of tokens `TOKENS` at most, or two full sequences.
    """
    config, names = model.config, keywords(type(model))
    generator = torch.Generator().manual_seed(seed)
    vocab, out = size(config, "vocab_size"), dict[str, torch.Tensor]()
    for name in (name for name in names if name.endswith("_ids")):
        limits = [*position_limits(config.get_text_config()), *_behind_padding(model)]
        length = min(limits) if learned and limits else min([PLAIN_LENGTH, *limits])
        least = min(TOKENS, TOKENS_AN_EXPERT * sum(count for _, count in experts(model)[:1]))
        ids = covering_tokens(vocab, length, seed + len(out), least)[: max(2, TOKENS // length)]
        end = end_id(config)
        if end is not None and model.get_output_embeddings() is None:
            # Classifiers and towers may pool at the end token, and want as many of them in every sequence.
            ids = ids.masked_fill(ids == end, (end + 1) % vocab)
            ids[:, -1] = end
        out[name] = ids
    if "pixel_values" in names:
        out["pixel_values"] = torch.randn(image_shape(config, IMAGES), generator=generator, dtype=torch.float64)
    if "input_features" in names:
        rows = len(next(iter(out.values()), torch.empty(2)))
        shape = spectrogram_shape(config, rows)
        out["input_features"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    segments = size(config, "type_vocab_size") or 0
    if "token_type_ids" in inspect.signature(model.forward).parameters and segments > 1:
        out["token_type_ids"] = torch.randint(segments, out["input_ids"].shape, generator=generator)
    return out


def _behind_padding(model: torch.nn.Module) -> list[int]:
    """How many positions a table has that is counted from behind the padding token's id (RoBERTa)."""
    tables = [x for name, x in model.named_modules() if isinstance(x, torch.nn.Embedding) and "position" in name]
    return [x.num_embeddings - x.padding_idx - 1 for x in tables if x.padding_idx is not None]


def experts(model: torch.nn.Module) -> list[tuple[str, int]]:
    """The modules that hold a layer's experts, by name, with how many they hold."""
    found = []
    for name, module in model.named_modules():
        own = [x for _, x in module.named_parameters(recurse=False)]
        if type(module).__name__.endswith("Experts") and own:
            found.append((name, len(own[0])))
    return found


def next_token_loss(tokens: torch.Tensor) -> Loss:
    """Cross-entropy on next tokens, where the token after the last is the first of the sequence.

    Going round in a ring gives the last position (its row of a position table, the ids that stand there) a loss too.

    Args:
        tokens: [sequence, position] ids.
    """
    return output_loss({"input_ids": tokens})


def output_loss(inputs: Mapping[str, torch.Tensor]) -> Loss:
    """A loss that every channel of every output matters to.

    With a language model's head: cross-entropy of its logits on the next tokens, in a ring (masked models too: what
    counts is only that there is a gradient). Every other output is projected on a fixed random vector and squared; but
    for the hidden states beside a language model's logits, which are no output of the model's own.

    Args:
        inputs: a forward pass's keywords.
    """
    targets = inputs.get("decoder_input_ids", inputs.get("input_ids"))

    def loss(model: torch.nn.Module) -> torch.Tensor:
        find: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find()
        width = None if head is None or targets is None else head.weight.shape[0]
        parts = []
        for name, value in raw_outputs(model, inputs).items():
            if value.shape[-1] == width and targets is not None and value.shape[:-1] == targets.shape:
                following = targets.roll(-1, dims=1).flatten()
                parts.append(torch.nn.functional.cross_entropy(value.flatten(0, -2), following))
            elif width is None or "hidden_state" not in name:
                generator = torch.Generator().manual_seed(value.shape[-1])
                onto = torch.randn(value.shape[-1], generator=generator, dtype=value.dtype)
                parts.append((value @ onto).square().mean())
        return torch.stack(parts).sum()

    return loss


def losses(model: Any, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> list[Loss]:
    """Losses to be taken one after the other, each small enough for memory.

    Args:
        model: a stock model.
        inputs: token ids [sequence, position], or a forward pass's keywords.
    """
    given = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    ids = given.get("decoder_input_ids", given.get("input_ids"))
    if ids is None or len({len(x) for x in given.values()}) > 1:
        return [output_loss(given)]
    vocab = int(getattr(getattr(model, "config", None), "vocab_size", None) or 1)
    rows = 1 if pools_unpadded(model) else max(1, LOGITS_AT_ONCE // (ids.shape[1] * vocab))
    return [
        output_loss({name: x[start : start + rows] for name, x in given.items()}) for start in range(0, len(ids), rows)
    ]
