"""With new blocks held still, a grown run is the small run, in true float64: moments and rates are the right ones."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

import growformer as gf
from growformer.api.planned import on_disk
from growformer.errors import RequestError
from growformer.optim import rates_of
from growformer.planning.apply import pull_back
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64_from, true_float64
from tests.training.live_kit import GROWTHS, Model, Optimizer, adamw, model, relative, train, wide

STEPS = 20
ROUNDING = 100 * BAR
"""A hundred times what one forward pass may differ by, for 20 steps of training multiply it."""

SEEN = 1e-6

slow = pytest.mark.slow

LLAMA = "llama-tied-bias"
PLAIN = [(LLAMA, "layers"), *(pytest.param(LLAMA, axis, marks=slow) for axis in ("mlp", "heads"))]
PLAIN += [pytest.param(kind, axis, marks=slow) for kind in ("qwen3", "gpt2", "mixtral") for axis in ("mlp", "layers")]
SCALED = [(LLAMA, "all"), pytest.param(LLAMA, "head_dim", marks=slow), pytest.param(LLAMA, "hidden", marks=slow)]
SCALED += [pytest.param("qwen3", "hidden", marks=slow)]

Make = Callable[[Model], Optimizer]


def hold_new(optimizer: Optimizer) -> None:
    """New blocks, which alone warm up, do not move."""
    for table in rates_of(optimizer).tables.values():
        table.blocks = tuple(replace(block, still=block.warmup > 0) for block in table.blocks)


def sgd(of: Model) -> Optimizer:
    return torch.optim.SGD(of.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


def adam(of: Model) -> Optimizer:
    return torch.optim.Adam(of.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3)


@cache
def small(kind: str, make: Make) -> tuple[Model, Optimizer, torch.Tensor, dict[str, torch.Tensor]]:
    """The small run: model and optimizer where the other is to grow, and its losses and weights in the end."""
    of = model(kind)
    config = of.config.to_dict() | {"architectures": [type(of).__name__]}
    of = build64_from(config, {name: x.detach() for name, x in on_disk(of).items()}).train()
    optimizer = make(of)
    with true_float64():
        train(of, optimizer, range(2))
    start, state = copy.deepcopy(of), copy.deepcopy(optimizer.state_dict())
    with true_float64():
        losses = train(of, optimizer, range(2, 2 + STEPS))
    again = make(start)
    again.load_state_dict(state)
    return (
        start,
        again,
        torch.tensor(losses, dtype=torch.float64),
        {name: x.detach() for name, x in on_disk(of).items()},
    )


def drift(kind: str, axis: str, keep_dynamics: bool, make: Make = adamw) -> float:
    """How far the grown run's losses and pulled-back weights are from the small run's, relative, after 20 steps."""
    start, begun, losses, weights = small(kind, make)
    grown = copy.deepcopy(start)
    optimizer = make(grown)
    optimizer.load_state_dict(copy.deepcopy(begun.state_dict()))
    with wide():
        gf.grow(grown, optimizer, warmup=1, keep_dynamics=keep_dynamics, **GROWTHS[kind][axis])
    hold_new(optimizer)
    with true_float64():
        found = torch.tensor(train(grown, optimizer, range(2, 2 + STEPS)), dtype=torch.float64)
    back = pull_back(grown.growformer_plan, {name: x.detach() for name, x in on_disk(grown).items()})
    return max(relative(losses, found), *(relative(x, back[name]) for name, x in weights.items() if name in back))


@pytest.mark.parametrize(("kind", "axis"), PLAIN)
def test_growth_without_factors_leaves_the_run_as_it_was(kind: str, axis: str) -> None:
    assert drift(kind, axis, keep_dynamics=False) < ROUNDING


@pytest.mark.parametrize(("kind", "axis"), SCALED)
def test_kept_dynamics_leave_the_run_as_it_was(kind: str, axis: str) -> None:
    assert drift(kind, axis, keep_dynamics=True) < ROUNDING


@pytest.mark.parametrize(("kind", "axis"), SCALED[:2])
def test_without_them_the_run_drifts(kind: str, axis: str) -> None:
    found = drift(kind, axis, keep_dynamics=False)
    print(f"{kind} {axis}: {found:.1e} after {STEPS} steps")
    assert found > SEEN


@slow
@pytest.mark.parametrize("make", [adam, sgd])
def test_dynamics_are_kept_with_decay_in_the_gradient(make: Make) -> None:
    assert drift("llama-tied-bias", "head_dim", keep_dynamics=True, make=make) < ROUNDING


def test_what_cannot_keep_its_dynamics_is_refused() -> None:
    of = model("llama-tied-bias")
    with pytest.raises(RequestError, match=r"keep_dynamics: .* it is kept for AdamW, Adam and SGD"):
        gf.grow(of, torch.optim.RMSprop(of.parameters()), keep_dynamics=True, hidden_size=36)
    gf.grow(of, torch.optim.RMSprop(of.parameters()), keep_dynamics=True, intermediate_size=40)
    moe = model("mixtral")
    with pytest.raises(RequestError, match=r"keep_dynamics: .*experts.* shared out among copies"):
        gf.grow(moe, adamw(moe), keep_dynamics=True, num_local_experts=6)


def test_old_entries_can_be_held_still() -> None:
    of = model("llama-tied-bias")
    optimizer = adamw(of)
    train(of, optimizer, range(2))
    gf.grow(of, optimizer, freeze_old=True, **GROWTHS["llama-tied-bias"]["all"])
    new = gf.new_parameters(of)
    before = {name: x.detach().clone() for name, x in of.named_parameters()}
    losses = train(of, optimizer, range(2, 8))
    assert losses == losses and len(set(losses)) == len(losses)
    moved = 0
    for name, x in of.named_parameters():
        mask = new.get(name, torch.zeros(x.shape, dtype=torch.bool))
        assert torch.equal(x[~mask], before[name][~mask])
        moved += int((x != before[name])[mask].sum())
    assert moved > 0.99 * sum(int(mask.sum()) for mask in new.values())
    rates_of(optimizer).thaw()
    train(of, optimizer, range(8, 9))
    assert all((x != before[name]).all() for name, x in of.named_parameters() if x.dim() > 1 and "embed" not in name)
