"""Negative controls of the structural certificate: each rule broken alone, and the certificate names where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from certified import EVERY, K_PROJ, O_PROJ, Q_PROJ, QWEN3, ROPE, Growth, failing, grow, move_key

# Negative controls: one broken rule each.

Break = Callable[[Growth], object]


def every_layer(template: str, factor: float) -> Break:
    def broken(growth: Growth) -> None:
        for name in [n for n in growth.target if n.endswith(template)]:
            growth.times(name, factor)

    return broken


def put(name: str, place: tuple[int, ...], value: float = 1e-3) -> Break:
    def broken(growth: Growth) -> None:
        growth.target[name][place] = value

    return broken


def told(axis: str, **other: Any) -> Break:
    return lambda growth: growth.axes[axis].update(other)


def config(**other: Any) -> Break:
    return lambda growth: growth.target_config.update(other)


def both(**other: Any) -> Break:
    return lambda growth: (growth.source_config.update(other), growth.target_config.update(other))


def lose(name: str) -> Break:
    return lambda growth: growth.target.pop(name)


def rows(name: str, order: list[int], size: int) -> Break:
    """Permute blocks of `size` rows of one tensor."""

    def broken(growth: Growth) -> None:
        x = growth.target[name]
        growth.target[name] = x.reshape(-1, size, *x.shape[1:])[order].reshape(x.shape).contiguous()

    return broken


def layers_told(*layers: int | None) -> Break:
    def broken(growth: Growth) -> None:
        growth.layers = list(layers)
        growth.axes.pop("layer")

    return broken


HIDDEN, KEY, MLP, HEADS = {"hidden_size": 36}, {"head_dim": 10}, {"intermediate_size": 41}, {"num_attention_heads": 8}
DEEP = {"num_hidden_layers": 5}
NORM0 = "model.layers.0.input_layernorm.weight"
WRONG: dict[str, tuple[str, dict[str, int], Break, tuple[str, ...]]] = {
    "key scale left out": ("llama", KEY, every_layer("k_proj.weight", 0.6**0.5), ("layers.0.self_attn.k_proj.weight",)),
    "key scale on the bias left out": ("llama", KEY, every_layer("k_proj.bias", 0.6**0.5), ("k_proj.bias[0]",)),
    "key scale in a fused tensor": ("gpt2", EVERY["gpt2"], every_layer("c_attn.bias", 0.6**0.5), ("c_attn.bias",)),
    "gain scale left out": ("llama", HIDDEN, every_layer("norm.weight", 1.5**0.5), (NORM0, "[0]")),
    "gain scale of LayerNorm": ("gpt2", {"n_embd": 36}, every_layer("ln_2.weight", 1.5**0.5), ("h.0.ln_2.weight",)),
    "eps unscaled": ("llama", HIDDEN, config(rms_norm_eps=1e-3), ("rms_norm_eps", "0.001", "2/3")),
    "eps scaled where shared": ("qwen3", {"hidden_size": 36}, config(rms_norm_eps=1e-3 * 2 / 3), ("rms_norm_eps",)),
    "stream scale left out of one writer": (
        "qwen3",
        {"hidden_size": 36},
        every_layer("0.mlp.down_proj.weight", (2 / 3) ** 0.5),
        ("model.layers.0.mlp.down_proj.weight[0, 0]", "found", "required"),
    ),
    "gain of copied keys left open": (
        "qwen3",
        {"head_dim": 12},
        put("model.layers.1.self_attn.k_norm.weight", (4,)),
        ("layers.1.self_attn.k_norm.weight[4]", "zero"),
    ),
    "gain of keys": (
        "qwen3",
        {"head_dim": 12},
        every_layer("k_norm.weight", 0.5**0.5),
        ("layers.0.self_attn.k_norm.weight",),
    ),
    "a copied key that is none": (
        "qwen3",
        {"head_dim": 12},
        put("model.layers.0.self_attn.q_proj.weight", (4, 3)),
        ("q_proj.weight[4, 3]",),
    ),
    "an empty key row under a norm": (
        "qwen3",
        {"head_dim": 8},
        put("model.layers.0.self_attn.q_proj.weight", (3, 3)),
        ("q_proj.weight[3, 3]", "zero"),
    ),
    "down filled": (
        "llama",
        MLP,
        put("model.layers.1.mlp.down_proj.weight", (5, 30)),
        ("layers.1.mlp.down_proj.weight[5, 30]", "zero"),
    ),
    "o filled": (
        "llama",
        HEADS,
        put("model.layers.1.self_attn.o_proj.weight", (5, 13)),
        ("layers.1.self_attn.o_proj.weight[5, 13]", "zero"),
    ),
    "embedding filled": (
        "llama",
        HIDDEN,
        put("model.embed_tokens.weight", (5, 30)),
        ("embed_tokens.weight[5, 30]", "zero"),
    ),
    "bias of the stream filled": (
        "llama",
        HIDDEN,
        put("model.layers.2.mlp.down_proj.bias", (30,)),
        ("layers.2.mlp.down_proj.bias[30]",),
    ),
    "new keys filled": (
        "llama",
        KEY,
        put("model.layers.0.self_attn.k_proj.weight", (3, 0)),
        ("k_proj.weight[3, 0]", "zero"),
    ),
    "new key bias filled": (
        "llama",
        KEY,
        put("model.layers.0.self_attn.k_proj.bias", (8,)),
        ("k_proj.bias[8]", "zero"),
    ),
    "zero corner filled": (
        "llama",
        EVERY["llama"],
        put("model.layers.0.self_attn.o_proj.weight", (30, 7)),
        ("o_proj.weight[30, 7]", "zero"),
    ),
    "new shift": ("gpt2", {"n_embd": 36}, put("transformer.ln_f.bias", (30,)), ("ln_f.bias[30]", "zero")),
    "mean off": ("gpt2", {"n_embd": 36}, put("transformer.wpe.weight", (3, 30)), ("wpe.weight[3, 30]", "mean")),
    "new layer open": (
        "llama",
        DEEP,
        put("model.layers.2.self_attn.o_proj.bias", (3,)),
        ("layers.2.self_attn.o_proj.bias[3]", "zero"),
    ),
    "free entry not finite": (
        "llama",
        MLP,
        put("model.layers.0.mlp.up_proj.weight", (30, 1), float("nan")),
        ("up_proj.weight[30, 1]", "finite"),
    ),
    "old entry not finite": (
        "llama",
        MLP,
        put("model.layers.0.mlp.up_proj.weight", (3, 1), float("inf")),
        ("up_proj.weight[3, 1]",),
    ),
    "heads permuted in one tensor": ("llama", MLP, rows(Q_PROJ.format(1), [1, 0, 2, 3], 6), (Q_PROJ.format(1),)),
    "kv heads permuted in one tensor": ("llama", HEADS, rows(K_PROJ.format(1), [1, 0], 6), (K_PROJ.format(1),)),
    "a missing tensor": ("llama", HIDDEN, lose("model.norm.weight"), ("model.norm.weight", "missing")),
    "a missing new tensor": ("llama", DEEP, lose(O_PROJ.format(2)), (O_PROJ.format(2), "missing")),
    "a tensor too many": ("llama", HIDDEN, lambda g: g.target.update(extra=torch.ones(1)), ("extra", "nothing asks")),
    "a source tensor no pattern covers": (
        "llama",
        HIDDEN,
        lambda g: g.source.update(extra=torch.ones(1)),
        ("extra", "no pattern"),
    ),
    "a source tensor missing": (
        "llama",
        HIDDEN,
        lambda g: g.source.pop(Q_PROJ.format(1)),
        (Q_PROJ.format(1), "missing"),
    ),
    "another shape": (
        "llama",
        HIDDEN,
        lambda g: g.target.update({"model.norm.weight": torch.ones(35)}),
        ("model.norm.weight", "[36]"),
    ),
    "layers told wrong": ("llama", DEEP, layers_told(0, 1, 2, None, None), ("model.layers.2",)),
    "layers told in another order": ("llama", DEEP, layers_told(0, 2, None, 1, None), ("axis layer",)),
    "a layer told twice": ("llama", DEEP, layers_told(0, 1, None, 2, 2), ("axis layer",)),
    "layer map and lift disagree": ("llama", DEEP, told("layer", lift=[[3, 0], [2, None]]), ("axis layer", "disagree")),
    "scale told wrong": ("llama", HIDDEN, told("hidden", scale="3/2"), ("embed_tokens.weight",)),
    "scale not told": ("qwen3", {"hidden_size": 36}, told("hidden", scale="1"), ("rms_norm_eps", "share")),
    "mlp told closed at its writers": (
        "llama",
        MLP,
        told("mlp", closed="writers"),
        ("up_proj.weight[28, 0]", "zero"),
    ),
    "value told closed at its writers": (
        "llama",
        KEY,
        told("value", closed="writers"),
        ("v_proj.weight[6, 0]", "zero"),
    ),
    "key told closed at its writers": ("llama", KEY, told("key", closed="writers"), ("q_proj.weight[3, 0]", "zero")),
    "heads told closed at their writers": ("llama", HEADS, told("heads", closed="writers"), ("axis heads", "readers")),
    "hidden told closed at its readers": ("llama", HIDDEN, told("hidden", closed="readers"), ("axis hidden", "norm")),
    "lift swapped": ("llama", MLP, told("mlp", lift=[[13, None], [28, 0]]), ("gate_proj.weight[13, 0]",)),
    "lift of rotary pairs swapped": (
        "llama",
        KEY,
        told("key", lift=[[3, 3], [2, None], [3, 0], [2, None]]),
        ("axis key", "rotary"),
    ),
    "lift short": ("llama", MLP, told("mlp", lift=[[28, 0], [12, None]]), ("axis mlp", "40")),
    "lift loses a channel": (
        "llama",
        MLP,
        told("mlp", lift=[[27, 0], [14, None]]),
        ("axis mlp", "R E is 0 at old channel 27"),
    ),
    "lift not undone": ("llama", MLP, told("mlp", lift=[[28, 0, "4", "1"], [13, None]]), ("axis mlp", "R E is 2")),
    "a factor through what is not linear": (
        "llama",
        MLP,
        told("mlp", lift=[[28, 0, "4", "1/4"], [13, None]]),
        ("axis mlp", "linear"),
    ),
    "a mean under RMSNorm": (
        "llama",
        HIDDEN,
        told("hidden", lift=[[24, 0], [12, 0, "1", None, 24]]),
        ("axis hidden", "mean"),
    ),
    "zeros under LayerNorm": (
        "gpt2",
        {"n_embd": 36},
        told("hidden", lift=[[24, 0], [12, None]]),
        ("axis hidden", "LayerNorm"),
    ),
    "a mean past no norm": ("llama", MLP, told("mlp", lift=[[28, 0], [13, 0, "1", None, 28]]), ("axis mlp",)),
    "unequal energies": (
        "llama",
        HIDDEN,
        told("hidden", lift=[[24, 0], [12, 0, "1", None]]),
        ("axis hidden", "energies"),
    ),
    "vocabulary grown": ("llama", MLP, told("vocab", new=38, lift=[[37, 0], [1, None]]), ("axis vocab",)),
    "an axis nobody has": ("llama", MLP, lambda g: g.axes.update(experts={}), ("axis experts",)),
    "sizes told wrong": ("llama", MLP, config(intermediate_size=40), ("axis mlp", "40")),
    "theta unchanged": ("llama", KEY, config(**ROPE, rope_theta=10000.0), ("rope_theta", "10000.0")),
    "theta styles disagree": ("llama", KEY, config(rope_theta=10000.0), ("rope_theta", "contradicts")),
    "theta changed without growth": (
        "llama",
        MLP,
        config(rope_theta=1e5, rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
        ("rope_theta",),
    ),
    "rope type changed": (
        "llama",
        KEY,
        lambda g: g.target_config["rope_parameters"].update(rope_type="linear"),
        ("rope_parameters",),
    ),
    "an extra config difference": ("llama", MLP, config(hidden_act="relu"), ("hidden_act",)),
    "a config field lost": ("llama", MLP, lambda g: g.target_config.pop("attention_bias"), ("attention_bias",)),
    "tie changed": ("llama", MLP, config(tie_word_embeddings=True), ("tie_word_embeddings",)),
    "layer types not moved": ("qwen3", DEEP, config(layer_types=["full_attention"] * 5), ("layer_types[1]", "sliding")),
    "layer types short": ("qwen3", DEEP, config(layer_types=["full_attention"] * 4), ("layer_types",)),
    "layer types lost": ("qwen3", DEEP, lambda g: g.target_config.pop("layer_types"), ("layer_types", "missing")),
    "a new layer of a foreign type": (
        "qwen3",
        DEEP,
        lambda g: g.target_config["layer_types"].__setitem__(4, "sliding_attention"),
        ("layer_types[4]",),
    ),
    "a field that the family does not cover": (
        "gpt2",
        {"n_inner": 100},
        both(scale_attn_weights=False),
        ("scale_attn_weights",),
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_broken_rules_are_found(case: str) -> None:
    name, request_, broken, said = WRONG[case]
    growth = grow(name, **request_)
    assert growth.certify().ok
    broken(growth)
    failing(growth, *said)


def test_the_gain_before_a_tied_head() -> None:
    tied = QWEN3 | {"tie_word_embeddings": True}
    growth = grow("qwen3", tied, hidden_size=36)
    assert growth.certify().ok
    growth.times("model.norm.weight", 1.5**0.5)  # as if the head were its own
    failing(growth, "model.norm.weight[0]")


def test_rotary_pairs_appended_instead_of_spread() -> None:
    """Wrong consistently: tensors, theta and receipt agree, and no equation is broken but that of the rotation."""
    growth = grow("llama", head_dim=8)
    move_key(growth, [0, 1, 2, 4, 5, 6, 3, 7])
    growth.axes["key"]["lift"] = [[6, 0], [2, None]]
    failing(growth, "axis key", "rotary pair 0", "(0, 3)")


def test_query_heads_appended_across_groups() -> None:
    """Wrong consistently: old head 1 would read the key/value head of group 0, as every tensor says it should."""
    growth = grow("llama", num_attention_heads=8)
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    for layer in range(3):
        for name in (Q_PROJ.format(layer), Q_PROJ.format(layer).replace("weight", "bias")):
            rows(name, order, 6)(growth)
        x = growth.target[O_PROJ.format(layer)]
        growth.target[O_PROJ.format(layer)] = x.reshape(24, 8, 6)[:, order].reshape(x.shape).contiguous()
    growth.axes["heads"]["lift"] = [[4, 0], [4, None]]
    failing(growth, "axis heads", "q heads appended across groups")


@pytest.mark.parametrize("name", sorted(EVERY))
def test_one_ulp_in_any_tensor(name: str) -> None:
    """One old weight off by one unit in the last place, in each tensor in turn."""
    growth = grow(name, **EVERY[name])
    new = {key for key in growth.target if ".layers." in key or ".h." in key}
    new = {key for key in new if growth.layers["layer"][int(key.split(".")[2])] is None}
    for key in growth.target.keys() - new:
        kept = growth.target[key].clone()
        first = growth.target[key].view(-1)[:1]
        first.copy_(torch.nextafter(first, first + 1))
        failures = growth.certify().failures
        assert len(failures) == 1, key
        assert failures[0].startswith(f"{key}[0"), failures
        growth.target[key] = kept
    assert growth.certify().ok
