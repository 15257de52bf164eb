"""Ages: an entry born in mid-run is updated as a fresh Adam would update it; its neighbours keep their bits."""

from typing import Any

import pytest
import torch

from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.training.ages import BlockAges, rate

SHAPE = (5, 7)
OLD_STEPS = 40
BETAS = [(0.9, 0.999), (0.9, 0.95)]
LR = 1e-2
# So small that it changes no update: the one place where a rescaled update differs from a fresh one is eps.
EPS = 1e-300


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps)]


def new_mask() -> torch.Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[3:], mask[:, 5:] = True, True
    return mask


def optimizer(values: torch.Tensor, betas: tuple[float, float], decay: float) -> tuple[Any, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(values.clone())
    return torch.optim.AdamW([parameter], lr=LR, betas=betas, eps=EPS, weight_decay=decay), parameter


def step(adam: torch.optim.AdamW, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Takes a step and returns what it added."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    adam.step()
    return parameter.detach() - before


def grown(betas: tuple[float, float], decay: float) -> tuple[Any, torch.nn.Parameter]:
    """An optimizer after OLD_STEPS, in which the new entries have just got zero moments and random values."""
    adam, parameter = optimizer(gradients(1)[0], betas, decay)
    for gradient in gradients(OLD_STEPS):
        step(adam, parameter, gradient)
    mask = new_mask()
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[parameter][moment][mask] = 0
    return adam, parameter


def largest(difference: torch.Tensor, like: torch.Tensor) -> float:
    return float(difference.abs().max() / like.abs().max())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", BETAS)
def test_updates_are_a_fresh_adams(betas: tuple[float, float], decay: float) -> None:
    adam, parameter = grown(betas, decay)
    mask = new_mask()
    fresh, newborn = optimizer(parameter.detach(), betas, decay)
    kept, twin = optimizer(parameter.detach(), betas, decay)
    kept.state[twin] = {name: x.clone() for name, x in adam.state[parameter].items()}
    ages = BlockAges(adam, warmup=0)
    ages.set_births(parameter, mask.long() * OLD_STEPS)
    for i, gradient in enumerate(gradients(OLD_STEPS + 6)[OLD_STEPS:]):
        found, own, plain = step(adam, parameter, gradient), step(fresh, newborn, gradient), step(kept, twin, gradient)
        assert largest((found - own)[mask], own) < BAR, f"step {i} of the new entries"
        assert torch.equal(parameter[~mask], twin[~mask]), f"step {i} of the old entries"
        assert i or largest((plain - own)[mask], own) > 0.1, "without ages the first update is another"


def test_without_ages_the_first_update_is_3_16_times_too_large() -> None:
    # The figure of the design and of research: sqrt(b2's bias correction) / (b1's), an old count of steps.
    adam, parameter = optimizer(torch.zeros(SHAPE, dtype=torch.float64), (0.9, 0.999), 0.0)
    step(adam, parameter, torch.ones(SHAPE, dtype=torch.float64))
    adam.state[parameter]["step"].fill_(1e6)
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[parameter][moment].zero_()
    update = step(adam, parameter, torch.ones(SHAPE, dtype=torch.float64))
    assert float(update.abs().max()) / LR == pytest.approx(10**0.5, rel=1e-3)
    assert rate(1, 10**6, (0.9, 0.999), 0)[0] * 10**0.5 == pytest.approx(1, rel=1e-3)


def test_warmup_is_each_entrys_own() -> None:
    warmup = 4
    adam, parameter = grown((0.9, 0.999), 0.1)
    mask = new_mask()
    fresh, newborn = optimizer(parameter.detach(), (0.9, 0.999), 0.1)
    BlockAges(adam, warmup).set_births(parameter, mask.long() * OLD_STEPS)
    for age, gradient in enumerate(gradients(OLD_STEPS + 6)[OLD_STEPS:], 1):
        fresh.param_groups[0]["lr"] = LR * min(1, age / warmup)
        found, own = step(adam, parameter, gradient), step(fresh, newborn, gradient)
        assert largest((found - own)[mask], own) < BAR


def test_warmup_holds_from_the_start_too() -> None:
    values, (first, second) = gradients(1)[0], gradients(2)
    adam, parameter = optimizer(values, (0.9, 0.999), 0.1)
    BlockAges(adam, warmup=2)
    plain, twin = optimizer(values, (0.9, 0.999), 0.1)
    assert largest(step(adam, parameter, first) * 2 - step(plain, twin, first), values) < BAR
    with torch.no_grad():
        twin.copy_(parameter)
    assert torch.equal(step(adam, parameter, second), step(plain, twin, second))


def test_births_of_several_growths_are_kept() -> None:
    adam, parameter = grown((0.9, 0.999), 0.0)
    ages = BlockAges(adam, warmup=0)
    assert not ages.births(parameter).any()
    births = torch.zeros(SHAPE, dtype=torch.int64)
    births[2:], births[4:] = 11, OLD_STEPS
    ages.set_births(parameter, births)
    assert torch.equal(ages.births(parameter), births)
    before = adam.state[parameter]["exp_avg"].clone()
    found = step(adam, parameter, torch.zeros(SHAPE, dtype=torch.float64))
    kept, twin = optimizer(parameter.detach() - found, (0.9, 0.999), 0.0)
    kept.state[twin] = {name: x.clone() for name, x in adam.state[parameter].items()}
    kept.state[twin]["exp_avg"] = before
    kept.state[twin]["exp_avg_sq"] = adam.state[parameter]["exp_avg_sq"] / 0.999
    kept.state[twin]["step"] -= 1
    plain = step(kept, twin, torch.zeros(SHAPE, dtype=torch.float64))
    for rows, born in ((slice(0, 2), 0), (slice(2, 4), 11), (slice(4, 5), OLD_STEPS)):
        wanted = plain[rows] * rate(OLD_STEPS + 1 - born, OLD_STEPS + 1, (0.9, 0.999), 0)[0]
        assert largest(found[rows] - wanted, plain) < BAR


def test_parameters_without_a_gradient_are_left_alone() -> None:
    adam, parameter = grown((0.9, 0.999), 0.1)
    BlockAges(adam, warmup=5).set_births(parameter, new_mask().long() * OLD_STEPS)
    before = parameter.detach().clone()
    parameter.grad = None
    adam.step()
    assert torch.equal(parameter, before)


def test_amsgrad_is_refused() -> None:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], amsgrad=True)
    with pytest.raises(RequestError, match="amsgrad"):
        BlockAges(adam, warmup=0)
