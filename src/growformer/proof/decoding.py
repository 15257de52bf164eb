"""Checks of a causal model beside its plain forward pass: cache, padding, windows, positions; in true float64.

A growth that is exact on whole sequences could still go wrong where the code takes another path. Each check runs both
models down that path and compares what they give.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from growformer.checkpoint.stock import stock_class
from growformer.errors import UncheckedError
from growformer.proof.difference import Difference, compare_outputs, worst
from growformer.proof.float64 import build64, stock_config, true_float64
from growformer.proof.outputs import Outputs, Reads, raw_outputs
from growformer.proof.probe import position_limits, probe_tokens

__all__ = ["CHECKS", "decoding_differences"]

WINDOW = 8
"""What a window longer than a check can afford is cut to in both models: the path is compared, not its length."""

LONGEST = 512
"""Positions that a check of a window runs at most."""

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Config fields that say how far back a token sees."""

Check = Callable[[Any, torch.Tensor], "Outputs | None"]


def _cached(model: Any, tokens: torch.Tensor) -> Outputs | None:
    """A prompt in one pass, then one token at a time with the key-value cache."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    prompt = max(1, tokens.shape[1] // 2)
    steps, cache = [], None
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        mask = torch.ones(len(tokens), stop, dtype=torch.long)
        given = model(input_ids=tokens[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = given.past_key_values
        if cache is None:
            return None
        steps.append(next(given[name] for name in ("logits", "last_hidden_state") if name in given))
    return {"cached": torch.cat(steps, 1)}


def _left_padded(model: Any, tokens: torch.Tensor) -> Outputs | None:
    """Sequences of several lengths, padded on the left; the real positions."""
    rows, length = tokens.shape
    real = torch.arange(length) >= torch.arange(rows)[:, None] * length // (2 * rows)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = tokens.masked_fill(~real, pad if isinstance(pad, int) and pad >= 0 else 0)
    found = raw_outputs(model, {"input_ids": ids, "attention_mask": real.long()})
    return {name: value[real] if value.dim() == 3 else value for name, value in found.items()}


def _windowed(model: Any, tokens: torch.Tensor) -> Outputs | None:
    """Sequences longer than the window that the model sees."""
    window = _window(model.config)
    return raw_outputs(model, {"input_ids": tokens}) if window and window[1] < tokens.shape[1] else None


def _placed(model: Any, tokens: torch.Tensor) -> Outputs | None:
    """Explicit positions, with an offset and a gap."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    limit = min([4 * tokens.shape[1], *position_limits(model.config.get_text_config())])
    room = limit - tokens.shape[1]
    places = torch.arange(tokens.shape[1]) + room // 2
    places[tokens.shape[1] // 2 :] += room - room // 2
    ids = places.expand_as(tokens)
    mask = torch.ones_like(tokens)  # without one, jumps in the positions may be taken for packed sequences
    return raw_outputs(model, {"input_ids": tokens, "position_ids": ids, "attention_mask": mask})


CHECKS: Mapping[str, Check] = {
    "key-value cache": _cached,
    "left padding": _left_padded,
    "sliding window": _windowed,
    "position_ids": _placed,
}
"""Each check by name: the outputs of one model down that path, or None where its class has no such path."""


def _window(config: Any) -> tuple[str, int] | None:
    """The field that says how far back a token sees, and how far; None where it sees everything."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in _WINDOWS}
    windows = [(value, name) for name, value in found.items() if isinstance(value, int) and value > 0]
    return None if not windows else (min(windows)[1], min(windows)[0])


def decoding_differences(
    src: Path, out: Path, reads: Reads | None = None, *, batch: int = 3, length: int = 32, seed: int = 0
) -> dict[str, Difference]:
    """Compare two causal language models where their code takes another path than a plain forward pass.

    What is compared is what the folders hold: a growth written in float32 shows the rounding of what it rounded, one
    written in float64 is within 1e-12.

    Args:
        src: the source's folder.
        out: the grown model's folder.
        reads: the axes that grew, from the receipt; see `growformer.proof.functional.functional`.
        batch: sequences.
        length: positions of each; where there is a window, beyond it.
        seed: of the tokens.

    Returns:
        For each of `CHECKS` that the models have, the difference before and after growth. A window longer than
        `LONGEST` is cut in both models, and the check's name then says so.

    Raises:
        UncheckedError: a model is no causal language model, one has a path that the other lacks, or anything narrower
            than float64 took part.
    """
    config = stock_config(src)
    if stock_class(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.values():
        raise UncheckedError(
            f"{src} holds a {stock_class(config).__name__}: decoding is of causal language models only."
        )
    window = _window(config)
    cut = {window[0]: WINDOW} if window and window[1] > LONGEST else {}
    beyond = (WINDOW if cut else window[1] if window else 0) + length
    plain, long = (probe_tokens(src, batch, n, seed).tokens for n in (length, beyond))
    before, after = (_run(folder, plain, long, cut) for folder in (src, out))
    if before.keys() != after.keys():
        raise UncheckedError(
            f"Of {', '.join(CHECKS)}, {src} has {', '.join(before)}, and {out} has {', '.join(after)}."
        )
    notes = {"sliding window": "".join(f" ({name} cut to {value})" for name, value in cut.items())}
    return {name + notes.get(name, ""): worst(compare_outputs(a, after[name], reads)) for name, a in before.items()}


def _run(folder: Path, plain: torch.Tensor, long: torch.Tensor, cut: Mapping[str, int]) -> dict[str, Outputs]:
    """Every check's outputs of one folder's model; it is gone when the next one is built."""
    found: dict[str, Outputs | None] = {}
    model = build64(folder)
    with true_float64(), torch.no_grad():
        for name, check in CHECKS.items():
            if name != "sliding window":
                found[name] = check(model, plain)
    if cut:
        del model
        model = build64(folder, cut)
    with true_float64(), torch.no_grad():
        found["sliding window"] = CHECKS["sliding window"](model, long)
    return {name: value for name, value in found.items() if value is not None}
