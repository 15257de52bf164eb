"""Block rates: a young block is updated as a fresh optimizer would update it; its neighbours keep their bits."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from growformer.errors import RequestError, SourceError
from growformer.optim import BlockRate, rates_of
from growformer.optim.rates import Table
from growformer.proof.bar import BAR

SHAPE = (5, 7)
OLD_STEPS = 40
BETAS = [(0.9, 0.999), (0.9, 0.95)]
LR = 1e-2


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Counts and products that optimizers keep are of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps)]


def new_mask() -> torch.Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[3:], mask[:, 5:] = True, True
    return mask


def made(make: Make, values: torch.Tensor) -> tuple[Any, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(values.clone())
    return make([parameter]), parameter


def step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Takes a step and returns what it added."""
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(parameter.grad, gradient), "gradients are put back"
    return parameter.detach() - before


def copied(make: Make, optimizer: Any, parameter: torch.nn.Parameter) -> tuple[Any, torch.nn.Parameter]:
    """The same parameter and state under an optimizer without rates."""
    other, twin = made(make, parameter.detach())
    state = optimizer.state[parameter]
    other.state[twin] = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
    return other, twin


def grown(make: Make) -> tuple[Any, torch.nn.Parameter]:
    """An optimizer after OLD_STEPS, in which the new entries have just got empty moments and random values."""
    optimizer, parameter = made(make, gradients(1)[0])
    for gradient in gradients(OLD_STEPS):
        step(optimizer, parameter, gradient)
    for value in optimizer.state[parameter].values():
        if isinstance(value, torch.Tensor) and value.dim():
            value[new_mask()] = 0
    return optimizer, parameter


def born_now(optimizer: Any, parameter: torch.nn.Parameter, **new: Any) -> None:
    blocks = (BlockRate(), BlockRate(born=rates_of(optimizer).steps(parameter), **new))
    rates_of(optimizer).tables[parameter] = Table(blocks, new_mask().to(torch.uint8))


def largest(difference: torch.Tensor, like: torch.Tensor) -> float:
    return float(difference.abs().max() / like.abs().max())


AGED: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "AdamW, b2 0.95": lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.9, 0.95)),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=LR, amsgrad=True),
    "AdamW, maximize": lambda p: torch.optim.AdamW(p, lr=LR, maximize=True),
    "AdamW, large eps": lambda p: torch.optim.AdamW(p, lr=LR, eps=0.1),
    "AdamW, lr a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR, dtype=torch.float64)),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR),
    "Adam, decay in the gradient": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.1),
    "NAdam, decoupled": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=LR, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=LR, weight_decay=0.1),
}


@pytest.mark.parametrize("name", AGED)
def test_updates_are_a_fresh_optimizers(name: str) -> None:
    make, mask = AGED[name], new_mask()
    optimizer, parameter = grown(make)
    fresh, newborn = made(make, parameter.detach())
    kept, twin = copied(make, optimizer, parameter)
    born_now(optimizer, parameter)
    for i, gradient in enumerate(gradients(OLD_STEPS + 12)[OLD_STEPS:]):
        plain, own, found = (
            step(kept, twin, gradient),
            step(fresh, newborn, gradient),
            step(optimizer, parameter, gradient),
        )
        assert largest((found - own)[mask], own) < BAR, f"step {i} of the new entries"
        assert torch.equal(parameter[~mask], twin[~mask]), f"step {i} of the old entries"
        assert i or largest((plain - own)[mask], own) > 0.05, "without rates the first update is another"


@pytest.mark.parametrize("betas", BETAS)
def test_the_first_update_is_no_larger_than_a_fresh_ones(betas: tuple[float, float]) -> None:
    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LR, betas=betas, weight_decay=0)

    sizes = {}
    for rated in (True, False):
        optimizer, parameter = made(make, torch.zeros(SHAPE, dtype=torch.float64))
        step(optimizer, parameter, gradients(1)[0])
        optimizer.state[parameter]["step"].fill_(1000)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment].zero_()
        if rated:
            born_now(optimizer, parameter)
        sizes[rated] = float(step(optimizer, parameter, gradients(2)[1])[new_mask()].abs().max()) / LR
    assert sizes[True] <= 1 + 1e-6
    # (1-b1)/sqrt(1-b2), each divided by its bias correction at step 1001.
    b1, b2 = betas
    wanted = (1 - b1) / (1 - b2) ** 0.5 * (1 - b2**1001) ** 0.5
    assert sizes[False] == pytest.approx(wanted, rel=1e-5)
    assert betas != BETAS[0] or sizes[False] > 2.5


@pytest.mark.parametrize("name", ["AdamW", "Adam, decay in the gradient"])
def test_warmup_is_each_blocks_own(name: str) -> None:
    make, mask, warmup = AGED[name], new_mask(), 4
    optimizer, parameter = grown(make)
    fresh, newborn = made(make, parameter.detach())
    born_now(optimizer, parameter, warmup=warmup)
    for age, gradient in enumerate(gradients(OLD_STEPS + 6)[OLD_STEPS:], 1):
        fresh.param_groups[0]["lr"] = LR * min(1, age / warmup)
        own, found = step(fresh, newborn, gradient), step(optimizer, parameter, gradient)
        assert largest((found - own)[mask], own) < BAR


@pytest.mark.parametrize("name", ["AdamW", "Adam, decay in the gradient", "SGD", "Muon"])
def test_closed_blocks_are_not_decayed_while_they_warm_up(name: str) -> None:
    make = {**AGED, **PLAIN}[name]
    optimizer, parameter = grown(make)
    bare, twin = copied(make, optimizer, parameter)
    bare.param_groups[0]["weight_decay"] = 0.0
    born_now(optimizer, parameter, warmup=2, closed=True)
    if rates_of(optimizer).rule.update:
        born_now(bare, twin, warmup=2)
    else:
        bare.param_groups[0]["lr"] = LR / 2
    (gradient,) = gradients(1)
    own, found = step(bare, twin, gradient), step(optimizer, parameter, gradient)
    if name == "SGD":  # its buffer is not asked to forget the decay of old entries
        own, found = own[3:, 5:], found[3:, 5:]
        assert largest(found - own, own) < BAR
    else:
        assert largest((found - own)[new_mask()], own) < BAR


PLAIN: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.1),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=LR, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=LR, weight_decay=0.1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_updates_without_bias_correction_are_scaled(name: str) -> None:
    make, mask = PLAIN[name], new_mask()
    optimizer, parameter = made(make, gradients(1)[0])
    for gradient in gradients(3):
        step(optimizer, parameter, gradient)
    kept, twin = copied(make, optimizer, parameter)
    born_now(optimizer, parameter, rate=0.25)
    (gradient,) = gradients(1)
    before = parameter.detach().clone()
    plain, found = step(kept, twin, gradient), step(optimizer, parameter, gradient)
    group = optimizer.param_groups[0]
    decayed = -LR * group["weight_decay"] * before if name in ("Adafactor", "Muon") else 0 * before
    wanted = decayed + 0.25 * (plain - decayed)
    assert largest((found - wanted)[mask], wanted) < BAR
    assert torch.equal(parameter[~mask], twin[~mask])


@pytest.mark.parametrize("name", [*AGED, *PLAIN])
def test_what_is_held_still_keeps_its_bits(name: str) -> None:
    make = {**AGED, **PLAIN}[name]
    optimizer, parameter = made(make, gradients(1)[0])
    rates_of(optimizer).tables[parameter] = Table((BlockRate(still=True), BlockRate()), new_mask().to(torch.uint8))
    before = parameter.detach().clone()
    for gradient in gradients(3):
        step(optimizer, parameter, gradient)
    assert torch.equal(parameter[~new_mask()], before[~new_mask()])
    assert (parameter != before)[new_mask()].all()
    rates_of(optimizer).thaw()
    step(optimizer, parameter, gradients(1)[0])
    assert (parameter != before).all()


def test_bfloat16_is_computed_in_float32() -> None:
    # The update itself, and not the difference of two rounded weights, is what a rate multiplies.
    make = AGED["AdamW, b2 0.95"]
    values = torch.full(SHAPE, 1.0, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(values.clone())
    optimizer: Any = make([parameter])
    optimizer.param_groups[0] |= {"lr": 2**-7, "weight_decay": 0.0}
    rates_of(optimizer).tables[parameter] = Table((BlockRate(rate=3.0),))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full(SHAPE, 1 - 3 * 2**-7, dtype=torch.bfloat16))


def test_what_differs_no_longer_is_dropped() -> None:
    make = AGED["AdamW, b2 0.95"]
    optimizer, parameter = grown(make)
    born_now(optimizer, parameter, warmup=3)
    rates = rates_of(optimizer)
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)  # forgotten within 55 steps in float64
    for gradient in gradients(60):
        step(optimizer, parameter, gradient)
    assert not rates.tables
    assert torch.equal(rates.births(parameter), torch.zeros(SHAPE, dtype=torch.int64))


def test_a_skipped_step_is_skipped() -> None:
    optimizer, parameter = grown(AGED["AdamW"])
    born_now(optimizer, parameter, warmup=5)
    before = parameter.detach().clone()
    parameter.grad = None
    optimizer.step()
    assert torch.equal(parameter, before)
    # A gradient scaler has the fused step do nothing, without saying so.
    fused, parameter = grown(AGED["AdamW, fused"])
    born_now(fused, parameter)
    before, parameter.grad = parameter.detach().clone(), torch.ones_like(parameter)
    fused.grad_scale, fused.found_inf = (torch.ones((), dtype=torch.float32) for _ in range(2))
    fused.step()
    assert torch.equal(parameter, before)


def test_decay_in_the_gradient_needs_the_gradient_before_the_step() -> None:
    optimizer, parameter = grown(AGED["Adam, decay in the gradient"])
    born_now(optimizer, parameter, decay=2.0)
    parameter.grad = gradients(1)[0]
    with pytest.raises(RequestError, match="without a closure"):
        optimizer.step(lambda: 0.0)


def test_saved_and_loaded_rates_go_on_as_they_would_have() -> None:
    make = AGED["AdamW"]
    optimizer, parameter = grown(make)
    rates_of(optimizer, None).name([("w", parameter)])
    born_now(optimizer, parameter, warmup=6)
    step(optimizer, parameter, gradients(1)[0])
    file = io.BytesIO()
    torch.save([rates_of(optimizer).state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    rates, state = torch.load(file, weights_only=True)
    other, twin = made(make, parameter.detach())
    other.load_state_dict(copy.deepcopy(state))
    rates_of(other).name([("w", twin)]).load_state_dict(rates)
    plain, third = made(make, parameter.detach())
    plain.load_state_dict(copy.deepcopy(state))
    for gradient in gradients(9):
        for a, b in ((optimizer, parameter), (other, twin), (plain, third)):
            step(a, b, gradient)
    assert torch.equal(parameter, twin)
    assert not torch.equal(parameter, third), "without them it would have gone another way"


def test_rates_that_do_not_fit_are_refused() -> None:
    optimizer, parameter = grown(AGED["AdamW"])
    born_now(optimizer, parameter)
    with pytest.raises(SourceError, match="no name"):
        rates_of(optimizer).state_dict()
    saved = rates_of(optimizer).name([("w", parameter)]).state_dict()
    other, twin = made(AGED["AdamW"], torch.zeros(2, 2))
    with pytest.raises(SourceError, match="w, and the optimizer has no parameter of that name"):
        rates_of(other).load_state_dict(saved)
    with pytest.raises(SourceError, match=r"w: .*\[5, 7\].*\[2, 2\]"):
        rates_of(other).name([("w", twin)]).load_state_dict(saved)
    with pytest.raises(SourceError, match="format 7"):
        rates_of(other).load_state_dict({"format": 7})


def test_the_same_rates_through_a_wrapper() -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    optimizer, _ = grown(AGED["AdamW"])
    assert rates_of(Wrapped(optimizer)) is rates_of(optimizer)
