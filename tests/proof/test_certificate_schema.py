"""The certificate's rules of experts, layers and config fields: each broken alone, and the certificate names where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from breaks import L0, Case, check, config, fact, layers, put, swap, told
from certified import failing, grow

from growformer.algebra import Experts, assigned

MOE_LISTS = {"mlp_only_layers": [1], "decoder_sparse_step": 1}
W2 = L0 + "block_sparse_moe.experts.{}.w2.weight"
T5 = "decoder.block.0.layer.0."

WRONG: dict[str, Case] = {
    "copies of experts that do not add up": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        put(W2.format(7), (3, 4), 9.0),
        (W2.format(2), "[3, 4, 0]", "their sum"),
    ),
    "copies of experts in place of halves": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        lambda g: [g.times(W2.format(i), 0.5) for i in (1, 6)],
        (W2.format(1), "their sum"),
    ),
    "a copied expert that is none": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        put(L0 + "block_sparse_moe.experts.7.w1.weight", (3, 4), 9.0),
        ("block_sparse_moe.experts.7.w1.weight[3, 4]",),
    ),
    "a router's row": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        put(L0 + "block_sparse_moe.gate.weight", (7, 3), 9.0),
        ("block_sparse_moe.gate.weight[7, 3]",),
    ),
    "experts chosen as before": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        config("num_experts_per_tok", 2),
        ("num_experts_per_tok", "found 2", "required 4"),
    ),
    "groups of experts as before": (
        "deepseek_v3",
        {},
        {"n_routed_experts": 12},
        config("n_group", 3),
        ("n_group", "required 6"),
    ),
    "copies of experts whose weights do not add up to one": (
        "deepseek_v3",
        {},
        {"n_routed_experts": 12},
        fact(experts=Experts(axis="experts", groups=("n_group", "topk_group"), requires={"norm_topk_prob": False})),
        ("norm_topk_prob", "copies of experts"),
    ),
    "new experts": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        told("experts", lift=[[5, 0], [5, None]]),
        ("axis experts", "only whole copies"),
    ),
    "experts twice in a row": (
        "mixtral",
        {},
        {"num_local_experts": 10},
        told("experts", lift=[run for i in range(5) for run in ([1, i], [1, i, "1", None])]),
        ("axis experts", "only whole copies"),
    ),
    "one expert of a fused tensor": (
        "gpt_oss",
        {},
        {"num_local_experts": 10},
        put(L0 + "mlp.experts.gate_up_proj", (7, 3, 4), 9.0),
        ("mlp.experts.gate_up_proj[7, 3, 4]",),
    ),
    "readers of a fused tensor": (
        "gpt_oss",
        {},
        {"num_local_experts": 10},
        put(L0 + "mlp.experts.down_proj_bias", (7, 3), 9.0),
        ("mlp.experts.down_proj_bias", "[2, 3]", "their sum"),
    ),
    # Layers.
    "the closing gain of a new layer at zero": (
        "gemma2",
        {},
        {"num_hidden_layers": 7},
        put("model.layers.3.post_feedforward_layernorm.weight", (3,), 0.0),
        ("model.layers.3.post_feedforward_layernorm.weight[3]", "-1"),
    ),
    "a new layer of the other stack open": (
        "t5",
        {},
        {"num_decoder_layers": 6},
        put("decoder.block.2.layer.1.EncDecAttention.o.weight", (3, 3), 1e-3),
        ("decoder.block.2.layer.1.EncDecAttention.o.weight[3, 3]", "zero"),
    ),
    "layers of the other stack told wrong": (
        "t5",
        {},
        {"num_decoder_layers": 6},
        layers(decoder_layer=[0, 1, 2, 3, None, None]),
        ("decoder.block.",),
    ),
    "a new layer under a post-norm": (
        "bert",
        {},
        {"hidden_size": 48},
        layers(layer=[0, 1, 2, None]),
        ("axis layer", "on the stream", "no gain is told"),
    ),
    "a new layer before a settled one": (
        "modernbert",
        {},
        {"num_hidden_layers": 6},
        layers(layer=[None, 0, 1, 2, 3, None]),
        ("axis layer", "a new layer at 0", "built otherwise"),
    ),
    "a new layer of another shape": (
        "gemma2",
        {},
        {"num_hidden_layers": 7},
        lambda g: g.target.update({"model.layers.3.mlp.up_proj.weight": torch.ones(27, 24)}),
        ("model.layers.3.mlp.up_proj.weight", "[28, 24]"),
    ),
    "an expert of a new layer lost": (
        "deepseek_v3",
        {},
        {"num_hidden_layers": 6},
        lambda g: g.target.pop("model.layers.5.mlp.experts.3.up_proj.weight"),
        ("model.layers.5.mlp.experts.3.up_proj.weight", "missing"),
    ),
    "first layers counted as before": (
        "deepseek_v3",
        {},
        {"num_hidden_layers": 6},
        config("first_k_dense_replace", 3),
        ("first_k_dense_replace", "found 3"),
    ),
    "numbers of layers as before": (
        "qwen3_moe",
        MOE_LISTS,
        {"num_hidden_layers": 6},
        config("mlp_only_layers", [1]),
        ("mlp_only_layers", "found [1]", "required [2"),
    ),
    "runs of layers as before": (
        "gpt_neo",
        {},
        {"num_layers": 6},
        config("attention_types", [[["global", "local"], 3]]),
        ("attention_types[", "required"),
    ),
    # What stays.
    "a table of relative positions": (
        "t5",
        {},
        {"num_heads": 7},
        swap(T5 + "SelfAttention.relative_attention_bias.weight", 0, 1, dim=1),
        (T5 + "SelfAttention.relative_attention_bias.weight[0, 0]",),
    ),
    "positions not at their end": (
        "opt",
        {},
        {"max_position_embeddings": 40},
        told("positions", lift=[[8, None], [32, 0]]),
        ("axis positions", "at its end"),
    ),
    "an old position": (
        "opt",
        {},
        {"max_position_embeddings": 40},
        put("model.decoder.embed_positions.weight", (33, 0), 9.0),
        ("embed_positions.weight[33, 0]",),
    ),
    "a field that repeats another": (
        "deepseek_v3",
        {},
        {"num_attention_heads": 8},
        config("num_key_value_heads", 4),
        ("num_key_value_heads", "required 8", "as num_attention_heads"),
    ),
}


AT = {"numbers of layers as before": [1, 5], "first layers counted as before": [0, 5]}


@pytest.mark.parametrize("case", WRONG)
def test_broken_rules_are_found(case: str) -> None:
    check(WRONG[case], AT.get(case))


# Facts that no stock family here combines.


def test_scalars_stay_bit_for_bit() -> None:
    growth = grow("llama", hidden_size=36)
    growth.family = replace(growth.family, tensors={**growth.family.tensors, "scale": "."})
    growth.source["scale"], growth.target["scale"] = torch.tensor(1.5), torch.tensor(1.5)
    assert growth.certify().failures == []
    growth.target["scale"] = torch.tensor(1.25)
    failing(growth, "scale", "found 1.25", "1.5")
    growth.target["scale"] = torch.ones(1)
    failing(growth, "scale", "[1]")


def test_fields_in_parts_of_a_config() -> None:
    """Sizes and an eps in text_config; a field beside them that no rule covers is held to stay."""
    growth = grow("llama", hidden_size=36)
    sizes = {axis: replace(size, name=f"text_config.{size.name}") for axis, size in growth.family.axes.items()}  # type: ignore[type-var]
    sizes = {axis: replace(size, default=None) for axis, size in sizes.items()}  # type: ignore[type-var]
    norms = {role: replace(norm, eps="text_config.rms_norm_eps") for role, norm in growth.family.norms.items()}
    growth.family = replace(growth.family, axes=sizes, norms=norms, rules=())
    inside = [size.name.partition(".")[2] for size in sizes.values()] + ["rms_norm_eps", "hidden_act"]  # type: ignore[union-attr]
    for side in ("source_config", "target_config"):
        old = {"hidden_act": "silu", **getattr(growth, side)}
        part = {name: old.pop(name) for name in dict.fromkeys(inside)}
        setattr(growth, side, {**old, "text_config": part})
    assert growth.certify().failures == []
    good = growth.target_config
    growth.target_config = assigned(good, "text_config.rms_norm_eps", 1e-3)
    failing(growth, "text_config.rms_norm_eps", "2/3")
    growth.target_config = assigned(good, "text_config.hidden_size", 40)
    failing(growth, "axis hidden", "40")
    growth.target_config = assigned(good, "text_config.hidden_act", "relu")
    failing(growth, "text_config.hidden_act", "relu")


def test_an_input_of_the_model_does_not_grow() -> None:
    growth = grow("llama", intermediate_size=41)
    tensors = dict(growth.family.tensors)
    tensors["model.layers.{layer}.mlp.gate_proj.weight"] = "28 <- hidden"
    tensors["model.layers.{layer}.mlp.up_proj.weight"] = "28 <- hidden"
    tensors["model.layers.{layer}.mlp.gate_proj.bias"] = "-> 28"
    tensors["model.layers.{layer}.mlp.up_proj.bias"] = "-> 28"
    growth.family = replace(growth.family, tensors=tensors)
    failing(growth, "axis mlp", "inputs or outputs")


def test_one_list_of_layers_is_that_of_the_first_axis() -> None:
    growth = grow("llama", num_hidden_layers=5)
    growth.layers = list(growth.layers["layer"])
    assert growth.certify().failures == []
    growth.layers = {"block": growth.layers}
    assert not growth.certify().ok


def test_an_axis_in_names_that_the_family_does_not_size() -> None:
    growth = grow("llama", intermediate_size=41)
    growth.family = replace(growth.family, tensors={**growth.family.tensors, "extra.{head}": "-> 1"})
    failing(growth, "axis head", "names of tensors")
