"""What a growth asks the run's own text: which new units would learn most, how far new entries open at once, or what
lift the grown model learns best by.

The probes are the next batches of the text. The run trains on them afterwards like on any others, so no text is passed
over, nothing is remembered of them, and a run that resumes before the growth asks the same again. Nothing that is held
out is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from growformer.training.fade import Searched, line_search
from growformer.training.learner import Learner
from growformer.training.stages import Stage


class Probes:
    """The batches that one growth asks a loss on, and what asking has cost.

    Passes count as those of training do: a forward pass is a third of a step's FLOPs for as many tokens, one with a
    backward pass a whole step's. Each process asks GradMax's and LiGO's losses on all of the batches, for all must make
    the same new entries.

    Args:
        learner: the model, before it grows.
        stage: the one that the growth leads to.
        batches: gives so many batches, int64 [batch, sequence, token]; called once, where any are asked for.

    Attributes:
        flops: of all processes together.
        found: by the line search; None where there was none.
    """

    def __init__(self, learner: Learner, stage: Stage, batches: Callable[[int], torch.Tensor]) -> None:
        self.learner, self.stage = learner, stage
        self.batches = batches(stage.probes) if stage.probes else torch.zeros(0)
        self.flops = 0.0
        self.found: Searched | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `growformer.grow` is given for it."""
        growth = self.stage.growth
        assert growth is not None
        fade = {"fade": growth.entry.fade_steps}
        if self.stage.lifted:
            return {**fade, "closure": self._next_loss(), "steps": self.stage.probes}
        return {**fade, "closure": self._loss} if self.stage.asks else fade

    def _loss(self) -> torch.Tensor:
        self._paid(self.batches)
        return self.learner.asked(self.batches)

    def _next_loss(self) -> Callable[[Any], torch.Tensor]:
        """Each batch once, of the model that a lift makes."""
        ahead = iter(self.batches)

        def loss(forward: Any) -> torch.Tensor:
            batch = next(ahead)
            self._paid(batch)
            return self.learner.asked(batch.unsqueeze(0), forward)

        return loss

    def _paid(self, batches: torch.Tensor) -> None:
        self.flops += batches.numel() * self.stage.asks * self.learner.machines.count

    def search(self) -> None:
        """Open the new entries of a growth that was made, and proved, with all of them at zero."""
        if not self.stage.searches:
            return
        tokens = self.batches.flatten(0, 1)
        self.found = line_search(self.learner.model, lambda: self.learner.measure(tokens))
        self.flops += tokens.numel() * self.stage.searches

    def log(self) -> dict[str, Any]:
        """For the growth's line in the log; empty where nothing was asked."""
        if not self.flops:
            return {}
        said: dict[str, Any] = {"probe_tokens": self.batches.numel(), "probe_flops": self.flops}
        if self.found is not None:
            tried = [[scale, loss] for scale, loss in self.found.losses.items()]
            said["line_search"] = {"scale": self.found.scale, "losses": tried}
        return said

    def __str__(self) -> str:
        """For people: a line, or nothing."""
        if not self.flops:
            return ""
        found = "" if self.found is None else f"; {self.found}"
        return f"\n    asked the loss on the next {self.batches.numel():,} tokens ({self.flops:.2e} FLOPs){found}"
