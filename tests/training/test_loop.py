"""The plain loop: its groups, its warm-up, its loss; and that a growth interrupts it without a trace."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import growformer as gf
from growformer.optim import rates_of
from growformer.training.loop import Recipe, Run, bits_per_byte

RECIPE = Recipe(warmup=2, batch=2, length=16)
TEXT = torch.randint(0, 37, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def started(steps: int, recipe: Recipe = RECIPE) -> Run:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    run = Run(LlamaForCausalLM(config), recipe)
    go(run, steps)
    return run


def go(run: Run, steps: int) -> list[float]:
    losses: list[float] = []
    run.train(TEXT, steps, torch.Generator().manual_seed(run.step), lambda step, loss: losses.append(loss))
    return losses


def weights(run: Run) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in run.model.parameters()])


def test_the_first_steps_are_warmed_up() -> None:
    start = weights(started(0))
    first, plain = (weights(started(1, recipe)) - start for recipe in (RECIPE, Recipe(warmup=0, batch=2, length=16)))
    assert float((first * 2 - plain).abs().max() / plain.abs().max()) < 1e-3  # float32 weights, updates of 3e-3
    run = started(2)
    assert not rates_of(run.optimizer).tables, "after the warm-up nothing is kept"


def test_a_growth_interrupts_it() -> None:
    run = started(3)
    gf.grow(run.model, run.optimizer, warmup=RECIPE.warmup, hidden_size=20, num_hidden_layers=3)
    assert len(go(run, 3)) == 3 and run.step == 6
    assert {int(x["step"]) for x in run.optimizer.state.values()} == {3, 6}


def test_gains_and_biases_are_not_decayed() -> None:
    run = started(0)
    names = {x: name for name, x in run.model.named_parameters()}
    decays = {names[x]: group["weight_decay"] for group in run.optimizer.param_groups for x in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in decays if "norm" in name}
    assert len(decays) == len(names)


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    run = started(0)
    with torch.no_grad():
        run.model.model.norm.weight.zero_()
    tokens = torch.randint(0, 37, (5, 16))
    uniform = float(torch.log2(torch.tensor(37.0)))
    assert bits_per_byte(run.model, tokens, batch=2) == pytest.approx(uniform, rel=1e-6)
