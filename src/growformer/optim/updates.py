"""The updates of optimizers with bias correction, for entries that are younger than their tensor.

Adam divides its moments by 1-b1^t and 1-b2^t, t the steps of the tensor. An entry that began with zero moments at age j
of it needs 1-b1^j and 1-b2^j: uncorrected, the first update of a new block in an old tensor is 3.16 times too large at
betas (0.9, 0.999). (Kingma & Ba, arXiv 1412.6980, Algorithms 1 and 2; Dozat's NAdam and Liu et al., arXiv 1908.03265,
Algorithm 2, as torch.optim has them.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Read = Callable[[str], torch.Tensor]
"""Gives what the formula needs of the chosen entries: a key of the state, or 'gradient' (with decay coupled in)."""

Update = Callable[[Read, Mapping[str, Any], int, float], torch.Tensor]
"""(read, group, age, multiplier of eps) -> what the learning rate multiplies and the weight loses."""


def adam(read: Read, group: Mapping[str, Any], age: int, eps: float) -> torch.Tensor:
    """m / (1-b1^j) / (sqrt(v / (1-b2^j)) + eps)."""
    b1, b2 = map(float, group["betas"])
    square = read("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    root = square.sqrt().div_((1 - b2**age) ** 0.5).add_(float(group["eps"]) * eps)
    return read("exp_avg").div(1 - b1**age).div_(root)


def nadam(read: Read, group: Mapping[str, Any], age: int, eps: float) -> torch.Tensor:
    """Adam with Nesterov's momentum, whose b1 follows a schedule of its own."""
    b1, b2 = map(float, group["betas"])

    def mu(step: int) -> float:
        return float(b1 * (1 - 0.5 * 0.96 ** (step * float(group["momentum_decay"]))))

    product = 1.0
    for step in range(1, age + 1):
        product *= mu(step)
        if product < 1e-30:  # nothing beside 1
            break
    after = mu(age + 1)
    root = read("exp_avg_sq").sqrt().div_((1 - b2**age) ** 0.5).add_(float(group["eps"]) * eps)
    ahead = read("gradient") * ((1 - mu(age)) / (1 - product)) + read("exp_avg") * (after / (1 - product * after))
    return ahead.div_(root)


def radam(read: Read, group: Mapping[str, Any], age: int, eps: float) -> torch.Tensor:
    """Adam that waits with its second moment until there are enough steps to tell its variance."""
    b1, b2 = map(float, group["betas"])
    mean = read("exp_avg").div(1 - b1**age)
    last = 2 / (1 - b2) - 1
    rho = last - 2 * age * b2**age / (1 - b2**age)
    if rho <= 5:
        return mean
    rectified = ((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)) ** 0.5
    root = read("exp_avg_sq").sqrt().add_(float(group["eps"]) * eps)
    return mean.mul_(rectified * (1 - b2**age) ** 0.5).div_(root)


def adamax(read: Read, group: Mapping[str, Any], age: int, eps: float) -> torch.Tensor:
    """m / (1-b1^j) / u, u the running maximum (which holds eps already)."""
    b1, _ = map(float, group["betas"])
    return read("exp_avg").div(1 - b1**age).div_(read("exp_inf"))


UPDATES: dict[str, Update] = {"adam": adam, "nadam": nadam, "radam": radam, "adamax": adamax}


def settled(update: str, group: Mapping[str, Any], age: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether an entry's own bias corrections are those of its tensor, to the last bit of `dtype`, from now on."""
    if age == steps or not update:
        return True
    betas = [float(beta) for beta in group["betas"]]
    if update == "nadam":
        betas.append(0.96 ** float(group["momentum_decay"]))
    return all(beta**age < torch.finfo(dtype).eps / 4 for beta in betas)
