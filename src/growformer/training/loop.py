"""A plain training loop that a growth can interrupt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from growformer.optim import rates_of
from growformer.training.text import windows

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class Recipe:
    """How the loop trains: AdamW, a short warm-up of every entry after its birth, then one learning rate throughout.

    Attributes:
        learning_rate: after warm-up.
        betas: AdamW's.
        weight_decay: of tensors with two dims; gains and biases have none.
        warmup: steps.
        batch: sequences per step.
        length: bytes per sequence.
    """

    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup: int = 30
    batch: int = 16
    length: int = 128


class Run:
    """A model in training.

    Attributes:
        model: a stock Hugging Face causal language model whose parameters go by their on-disk names.
        recipe: how it is trained.
        optimizer: AdamW over its parameters.
        step: steps taken.
    """

    def __init__(self, model: transformers.PreTrainedModel, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.step = 0
        named = dict(model.named_parameters())
        wide = [x for x in named.values() if x.dim() > 1]
        flat = [x for x in named.values() if x.dim() <= 1]
        groups = [{"params": wide, "weight_decay": recipe.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
        rates_of(self.optimizer, model).warm(named.values(), recipe.warmup)

    def train(
        self, data: torch.Tensor, steps: int, generator: torch.Generator, then: Callable[[int, float], None]
    ) -> None:
        """Take `steps` steps on random pieces of `data` (uint8 [byte]).

        Args:
            data: the training text.
            steps: how many.
            generator: draws the pieces.
            then: told, after each step, its number (counted over the whole run, from 1) and its training loss in nats.
        """
        self.model.train()
        last = len(data) - self.recipe.length
        for _ in range(steps):
            starts = torch.randint(0, last + 1, (self.recipe.batch,), generator=generator)
            tokens = windows(data, starts, self.recipe.length)
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            then(self.step, float(loss.detach()))


@torch.no_grad()
def bits_per_byte(model: transformers.PreTrainedModel, tokens: torch.Tensor, batch: int = 32) -> float:
    """The mean loss of a byte-level model, in bits per predicted byte.

    Args:
        model: left in the mode it is in (the demo's has no dropout).
        tokens: int64 [sequence, position]; every byte but each sequence's first is predicted.
        batch: sequences per forward pass.
    """
    nats = [float(model(input_ids=x, labels=x).loss) * len(x) for x in torch.split(tokens, batch)]
    return sum(nats) / len(tokens) / math.log(2)
