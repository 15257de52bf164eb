"""A plain training loop that a growth can interrupt: model, optimizer, moments and ages go on as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from growformer.errors import SourceError
from growformer.optim.dual import grow_moments
from growformer.planning import Plan
from growformer.training.ages import BlockAges
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
        ages: the rates of entries born in mid-run.
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
        self.ages = BlockAges(self.optimizer, recipe.warmup)

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

    def grown(self, plan: Plan, model: transformers.PreTrainedModel) -> Run:
        """The run that goes on with a grown model; this one is left as it is.

        AdamW's moments follow the dual of the weights (`grow_moments`); a grown tensor keeps its count of steps, and
        its new entries an age of their own (`BlockAges`); a tensor that is new as a whole starts at step 0.

        Args:
            plan: the growth.
            model: what it made of this run's model.

        Raises:
            SourceError: a parameter of the grown model is no tensor of the plan.
        """
        run = Run(model, self.recipe)
        run.step = self.step
        old = dict(self.model.named_parameters())
        state = {name: self.optimizer.state[x] for name, x in old.items() if x in self.optimizer.state}
        first = grow_moments(plan, {name: kept["exp_avg"] for name, kept in state.items()}, 1)
        second = grow_moments(plan, {name: kept["exp_avg_sq"] for name, kept in state.items()}, 2)
        # Counted from now, so that the zeros of new entries mean "born at this step".
        since = {name: self.ages.births(old[name]) - int(kept["step"]) for name, kept in state.items()}
        births = grow_moments(plan, since, 0)
        for name, parameter in model.named_parameters():
            tensor = plan.by_name.get(name)
            if tensor is None:
                raise SourceError(f"{name} is a parameter of the grown model, but no tensor of the plan")
            if tensor.source not in state:
                continue
            steps = state[tensor.source]["step"].clone()
            run.optimizer.state[parameter] = {"step": steps, "exp_avg": first[name], "exp_avg_sq": second[name]}
            run.ages.set_births(parameter, births[name] + int(steps))
        return run


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
