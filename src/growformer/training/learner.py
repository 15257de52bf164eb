"""A model and what trains it: steps, held-out loss and growth, in one process or in many."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from growformer.optim import rates_of
from growformer.training.machines import Machines
from growformer.training.recipe import Recipe

if TYPE_CHECKING:
    import transformers


class Learner:
    """A model in training.

    Args:
        recipe: its precision, clipping and compilation hold.
        machines: the processes that share the work.
        micro: sequences of one pass.
        model: a stock model, on this process's device.
        optimizers: over its parameters; each group has `initial_lr`, the peak of its learning rate.
    """

    def __init__(
        self,
        recipe: Recipe,
        machines: Machines,
        micro: int,
        model: transformers.PreTrainedModel,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.recipe, self.machines, self.micro = recipe, machines, micro
        self.model, self.optimizers = model.train(), list(optimizers)
        for optimizer in self.optimizers:
            rates_of(optimizer, model)
        self._wrapped: Any = self._wrap()

    def step(self, rows: torch.Tensor, part: float) -> float:
        """Take a step.

        Args:
            rows: int64 [sequence, token], this process's share.
            part: of the peak learning rate.

        Returns:
            The mean loss over all processes, before the step, in nats per token.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * part
        loss = self._backward(rows)
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.machines.mean(loss)

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def measure(self, tokens: torch.Tensor) -> float:
        """The loss on held-out text in nats per token, in the precision that it trains in.

        Args:
            tokens: int64 [sequence, token].
        """

        def measured() -> float:
            self.model.eval()
            nats = 0.0
            with torch.no_grad(), self._precision():
                for rows in tokens.split(self.micro):
                    here = rows.to(self.machines.device)
                    nats += float(self.model(input_ids=here, labels=here, use_cache=False).loss) * len(here)
            self.model.train()
            return nats / len(tokens)

        return self.machines.on_first(measured)

    def asked(self, batches: torch.Tensor, forward: Callable[..., Any] | None = None) -> torch.Tensor:
        """The mean loss over batches with its graph, for a growth that asks it: without dropout (see `grow`).

        Args:
            batches: int64 [batch, sequence, token]; each takes one pass.
            forward: what is called as the model would be; None: the model.
        """
        call = self.model if forward is None else forward
        with self._precision():
            here = batches.to(self.machines.device)
            losses = [call(input_ids=rows, labels=rows, use_cache=False).loss for rows in here]
        return torch.stack(losses).mean()

    def grow(self, grow: Callable[..., Any], **request: Any) -> Any:
        """Grow the model and its optimizers in place.

        Args:
            grow: `growformer.grow`, or what grows products in rank.
            request: of it.

        Returns:
            What `grow` does.

        Raises:
            ChangedError: the processes have made other weights.
        """
        # What averages gradients holds the old parameters: it goes, and is made anew for the grown model.
        self.close()
        # Dropout would be another one in each process, and what a loss is asked for must be the same in all.
        self.model.eval()
        try:
            grown = grow(self.model, self.optimizers, **request)
        finally:
            self.model.train()
        # Before the wrapper, which would give all processes the first one's weights and hide that they differ.
        self.machines.require_same(self.model, "after the growth")
        self._wrapped = self._wrap()
        return grown

    def thaw(self) -> None:
        """Let old entries that a growth held still learn again."""
        for optimizer in self.optimizers:
            rates_of(optimizer).thaw()

    def close(self) -> None:
        """Let go of what averages gradients: its end waits for connections, which must still be there then."""
        self._wrapped = None
        gc.collect()

    def _wrap(self) -> Any:
        """What takes the passes of a step; evaluation and everything else see the model itself.

        A growth forgets what was compiled (see `grow_live`), so the grown model is compiled at its first pass.
        """
        wrapped = self.machines.wrap(self.model)
        return torch.compile(wrapped) if self.recipe.compile else wrapped

    def _backward(self, rows: torch.Tensor) -> torch.Tensor:
        passes = rows.to(self.machines.device).split(self.micro)
        total = torch.zeros((), device=self.machines.device)
        for i, tokens in enumerate(passes):
            with self.machines.unsynced(self._wrapped, last=i == len(passes) - 1):
                with self._precision():
                    loss = self._wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss / len(passes)
                loss.backward()
            total += loss.detach()
        return total

    def _precision(self) -> Any:
        return torch.autocast(self.machines.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")


def bits(nats: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte."""
    return nats / math.log(2) / bytes_per_token
