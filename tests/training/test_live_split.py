"""Experts that are split in a live run: what they hold, what they remember, and that they learn and part."""

from typing import Any

import pytest
import torch

import growformer as gf
from growformer.api.planned import on_disk
from growformer.planning import apply
from growformer.proof.bar import BAR
from tests.training.live_kit import GROWTHS, Model, adamw, batch, model, relative, train

SPLIT = GROWTHS["mixtral"]["split"]
MOE = "model.layers.{}.mlp."
PARTED = 1e-2
"""How far apart 20 steps at a rate of 1e-2 take the rows of what is no copy, relative; copies stay within rounding."""


def parameters(of: Model, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router [experts, hidden], gate and up [experts, 2, width, hidden], down [experts, hidden, width]."""
    named = dict(of.named_parameters())
    names = (f"{MOE.format(layer)}{part}" for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
    return fold(*(named[name].detach() for name in names))


def fold(router: Any, both: Any, down: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return router, both.unflatten(1, (2, -1)), down


def moments(optimizer: torch.optim.Optimizer, of: Model, name: str) -> list[torch.Tensor]:
    """One moment of the parameters of layer 1."""
    named = dict(of.named_parameters())
    parts = [f"{MOE.format(1)}{part}" for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
    return [x.clone() for x in fold(*(optimizer.state[named[part]][name] for part in parts))]


def test_live_modules_hold_what_the_files_would() -> None:
    of = model("mixtral")
    source = {name: x.detach().clone() for name, x in on_disk(of).items()}
    gf.grow(of, None, **SPLIT)
    wanted = apply(of.growformer_plan, source)
    found = on_disk(of)
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    experts = of.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (6, 28, 24) and experts.down_proj.shape == (6, 24, 14)
    assert of.model.layers[0].mlp.gate.weight.shape == (6, 24) and of.model.layers[0].mlp.gate.top_k == 4


def test_moments_follow_the_dual() -> None:
    of = model("mixtral")
    optimizer = adamw(of)
    train(of, optimizer, range(3))
    old = {name: moments(optimizer, of, name) for name in ("exp_avg", "exp_avg_sq")}
    gf.grow(of, optimizer, **SPLIT)
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        (router, both, down), (was_router, was_both, was_down) = moments(optimizer, of, name), old[name]
        assert float(was_down.abs().max()) > 0
        halves = slice(0, 14), slice(14, 28)
        assert relative(torch.cat([was_router, was_router]) / 2**power, router) < BAR
        assert relative(torch.cat([was_both[:, :, half] for half in halves]), both) < BAR
        assert relative(torch.cat([was_down[:, :, half] for half in halves]) / 2**power, down) < BAR


def test_every_slice_learns_and_none_stays_a_copy() -> None:
    of = model("mixtral")
    optimizer = adamw(of)
    gf.grow(of, optimizer, **SPLIT)
    router = parameters(of, 1)[0]
    assert torch.equal(router[:3], router[3:])
    of(input_ids=batch(1, 16), labels=batch(1, 16), use_cache=False).loss.backward()
    grads = {name: x.grad for name, x in of.named_parameters() if ".mlp." in name}
    assert len(grads) == 9 and all(bool((x != 0).all()) for x in grads.values())
    optimizer.zero_grad()
    train(of, optimizer, range(20))
    for layer in range(3):
        for part in parameters(of, layer):
            assert all(relative(part[i], part[i + 3]) > PARTED for i in range(3))


@pytest.mark.parametrize("keep_dynamics", [False, True])
def test_the_rows_of_the_router_alone_are_new(keep_dynamics: bool) -> None:
    of = model("mixtral")
    optimizer = adamw(of)
    train(of, optimizer, range(2))
    gf.grow(of, optimizer, warmup=2, keep_dynamics=keep_dynamics, **SPLIT)
    new = gf.new_parameters(of)
    assert new and all(name.endswith("mlp.gate.weight") for name in new)
    assert all(not mask[:3].any() and mask[3:].all() for mask in new.values())
    assert all(torch.isfinite(torch.tensor(train(of, optimizer, range(2, 4)))))
