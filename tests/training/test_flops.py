"""FLOPs of training: counted by torch, held against what is known of a Llama."""

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

import growformer as gf
from growformer.api.planned import on_disk
from growformer.checkpoint.layout import layout_of
from growformer.training.flops import lift_flops, size_of_model
from growformer.training.ligo import Lifts
from tests.training.live_kit import model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_llama(length: int, tied: bool) -> None:
    found = size_of_model({**LLAMA, "tie_word_embeddings": tied}, length)
    # Gains are no products, and an embedding that is not tied is only looked up.
    products = found.parameters - 7 * 64 - (0 if tied else 256 * 64)
    attention = 12 * 3 * 64 * length
    assert found.flops_per_token == 6 * products + attention
    # 6ND alone leaves attention out: at most a sixth too little while sequences are short.
    if length == 32:
        assert 1 < found.flops_per_token / (6 * products) < 1 + 1 / 6


def test_a_mixture_of_experts_is_counted() -> None:
    dense = {k: v for k, v in LLAMA.items() if k != "head_dim"}
    one = size_of_model({**dense, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}, 32)
    two = size_of_model({**dense, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, 32)
    assert one.parameters == two.parameters
    expert = 3 * 3 * 64 * 160
    assert two.flops_per_token - one.flops_per_token == 6 * expert


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("llama-tied-bias", {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4}),
        ("gpt2", {"n_embd": 48, "n_head": 8, "n_inner": 120}),
    ],
)
def test_flops_of_a_lift_are_those_of_its_products(kind: str, request_: dict[str, int]) -> None:
    """Going back takes less than twice: nothing is asked of the old model's tensors."""
    of = model(kind)
    plan = gf.plan(of, method="ligo", **request_)
    big = gf.expand(of, method="ligo", closure=lambda forward: None, steps=0, allow_change=True, **request_)
    lifts = Lifts(plan, layout_of(big), {name: x.detach() for name, x in on_disk(of).items()})
    with FlopCounterMode(display=False) as forward:
        made = lifts.parameters()
    assert lift_flops(plan) == 3 * forward.get_total_flops()
    with FlopCounterMode(display=False) as back:
        sum(x.sum() for x in made.values()).backward()
    assert 0.5 < back.get_total_flops() / (2 * forward.get_total_flops()) <= 1
