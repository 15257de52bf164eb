"""An adapter's rank grows in mid-training: the same outputs, moments kept, new entries alive."""

from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.proof.float64 import true_float64
from tests.lora.kit import IDS, adapted, loaded, logits, loss, relative, saved, train, trainable
from tests.tiny import build

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
B = A.replace("lora_A", "lora_B")


def test_same_outputs_moments_kept_and_loads_in_peft(tmp_path: Path) -> None:
    model, optimizer = adapted()
    named = dict(model.named_parameters())
    before, weights = logits(model), {n: named[n].detach().clone() for n in (A, B)}
    moments = {n: {k: optimizer.state[named[n]][k].clone() for k in ("exp_avg", "exp_avg_sq")} for n in (A, B)}
    grown, same = gf.grow(model, optimizer, r=16)
    assert grown is model and same is optimizer and dict(model.named_parameters())[A] is named[A]
    assert relative(before, logits(model)) < torch.finfo(torch.float32).eps * 16
    assert model.peft_config["default"].r == 16 and model.peft_config["default"].lora_alpha == 32
    assert named[A].shape == (16, 24) and named[B].shape == (40, 16)
    assert torch.equal(named[A][:4], weights[A]) and torch.equal(named[B][:, :4], weights[B])
    assert bool(named[A][4:].ne(0).all()) and not bool(named[B][:, 4:].any())
    for name, old in ((A, (slice(4),)), (B, (slice(None), slice(4)))):
        for key, value in moments[name].items():
            now = optimizer.state[named[name]][key]
            assert now.shape == named[name].shape and torch.equal(now[old], value)
            assert int(now.ne(0).sum()) == int(value.ne(0).sum())
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded(build("llama"), tmp_path / "adapter")), logits(model))


def test_exact_in_true_float64() -> None:
    model, _ = adapted()
    model = model.double()
    with true_float64(strict=False):
        before = logits(model)
        gf.grow(model, None, r=7)
        assert relative(before, logits(model)) <= BAR


def test_every_new_entry_is_alive_within_two_steps() -> None:
    model, optimizer = adapted()
    gf.grow(model, optimizer, r=9)
    seen: dict[str, torch.Tensor] = {}
    for _ in range(2):
        loss(model).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                seen[name] = seen.get(name, torch.zeros_like(p)) + p.grad.abs()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(total.ne(0).all()) for total in seen.values())


def test_zeros_on_both_sides_never_learn() -> None:
    model, optimizer = adapted()
    gf.grow(model, optimizer, r=9)
    named = dict(model.named_parameters())
    with torch.no_grad():
        named[A][4:] = 0
    train(model, optimizer, 3)
    assert not bool(named[A][4:].any()) and not bool(named[B][:, 4:].any())


def test_first_update_of_a_new_column_is_a_fresh_optimizers() -> None:
    model, optimizer = adapted()
    gf.grow(model, optimizer, r=9)
    train(model, optimizer, 1)
    # Adam's first step is the learning rate, whatever the gradient; under its tensor's age it would be larger.
    moved = dict(model.named_parameters())[B][:, 4:].abs()
    assert torch.allclose(moved, torch.full_like(moved, 1e-2), rtol=1e-2)


@pytest.mark.filterwarnings("ignore:.*have invalid shape.*")  # PEFT says so of every adapter with biases
@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_kinds_of_lora(config: dict[str, Any], tmp_path: Path) -> None:
    base = build("llama", attention_bias=True, mlp_bias=True)
    model, optimizer = adapted(base, **config)
    before = logits(model)
    gf.grow(model, optimizer, r=16)
    assert relative(before, logits(model)) < torch.finfo(torch.float32).eps * 16
    assert model.peft_config["default"].lora_alpha == (16 if "use_rslora" in config else 32)
    train(model, optimizer, 2)
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(build("llama", attention_bias=True, mlp_bias=True), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_patterns_are_kept_module_by_module(tmp_path: Path) -> None:
    model, optimizer = adapted(rank_pattern={"down_proj": 6}, alpha_pattern={"layers.1.mlp.down_proj": 5})
    before = logits(model)
    gf.grow(model, optimizer, r=8, rank_pattern={"layers.0.mlp.down_proj": 12})
    assert relative(before, logits(model)) < torch.finfo(torch.float32).eps * 16
    layers = model.base_model.model.model.layers
    assert [layer.mlp.down_proj.r["default"] for layer in layers] == [12, 6, 6]
    assert [layer.mlp.down_proj.lora_alpha["default"] for layer in layers] == [16, 5, 8]
    assert layers[0].self_attn.q_proj.lora_alpha["default"] == 16
    train(model, optimizer, 2)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded(build("llama"), tmp_path / "adapter")), logits(model))


def test_live_and_saved_growth_draw_the_same(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "small")
    gf.grow(model, None, r=16)
    gf.expand_checkpoint(folder, tmp_path / "large", r=16)
    again = loaded(build("llama"), tmp_path / "large")
    assert torch.equal(dict(again.named_parameters())[A], dict(model.named_parameters())[A])


def test_models_with_adapters_of_transformers_own() -> None:
    from peft import LoraConfig

    model = build("llama")
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False))
    before = logits(model)
    gf.grow(model, None, r=5)
    assert relative(before, logits(model)) < torch.finfo(torch.float32).eps * 16
    assert model.peft_config["default"].lora_alpha == 7.5


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"r": 3}, "has rank 4 already, and ranks only grow"),
        ({"r": 4}, "ask for more, such as r=8"),
        ({"r": 16, "hidden_size": 48}, "hidden_size: .* the base does not grow in memory"),
        ({"r": 16, "adapter_name": "other"}, "no adapter 'other'"),
        ({"r": 1.5}, "whole number"),
    ],
    ids=str,
)
def test_refused_by_name(request_: dict[str, Any], said: str) -> None:
    model, optimizer = adapted(steps=0)
    with pytest.raises(RequestError, match=said):
        gf.grow(model, optimizer, **request_)


@pytest.mark.parametrize(
    ("config", "said"),
    [({"init_lora_weights": "pissa"}, "changes the base's weights"), ({"use_qalora": True}, "use_qalora=True makes")],
    ids=str,
)
def test_variants_are_refused(config: dict[str, Any], said: str) -> None:
    from growformer.planning.adapters import rank_plan

    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    with pytest.raises(RequestError, match=said):
        rank_plan(whole, {"base_model.model.x.lora_A.weight": (4, 3), "base_model.model.x.lora_B.weight": (2, 4)}, 8)


def test_nothing_changes_where_it_fails() -> None:
    model, optimizer = adapted()
    loss(model, IDS).backward()
    with pytest.raises(RequestError, match="has a gradient"):
        gf.grow(model, optimizer, r=16)
    optimizer.zero_grad()
    model.merge_adapter()
    with pytest.raises(RequestError, match="unmerge_adapter"):
        gf.grow(model, optimizer, r=16)
    model.unmerge_adapter()
    assert all(p.shape[0] != 16 and p.shape[1] != 16 for p in trainable(model))
    assert model.peft_config["default"].r == 4
