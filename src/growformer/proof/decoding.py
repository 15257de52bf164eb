"""Checks of a causal model beside its plain forward pass: cache, padding, windows, positions; in true float64.

A growth that is exact on whole sequences could still go wrong where the code takes another path. Each check runs both
models down that path and compares what they give.
"""

from __future__ import annotations

import dataclasses
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

__all__ = ["CHECKS", "LONGEST", "SLIDING", "Decoded", "Decoding", "Probe", "decodes", "window_of"]

WINDOW = 8
"""What a window longer than a check can afford is cut to in both models: the path is compared, not its length."""

LONGEST = 512
"""Positions that a check of a window runs at most."""

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Config fields that say how far back a token sees."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What both models are given: token ids [sequence, position], and positions of their own for these tokens."""

    tokens: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, tokens: torch.Tensor, config: Any) -> Probe:
        """The probe of a source, with as much of an offset and of a gap as it has positions for.

        A grown model may have more of them, and is asked for the same.
        """
        length = tokens.shape[1]
        room = min([4 * length, *position_limits(config.get_text_config())]) - length
        places = torch.arange(length) + room // 2
        places[length // 2 :] += room - room // 2
        return cls(tokens, places)


Check = Callable[[Any, Probe], Outputs | None]


def _cached(model: Any, probe: Probe) -> Outputs | None:
    """A prompt in one pass, then one token at a time with the key-value cache."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    tokens = probe.tokens
    prompt = max(1, tokens.shape[1] // 2)
    steps, cache = [], None
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        mask = torch.ones(len(tokens), stop, dtype=torch.long)
        given = model(input_ids=tokens[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = given.past_key_values
        if cache is None:
            return None
        steps.append(given.logits)
    return {"cached.logits": torch.cat(steps, 1)}


def _left_padded(model: Any, probe: Probe) -> Outputs | None:
    """Sequences of several lengths, padded on the left; the real positions."""
    rows, length = probe.tokens.shape
    real = torch.arange(length) >= torch.arange(rows)[:, None] * length // (2 * rows)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = probe.tokens.masked_fill(~real, pad if isinstance(pad, int) and pad >= 0 else 0)
    found = raw_outputs(model, {"input_ids": ids, "attention_mask": real.long()})
    return {name: value[real] if value.dim() == 3 else value for name, value in found.items()}


def _windowed(model: Any, probe: Probe) -> Outputs | None:
    """Sequences longer than the window that the model sees."""
    window = window_of(model.config)
    return raw_outputs(model, {"input_ids": probe.tokens}) if window and window[1] < probe.tokens.shape[1] else None


def _placed(model: Any, probe: Probe) -> Outputs | None:
    """Explicit positions, with an offset and a gap."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    ids = probe.places.expand_as(probe.tokens)
    mask = torch.ones_like(probe.tokens)  # without one, jumps in positions may be taken for packed sequences
    return raw_outputs(model, {"input_ids": probe.tokens, "position_ids": ids, "attention_mask": mask})


SLIDING = "sliding window"
"""The name of the check that runs beyond the window."""

CHECKS: Mapping[str, Check] = {
    "key-value cache": _cached,
    "left padding": _left_padded,
    SLIDING: _windowed,
    "position_ids": _placed,
}
"""Each check by name: the outputs of one model down that path, or None where its class has no such path."""


def window_of(config: Any) -> tuple[str, int] | None:
    """The field that says how far back a token sees, and how far; None where it sees everything."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in _WINDOWS}
    windows = [(value, name) for name, value in found.items() if isinstance(value, int) and value > 0]
    return None if not windows else (min(windows)[1], min(windows)[0])


def decodes(config: Any) -> bool:
    """Whether a config's stock class is a causal language model."""
    return stock_class(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.values()


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one of `CHECKS` found.

    Attributes:
        difference: before and after growth; None where the models' class has no such path.
        note: what had to be changed in both models to run it; mostly nothing.
    """

    difference: Difference | None
    note: str = ""


class Decoding:
    """A source's outputs down every path, which grown models are compared with.

    Args:
        src: the source's folder.
        batch: sequences.
        length: positions of each; where there is a window, beyond it.
        seed: of the tokens.

    Raises:
        UncheckedError: it is no causal language model, or anything narrower than float64 took part.
    """

    def __init__(self, src: Path, *, batch: int = 3, length: int = 32, seed: int = 0) -> None:
        config = stock_config(src)
        if not decodes(config):
            raise UncheckedError(
                f"{src} holds a {stock_class(config).__name__}: decoding is of causal language models only."
            )
        window = window_of(config)
        self.src = src
        self._cut = {window[0]: WINDOW} if window and window[1] > LONGEST else {}
        beyond = (WINDOW if self._cut else window[1] if window else 0) + length
        tokens = (probe_tokens(src, batch, n, seed).tokens for n in (length, beyond))
        self._plain, self._long = (Probe.of(given, config) for given in tokens)
        self._before = self._run(src)

    def to(self, out: Path, reads: Reads | None = None) -> dict[str, Decoded]:
        """Each of `CHECKS`, before and after growth; a window longer than `LONGEST` is cut in both models.

        What is compared is what the folders hold: a growth written in float32 shows the rounding of what it rounded,
        one written in float64 is within 1e-12.

        Args:
            out: the grown model's folder.
            reads: the axes that grew, from the receipt; see `growformer.proof.functional.functional`.

        Raises:
            UncheckedError: one model has a path that the other lacks, or anything narrower than float64 took part.
        """
        after = self._run(out)
        for name, outputs in self._before.items():
            if (outputs is None) != (after[name] is None):
                has, lacks = (self.src, out) if outputs is not None else (out, self.src)
                raise UncheckedError(f"{name}: {has} has such a path, and {lacks} has none.")
        cut = ", ".join(f"{name} cut to {value}" for name, value in self._cut.items())
        return {
            name: Decoded(None)
            if before is None
            else Decoded(worst(compare_outputs(before, after[name] or {}, reads)), cut if name == SLIDING else "")
            for name, before in self._before.items()
        }

    def _run(self, folder: Path) -> dict[str, Outputs | None]:
        """Every check's outputs of one folder's model; it is gone when the next one is built."""
        model = build64(folder)
        with true_float64(), torch.no_grad():
            found = {name: check(model, self._plain) for name, check in CHECKS.items() if name != SLIDING}
        if self._cut:
            del model
            model = build64(folder, self._cut)
        with true_float64(), torch.no_grad():
            found[SLIDING] = CHECKS[SLIDING](model, self._long)
        return {name: found[name] for name in CHECKS}
