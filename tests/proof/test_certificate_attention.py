"""The certificate's rules of attention: each broken alone, and the certificate names where."""

from __future__ import annotations

import pytest
import torch
from breaks import ATTN, ROOT2, Case, check, config, fact, norm, put, times, told

from growformer.algebra import Frozen, Norm
from growformer.proof.attending import slopes

GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}

WRONG: dict[str, Case] = {
    "keys of one part unscaled": (
        "deepseek_v3",
        {},
        {"qk_nope_head_dim": 12},
        times(ATTN + "kv_a_proj_with_mqa.weight", (14 / 18) ** 0.5),
        (ATTN + "kv_a_proj_with_mqa.weight[",),
    ),
    "the scale of a rank left out": (
        "deepseek_v3",
        {},
        {"kv_lora_rank": 24},
        told("kv_rank", scale="1"),
        ("axis kv_rank", "eps 1e-06 in the code"),
    ),
    "one query row of a new head under a norm across heads": (
        "olmo2",
        {},
        {"num_attention_heads": 8},
        put(ATTN + "q_proj.weight", (75, 2), 1e-3),
        (ATTN + "q_proj.weight[75, 2]", "zero"),
    ),
    "queries not rescaled under a norm across heads": (
        "olmo2",
        {},
        {"num_attention_heads": 8},
        times(ATTN + "q_proj.weight", ROOT2),
        (ATTN + "q_proj.weight[0, 0]",),
    ),
    "its gain not either": (
        "olmo2",
        {},
        {"num_attention_heads": 8},
        times(ATTN + "q_norm.weight", ROOT2),
        (ATTN + "q_norm.weight[0]",),
    ),
    "a norm across axes of something else": (
        "olmo2",
        {},
        {"num_attention_heads": 8},
        lambda g: fact(norms={**g.family.norms, "v": Norm(("heads", "key"), "rms", eps="rms_norm_eps")})(g),
        ("axis key", "norm v", "not covered"),
    ),
    "norms of queries and keys without gains": (
        "gemma3_text",
        {},
        {"head_dim": 20},
        norm("q", gain=None),
        ("axis key", "no gain", "not covered"),
    ),
    "1 + gain of copied keys left open": (
        "gemma3_text",
        {},
        {"head_dim": 20},
        put(ATTN + "k_norm.weight", (7,), 0.0),
        (ATTN + "k_norm.weight[7]", "-1"),
    ),
    "the gain of one head": (
        "cohere",
        {"use_qk_norm": True},
        {"head_dim": 20},
        put(ATTN + "k_norm.weight", (1, 0), 9.0),
        (ATTN + "k_norm.weight[1, 0]",),
    ),
    "the gain of one head, of its own name": (
        "stablelm",
        {"qk_layernorm": True},
        {"num_attention_heads": 8},
        put(ATTN + "q_layernorm.norms.4.weight", (0,), 9.0),
        (ATTN + "q_layernorm.norms.4.weight[0]",),
    ),
    "a missing norm of a new head": (
        "stablelm",
        {"qk_layernorm": True},
        {"num_attention_heads": 8},
        lambda g: g.target.pop(ATTN + "q_layernorm.norms.7.weight"),
        (ATTN + "q_layernorm.norms.7.weight", "missing"),
    ),
    "the shift of keys without the score's factor": (
        "phi",
        {"qk_layernorm": True},
        {"hidden_size": 64},
        times(ATTN + "k_layernorm.bias", ROOT2),
        (ATTN + "k_layernorm.bias[0]",),
    ),
    "the shift of copied keys left open": (
        "phi",
        {"qk_layernorm": True},
        {"hidden_size": 64},
        put(ATTN + "k_layernorm.bias", (12,), 1e-3),
        (ATTN + "k_layernorm.bias[12]", "zero"),
    ),
    # Positions.
    "interleaved pairs as halves": (
        "cohere",
        {},
        {"head_dim": 14},
        told("key", lift=[[5, 0], [2, None], [5, 5], [2, None]]),
        ("axis key", "rotary pair 2 = channels (4, 5)", "(2i', 2i' + 1)"),
    ),
    "the fraction that turns unchanged": (
        "gpt_neox",
        {},
        {"hidden_size": 64},
        config("rope_parameters.partial_rotary_factor", 0.5),
        ("partial_rotary_factor", "channels turn"),
    ),
    "the older fraction unchanged": (
        "gpt_neox",
        {},
        {"hidden_size": 64},
        config("rotary_pct", 0.5),
        ("partial_rotary_factor", "channels turn"),
    ),
    "new channels among those that turn": (
        "gpt_neox",
        {},
        {"hidden_size": 64},
        told("key", lift=[[2, 0], [8, None], [6, 2]]),
        ("axis key", "channel 2 sits at 10", "required 2"),
    ),
    "another number of channels that turn": (
        "gptj",
        {},
        {"n_embd": 48},
        config("rotary_dim", 8),
        ("rotary_dim", "found 8", "required 6"),
    ),
    "theta of one layer type unchanged": (
        "gemma3_text",
        {},
        {"head_dim": 20},
        config("rope_parameters.sliding_attention.rope_theta", 10000.0),
        ("rope_theta", "sliding_attention"),
    ),
    "rope parameters of one layer type lost": (
        "gemma3_text",
        {},
        {"head_dim": 20},
        lambda g: g.target_config["rope_parameters"].pop("sliding_attention"),
        ("rope_parameters", "sliding_attention"),
    ),
    "a fraction where all channels turn": (
        "cohere",
        {},
        {"head_dim": 14},
        config("rope_parameters.partial_rotary_factor", 0.5),
        ("rope_parameters",),
    ),
    "heads appended under linear biases": (
        "bloom",
        {},
        {"n_head": 8},
        told("heads", lift=[[4, 0], [4, None]]),
        ("axis heads", "old head 0", "slope"),
    ),
    # Heads.
    "heads that are no product of groups": (
        "falcon",
        GROUPED,
        {"num_attention_heads": 8},
        told("group", lift=[[1, None], [2, 0], [1, None]]),
        ("axis heads", "by kv_heads and group"),
    ),
    "copied groups": (
        "falcon",
        GROUPED,
        {"num_attention_heads": 8},
        told("kv_heads", new=4, lift=[[1, 0], [1, 0, "1", None], [1, 1], [1, 1, "1", None]]),
        ("axis kv_heads", "copies are not covered"),
    ),
    "new heads open to the one shared value": (
        "falcon",
        {},
        {"num_attention_heads": 8},
        told("heads", closed="writers"),
        ("axis heads", "closed at readers"),
    ),
    "an axis that may not grow": (
        "bloom",
        {},
        {"n_head": 8},
        fact(frozen=(Frozen(("heads",), "a test says so", {"n_head": 5}),)),
        ("axis heads", "may not grow", "a test says so"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_broken_rules_are_found(case: str) -> None:
    check(WRONG[case])


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_slopes_are_those_of_the_stock_tables(kind: str) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in (1, 2, 3, 4, 6, 12, 16, 40):
        if kind == "bloom":
            stock = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
        else:
            stock = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
        mine = torch.tensor([2.0 ** -float(e) for e in slopes(heads)], dtype=torch.float64)
        assert torch.allclose(stock.double(), mine, rtol=1e-5, atol=0), heads
