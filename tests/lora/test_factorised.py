"""Factorised training: products of small rank that grow and become dense; the loss goes on at each growth."""

from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.proof.float64 import true_float64
from growformer.training.factorised import Factorised, factorise, grow_rank
from tests.lora.kit import IDS, logits, loss, relative, train
from tests.tiny import build

EPS = torch.finfo(torch.float32).eps


def begun(kind: str = "llama", rank: int = 2, steps: int = 3) -> tuple[Any, torch.optim.Optimizer]:
    model = build(kind)
    factorise(model, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-tied-bias"])
def test_a_run_from_products_to_a_stock_model(kind: str, tmp_path: Any) -> None:
    stock = {name: type(module) for name, module in build(kind).named_modules()}
    shapes = {name: x.shape for name, x in build(kind).state_dict().items()}
    model, optimizer = begun(kind)
    small = sum(p.numel() for p in model.parameters())
    ended: list[str] = []
    for rank in (4, 9, None):
        before = logits(model)
        grew, merged = grow_rank(model, optimizer, rank)
        assert relative(before, logits(model)) < 64 * EPS
        assert sum(p.numel() for p in model.parameters()) > small
        small = sum(p.numel() for p in model.parameters())
        ended += merged
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(set(map(id, held)))
        assert set(optimizer.state) <= set(held)
        assert all(isinstance(model.get_submodule(name), Factorised) for name in grew)
        train(model, optimizer, 2)
    assert {name: type(module) for name, module in model.named_modules()} == stock
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes and len(ended) == len(set(ended)) > 0
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "model")), logits(model))
    gf.grow(model, optimizer, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 4})  # it is a stock model again
    train(model, optimizer, 1)


def test_exact_in_true_float64() -> None:
    model, _ = begun()
    model = model.double()
    with true_float64(strict=False):
        before = logits(model)
        grow_rank(model, None, 5)
        assert relative(before, logits(model)) <= BAR
        grow_rank(model, None, None)
        assert relative(before, logits(model)) <= BAR
        with torch.no_grad():  # the control: what a factor left out would do
            model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
        assert relative(before, logits(model)) > 1e-4


def test_moments_stay_and_new_entries_are_alive() -> None:
    model, optimizer = begun()
    layer = model.model.layers[1].mlp.up_proj
    kept = {key: optimizer.state[layer.v][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    grow_rank(model, optimizer, 6)
    assert layer.rank == 6 and not bool(layer.u[:, 2:].any()) and bool(layer.v[2:].ne(0).all())
    for key, value in kept.items():
        assert torch.equal(optimizer.state[layer.v][key][:2], value)
        assert not bool(optimizer.state[layer.v][key][2:].any())
    seen = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.endswith((".u", ".v"))}
    for _ in range(2):
        loss(model, IDS).backward()
        for name, p in model.named_parameters():
            if name in seen:
                seen[name] += p.grad.abs()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(total.ne(0).all()) for total in seen.values())


def test_a_product_becomes_dense_at_its_full_rank_equivalent() -> None:
    model, optimizer = begun()
    # q_proj is 40 x 24: 15 (40 + 24) = 960 = 40 24. k_proj, of 20 x 24, is there at 11; gate_proj, of 28 x 24, at 13.
    grew, merged = grow_rank(model, optimizer, 12)
    assert {name.rpartition(".")[2] for name in merged} == {"k_proj", "v_proj"}
    assert {name.rpartition(".")[2] for name in grew} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    grew, merged = grow_rank(model, optimizer, 14)
    assert {name.rpartition(".")[2] for name in grew} == {"q_proj", "o_proj"}
    assert grow_rank(model, optimizer, 15)[0] == []


def test_refused_by_name() -> None:
    model, optimizer = begun(rank=4)
    with pytest.raises(RequestError, match=r"rank=4: .* has rank 4 already"):
        grow_rank(model, optimizer, 4)
    with pytest.raises(RequestError, match="Factorised"):
        gf.grow(model, optimizer, hidden_size=48)
    loss(model).backward()
    with pytest.raises(RequestError, match="has a gradient"):
        grow_rank(model, optimizer, None)
    with pytest.raises(RequestError, match="no factorised weight"):
        grow_rank(build("llama"), None, 4)
    with pytest.raises(RequestError, match="no weight between layers is so large"):
        factorise(build("llama"), 64)
    dead = build("llama")
    torch.nn.init.zeros_(dead.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(RequestError, match="up_proj is zero"):
        factorise(dead, 4)
