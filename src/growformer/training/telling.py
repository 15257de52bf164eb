"""What a growth under the Hugging Face Trainer tells: how far logits have moved, and numbers for every integration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState


def probe(model: Any) -> torch.Tensor | None:
    """A few random tokens, int64 [sequence, position]; None for a model that needs more, or that has no logits."""
    text = model.config.get_text_config()
    vocab = getattr(text, "vocab_size", None)
    if model.main_input_name != "input_ids" or not isinstance(vocab, int):
        return None
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    tokens = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    try:
        logits(model, tokens)
    except (AttributeError, TypeError, ValueError):  # as forward passes say that something is missing
        return None
    return tokens


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A model's logits in evaluation mode, computed in the precision that it is trained in, as float64.

    Args:
        model: a stock model.
        tokens: int64 [sequence, position], of a decoder too where there is one.
    """
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found: torch.Tensor = model(input_ids=tokens, **more).logits.double()
        return found
    finally:
        for module, training in modes.items():
            module.training = training


def log(told: dict[str, float], args: Any, state: TrainerState, control: TrainerControl) -> None:
    """What `Trainer.log` does, which no callback can call: callbacks are not told which Trainer it is."""
    logs = dict(told) if state.epoch is None else {**told, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    handler = _handler()
    if handler is not None:
        wanted = control.should_log  # the step's own line is still to come
        handler.on_log(args, state, control, logs)
        control.should_log = wanted


def _handler() -> CallbackHandler | None:
    """Who called this callback, and calls the others too; None where somebody called it by hand."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), CallbackHandler):
            return frame.f_locals["self"]  # type: ignore[no-any-return]
        frame = frame.f_back
    return None
