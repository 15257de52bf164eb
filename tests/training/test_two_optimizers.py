"""Several optimizers that share a model grow as one optimizer over all of it would."""

from collections.abc import Callable

import torch

import growformer as gf
from growformer.optim import rates_of
from tests.training.live_kit import model

Split = Callable[[str], int]


def grown(split: Split, forget: bool = False) -> dict[str, torch.Tensor]:
    """Weights after two steps, a growth and two steps, under one AdamW for each value of `split`."""
    of = model("llama-tied-bias").train()
    parts: dict[int, list[torch.Tensor]] = {}
    for name, parameter in of.named_parameters():
        parts.setdefault(split(name), []).append(parameter)
    optimizers = [torch.optim.AdamW(parts[key], lr=1e-2, weight_decay=0.1) for key in sorted(parts)]
    tokens = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        if step == 2:
            if forget:
                optimizers[-1].state.clear()
            request = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 5}
            gf.grow(of, optimizers, warmup=2, seed=3, **request)
        of(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    # New layers' parameters have joined the optimizer of their likes: each parameter has one.
    held = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(list(of.parameters()))
    assert forget or all(rates_of(optimizer).tables for optimizer in optimizers)
    return {name: parameter.detach().clone() for name, parameter in of.named_parameters()}


def test_two_optimizers_grow_as_one() -> None:
    one = grown(lambda name: 0)
    two = grown(lambda name: int("mlp" in name))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    # The second one's moments are carried as well: without them it is another run.
    lost = grown(lambda name: int("mlp" in name), forget=True)
    assert any(not torch.equal(one[name], lost[name]) for name in one)
