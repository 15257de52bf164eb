"""The certificate's rules for what a request may choose: each broken alone, and the certificate names where."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from breaks import ATTN, config, fact, put, swap, told
from certified import Growth, failing
from stock import grow_stock

from growformer.algebra import replace
from growformer.planning.choices import Choices

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MADE: dict[str, tuple[str, dict[str, Any], dict[str, int], dict[str, str]]] = {
    "strided": ("llama", {}, {"head_dim": 20}, {"rope": "strided"}),
    "strided pairs": ("cohere", {}, {"head_dim": 30}, {"rope": "strided"}),
    "strided yarn": ("llama", {"rope_parameters": {**YARN, "truncate": False}}, {"head_dim": 20}, {"rope": "strided"}),
    "listed": ("llama", {}, {"head_dim": 14}, {"rope": "longrope"}),
    "listed llama3": ("llama", {"rope_parameters": LLAMA3}, {"head_dim": 14}, {"rope": "longrope"}),
    "listed yarn": ("llama", {"rope_parameters": YARN}, {"head_dim": 14}, {"rope": "longrope"}),
    "listed, two sets": ("gemma3_text", {}, {"head_dim": 26}, {"rope": "longrope"}),
    "listed latent": (
        "deepseek_v3",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {"qk_rope_head_dim": 16},
        {"rope": "longrope"},
    ),
    "proportional": ("llama", {}, {"head_dim": 14}, {"rope": "proportional"}),
    "experts": ("gpt_oss", {}, {"num_local_experts": 7}, {}),
    "experts in groups": ("deepseek_v3", {}, {"n_routed_experts": 9}, {}),
    "groups of experts": ("deepseek_v3", {}, {"n_routed_experts": 8}, {}),
    "tokens": ("phi", {}, {"vocab_size": 41}, {"new_tokens": "closed"}),
    "tokens of a buffer": ("bart", {}, {"vocab_size": 80}, {"new_tokens": "closed"}),
}


@cache
def _made(name: str, dtype: torch.dtype) -> Growth:
    family, fields, request, choices = MADE[name]
    return grow_stock(family, fields, request, dtype=dtype, choices=Choices(**choices))


def made(name: str, dtype: torch.dtype = torch.float32) -> Growth:
    return copy.deepcopy(_made(name, dtype))


@pytest.mark.parametrize("name", MADE)
def test_what_is_chosen_is_certified(name: str) -> None:
    assert made(name).certify().failures == []


@pytest.mark.parametrize("name", ["experts", "experts in groups", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_bars_in_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    assert made(name, dtype).certify().failures == []


def entry(place: int, factor: float, *parts: str) -> Callable[[Growth], object]:
    """Multiply one entry of both lists of factors, in both places that hold them."""

    def broken(growth: Growth) -> None:
        for name in ("rope_parameters", "rope_scaling"):
            rope = growth.target_config.get(name) or {}
            for part in parts:
                rope = rope.get(part, {})
            for field in ("short_factor", "long_factor"):
                if field in rope:
                    rope[field] = [x * factor if i == place else x for i, x in enumerate(rope[field])]

    return broken


def rope(**fields: Any) -> Callable[[Growth], object]:
    """Set fields of the rope parameters, in both places; None takes one out."""

    def broken(growth: Growth) -> None:
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(growth.target_config.get(name), dict):
                kept = {**growth.target_config[name], **fields}
                growth.target_config[name] = {k: v for k, v in kept.items() if v is not None}

    return broken


def bare(name: str) -> Callable[[Growth], object]:
    """A family whose pattern does not say that a bias is one of what is chosen."""

    def broken(growth: Growth) -> None:
        family = growth.family
        growth.family = replace(family, tensors={**family.tensors, name: family.tensors[name].replace("odds: ", "")})

    return broken


ROUTER = "model.layers.1.mlp.router.bias"
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"
WRONG: dict[str, tuple[str, Callable[[Growth], object], tuple[str, ...]]] = {
    "strided pairs at the places of the default": (
        "strided",
        told("key", lift=[[5, 0], [5, None], [5, 5], [5, None]]),
        ("rope_theta", "rotary pair 1"),
    ),
    "strided pairs with another base": ("strided", config("rope_theta", 1e8), ("rope_theta",)),
    "two strided rows exchanged": ("strided", swap(ATTN + "q_proj.weight", 0, 2), ("q_proj.weight[0, 0]",)),
    "strided under a rounded ramp": (
        "strided yarn",
        lambda g: (
            [c["rope_parameters"].update(truncate=True) for c in (g.source_config, g.target_config)]
            + [c["rope_scaling"].update(truncate=True) for c in (g.target_config,) if c.get("rope_scaling")]
            + [(g.source_full or {})["rope_parameters"].update(truncate=True)]
        ),
        ("rope_parameters", "rotary pair"),
    ),
    "a frequency of an old pair": ("listed", entry(2, 1 + 1e-9), ("rope_parameters", "rotary pair 2")),
    "a frequency of one set": (
        "listed, two sets",
        entry(2, 1.5, "sliding_attention"),
        ("rotary pair 2", "sliding_attention"),
    ),
    "a blended frequency": ("listed llama3", entry(3, 1 + 1e-9), ("rotary pair 3",)),
    "two lists that differ": ("listed", rope(long_factor=[1.0] * 7), ("rope_parameters", "two lists")),
    "a list too short": ("listed", rope(short_factor=[1.0] * 5, long_factor=[1.0] * 5), ("7 entries",)),
    "another base than one": ("listed", config("rope_theta", 10000.0), ("contradicts itself",)),
    "the attention factor left out": ("listed yarn", rope(attention_factor=1.0), ("attention_factor 1.0",)),
    "no attention factor": ("listed yarn", rope(attention_factor=None), ("KeyError",)),
    "a type that nothing says": ("listed", rope(rope_type="spiral"), ("rope_parameters",)),
    "another longest text": ("listed", rope(original_max_position_embeddings=16), ("required 32",)),
    "a field that scales the softmax": ("listed", rope(mscale_all_dim=1.0), ("mscale_all_dim", "no place")),
    "what scaled the softmax lost": ("listed latent", rope(mscale_all_dim=None), ("mscale_all_dim", "required 1.3")),
    "an older rope_scaling that says otherwise": (
        "listed",
        config("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("contradicts itself",),
    ),
    "one pair too few that turns": ("proportional", rope(partial_rotary_factor=0.5), ("rotary pair 3",)),
    "the base of proportional": (
        "proportional",
        lambda g: [rope(rope_theta=1e4)(g), config("rope_theta", 1e4)(g)],
        ("rotary pair 1",),
    ),
    "a factor of proportional": ("proportional", rope(factor=2.0), ("factor=2.0", "no place")),
    # What is never chosen.
    "a new expert that may be chosen": ("experts", put(ROUTER, (6,), 0.0), (ROUTER, "new channel 6", "required -1.0")),
    "a new expert that is not told": (
        "experts",
        lambda g: g.axes["experts"].pop("barred"),
        ("axis experts", "only whole copies"),
    ),
    "an old expert under its bias": ("experts", put(ROUTER, (1,), -1e30), (f"{ROUTER}[1]",)),
    "a router without a bias": ("experts", bare("model.layers.{layer}.mlp.router.bias"), ("names no bias",)),
    "a layer without one": (
        "experts in groups",
        lambda g: [side.pop(CORRECTION) for side in (g.source, g.target)],
        ("axis experts", "layer 1", "no bias"),
    ),
    "as many chosen as there are": (
        "experts",
        lambda g: [c.update(num_experts_per_tok=6) for c in (g.source_config, g.target_config, g.source_full or {})],
        ("6 of 5 old experts",),
    ),
    "more chosen": ("experts", config("num_experts_per_tok", 4), ("num_experts_per_tok", "required 3")),
    "groups torn apart": ("experts in groups", told("experts", lift=[[6, 0], [3, None]]), ("groups of 2", "torn")),
    "groups left as they were": ("groups of experts", config("n_group", 3), ("must divide",)),
    "more groups chosen": ("groups of experts", config("topk_group", 3), ("topk_group", "required 2")),
    "an axis that nothing chooses from": ("tokens", told("mlp", barred=True), ("axis mlp", "cannot be barred")),
    "a new token that may be chosen": ("tokens", put("lm_head.bias", (40,), -100.0), ("lm_head.bias", "channel 40")),
    "a new token of a buffer": ("tokens of a buffer", put("final_logits_bias", (0, 75), 0.0), ("channel 75",)),
    "an old token under its bias": ("tokens", put("lm_head.bias", (3,), -1e30), ("lm_head.bias[3]",)),
    "experts that nothing routes": ("experts", fact(experts=None), ("axis experts", "cannot be barred")),
}


@pytest.mark.parametrize("case", WRONG)
def test_broken_rules_are_found(case: str) -> None:
    name, broken, said = WRONG[case]
    growth = made(name)
    broken(growth)
    failing(growth, *said)


def test_a_bias_that_is_not_told_to_bar_is_free() -> None:
    """The control: without the claim, a new token's bias may be anything."""
    growth = made("tokens")
    growth.axes["vocab"].pop("barred")
    growth.target["lm_head.bias"][40] = 0.5
    assert growth.certify().failures == []
