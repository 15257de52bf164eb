"""Block rates: every entry of a grown tensor learns at the rate of its own age, not of its tensor's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from growformer.errors import RequestError


def rate(age: int, steps: int, betas: tuple[float, float], warmup: int) -> tuple[float, float]:
    """What turns AdamW's update of an entry into the one that its own age calls for.

    Adam divides its moments by 1-b1^t and 1-b2^t, t the steps of the tensor. An entry that began with zero moments at
    age j of it needs 1-b1^j and 1-b2^j; uncorrected, the first update of a new block in an old tensor is 3.16 times too
    large at betas (0.9, 0.999). (Adam's bias correction: Kingma & Ba, arXiv 1412.6980, Algorithm 1; per-block ages:
    design, section 9.)

    Args:
        age: steps the entry has taken, the present one included (j >= 1).
        steps: steps the tensor has taken, the present one included (t >= j).
        betas: Adam's (b1, b2).
        warmup: steps over which an entry's learning rate rises linearly from 0; 0: none.

    Returns:
        (rate, warm-up): the factors of Adam's update and of the decay of weights.
    """
    b1, b2 = betas
    warm = min(1.0, age / warmup) if warmup else 1.0
    if age == steps:
        return warm, warm
    correction = (1 - b1**steps) / (1 - b1**age) * ((1 - b2**age) / (1 - b2**steps)) ** 0.5
    return warm * correction, warm


class BlockAges:
    """Gives every entry of every parameter its own age, in the hooks of an AdamW optimizer's step.

    Scaling gradients would do nothing, for Adam divides the scale out again; so the step is taken, and the updates of
    entries whose rate is not 1 are rescaled afterwards. Entries of rate 1 keep the bits that the optimizer gave them.
    The learning rate's warm-up is the same mechanism: entries that are there from the start warm up at the start.

    Args:
        optimizer: its groups' lr, betas and weight_decay are read at each step.
        warmup: steps of each entry's own warm-up.

    Raises:
        RequestError: the optimizer uses amsgrad, whose running maximum knows no ages.
    """

    def __init__(self, optimizer: torch.optim.AdamW, warmup: int) -> None:
        if any(group["amsgrad"] for group in optimizer.param_groups):
            raise RequestError("AdamW(amsgrad=True) keeps a running maximum, which has no age; use amsgrad=False")
        self.warmup = warmup
        self._born: dict[torch.nn.Parameter, tuple[tuple[int, ...], torch.Tensor]] = {}
        self._pending: list[Callable[[], None]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def births(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """When each entry began: the steps its tensor had taken then, int64, of the parameter's shape."""
        if parameter not in self._born:
            return torch.zeros(parameter.shape, dtype=torch.int64, device=parameter.device)
        values, index = self._born[parameter]
        return torch.tensor(values, device=index.device)[index]

    def set_births(self, parameter: torch.nn.Parameter, births: torch.Tensor) -> None:
        """Say when each entry began; see `births`."""
        values, index = torch.unique(births, return_inverse=True)
        self._born[parameter] = tuple(int(v) for v in values), index

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._pending = []
        for group in optimizer.param_groups:
            decay = float(group["lr"]) * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                steps = int(optimizer.state.get(parameter, {}).get("step", 0)) + 1
                values, index = self._born.get(parameter, ((0,), None))
                rates = [rate(steps - born, steps, group["betas"], self.warmup) for born in values]
                table = torch.tensor(rates, dtype=parameter.dtype, device=parameter.device)
                if bool((table == 1).all()):
                    continue
                scale, warm = table[index].unbind(-1) if index is not None else table[0].unbind(-1)
                self._pending.append(_rescale(parameter, parameter.detach().clone(), scale, warm, decay))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for rescale in self._pending:
            rescale()
        self._pending = []


def _rescale(
    parameter: torch.nn.Parameter, before: torch.Tensor, scale: torch.Tensor, warm: torch.Tensor, decay: float
) -> Callable[[], None]:
    """To be called after the step: AdamW's after = before (1 - decay) + update, with both parts at their own rates."""

    def run() -> None:
        with torch.no_grad():
            update = parameter - before * (1 - decay)
            own = before * (1 - decay * warm) + update * scale
            parameter.copy_(torch.where((scale == 1) & (warm == 1), parameter, own))

    return run
