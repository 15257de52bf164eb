"""The certificate's rules of layers that differ (Gemma 4): each broken alone, and the certificate names where."""

from __future__ import annotations

from typing import Any

import pytest
from breaks import Case, check, config, fact, grown, layers, put, swap, times
from certified import Growth, failing

NAME = "gemma4_text"
L0, L1, L2, L3 = (f"model.layers.{i}." for i in range(4))
ROOT = 1.5**0.5
MOE: dict[str, Any] = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 9}
K_EQ_V: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def _unnamed(growth: Growth) -> None:
    """What reads the values no longer says which norm over them it follows."""
    tensors = growth.family.tensors.items()
    fact(tensors={name: text.replace("(full_v: full_key)", "full_key") for name, text in tensors})(growth)


def _flat(growth: Growth) -> None:
    """One set of rope parameters for all layers, in both configs."""
    for side in (growth.source_config, growth.target_config, growth.source_full):
        side["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}


WRONG: dict[str, Case] = {
    "a number on the stream that is not 1 in a new layer": (
        NAME,
        {},
        {"num_hidden_layers": 8},
        put(L2 + "layer_scalar", (0,), 0.5),
        (L2 + "layer_scalar[0]", "found 0.5", "required 1"),
    ),
    "a number on the stream of an old layer": (
        NAME,
        {},
        {"hidden_size": 36},
        times(L0 + "layer_scalar", 2.0),
        (L0 + "layer_scalar[0]",),
    ),
    "one layer of a type with another size": (
        NAME,
        {},
        {"global_head_dim": 28},
        config("per_layer_config.1.head_dim", 14),
        ("per_layer_config[1]", "head_dim is 14", "required 28"),
    ),
    "no layer's own sizes": (
        NAME,
        {},
        {"global_head_dim": 28},
        config("per_layer_config", {}),
        ("per_layer_config[1]", "head_dim is 10", "required 28"),
    ),
    "a size of one layer that no axis is": (
        NAME,
        {},
        {"hidden_size": 36},
        config("per_layer_config.0", {"num_key_value_heads": 1}),
        ("per_layer_config[0]", "num_key_value_heads", "not covered"),
    ),
    "sizes by layer that are none": (
        NAME,
        {},
        {"hidden_size": 36},
        config("per_layer_config", [14]),
        ("per_layer_config", "cannot be read"),
    ),
    "more pairs turn": (
        NAME,
        {},
        {"global_head_dim": 28},
        config("rope_parameters.full_attention.partial_rotary_factor", 0.5),
        ("partial_rotary_factor", "[7] pairs turn", "required [3]"),
    ),
    "the base of layers that did not grow": (
        NAME,
        {},
        {"global_head_dim": 28},
        config("rope_parameters.sliding_attention.rope_theta", 7.0),
        ("rope_theta", "found 7.0", "required 100.0", "sliding_attention"),
    ),
    "no base for layers that grew": (
        NAME,
        {},
        {"head_dim": 20},
        _flat,
        ("rope_parameters", "no set for sliding_attention"),
    ),
    "another layer lends its keys": (
        NAME,
        {},
        {"num_hidden_layers": 7},
        layers(layer=[0, 1, 2, None, 3, 4, 5]),
        ("num_kv_shared_layers", "[2, 3] lend", "required [2, 4]"),
    ),
    "too few layers borrow": (
        NAME,
        {},
        {"num_hidden_layers": 7},
        config("num_kv_shared_layers", 2),
        ("num_kv_shared_layers", "found 2", "required 3"),
    ),
    "a count of borrowers that is none": (
        NAME,
        {},
        {"hidden_size": 36},
        config("num_kv_shared_layers", 99),
        ("num_kv_shared_layers", "found 99"),
    ),
    "slabs of two layers exchanged": (
        NAME,
        {},
        {"num_hidden_layers": 8},
        swap("model.embed_tokens_per_layer.weight", 0, 6, dim=1),
        ("model.embed_tokens_per_layer.weight[0, 0]",),
    ),
    "the power behind a reader made up for twice": (
        NAME,
        {},
        {"hidden_size": 36},
        times("model.per_layer_model_projection.weight", ROOT),
        ("model.per_layer_model_projection.weight[0, 0]",),
    ),
    "the stream read raw with its scale": (
        NAME,
        {},
        {"hidden_size": 36},
        times(L0 + "per_layer_input_gate.weight", ROOT),
        (L0 + "per_layer_input_gate.weight[0, 0]",),
    ),
    "values written under their norm": (
        NAME,
        {},
        {"head_dim": 20},
        put(L0 + "self_attn.v_proj.weight", (10, 0), 0.5),
        (L0 + "self_attn.v_proj.weight[10, 0]", "zero in a new entry"),
    ),
    "values read with their scale": (
        NAME,
        {},
        {"head_dim": 20},
        times(L0 + "self_attn.o_proj.weight", 2.0**0.5),
        (L0 + "self_attn.o_proj.weight[0, 0]",),
    ),
    "a power on a norm's gain left to it": (
        NAME,
        MOE,
        {"hidden_size": 36},
        times(L0 + "router.scale", 1 / ROOT),
        (L0 + "router.scale[0]",),
    ),
    "a norm before the sum of two branches as if it gave to readers": (
        NAME,
        MOE,
        {"hidden_size": 36},
        times(L0 + "post_feedforward_layernorm_1.weight", 1 / ROOT),
        (L0 + "post_feedforward_layernorm_1.weight[0]",),
    ),
    "keys that are values, read with their scale": (
        NAME,
        K_EQ_V,
        {"global_head_dim": 22},
        times(L1 + "self_attn.o_proj.weight", (22 / 14) ** 0.5),
        (L1 + "self_attn.o_proj.weight[0, 0]",),
    ),
    "keys that are values, and a reader of no norm in particular": (
        NAME,
        K_EQ_V,
        {"global_head_dim": 22},
        _unnamed,
        ("axis full_key", "with and without a gain"),
    ),
    "a wide MLP of a layer that has none": (
        NAME,
        {"use_double_wide_mlp": True},
        {"intermediate_size": 30},
        put("model.layers.4.mlp.down_proj.weight", (0, 57), 0.5),
        ("model.layers.4.mlp.down_proj.weight[0, 57]", "zero in a new entry"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_broken_rules_are_found(case: str) -> None:
    check(WRONG[case])


@pytest.mark.parametrize("lent", [True, False])
def test_gains_of_lent_keys_cannot_share_their_factor_otherwise(lent: bool) -> None:
    # Queries of other layers meet the same keys; without these, q and k may each have the whole factor.
    growth = grown(NAME, {} if lent else {"num_kv_shared_layers": 0}, {"global_head_dim": 22})
    q, k = (L3 + f"self_attn.{side}_norm.weight" for side in "qk")
    factor = float(growth.target[k][0].double() / growth.source[k][0].double())
    places = [*range(7), *range(11, 18)]  # pair i stays pair i
    growth.target[k][places] = growth.source[k]
    growth.target[q][places] = (growth.source[q].double() * _exact(factor)).to(growth.source[q].dtype)
    if lent:
        failing(growth, q)
    else:
        assert growth.certify().failures == []


def _exact(factor: float) -> float:
    """The factor that a float32 quotient is of: a fraction with the sizes in it."""
    return min((14 / 22, 22 / 14, (14 / 22) ** 0.5, (22 / 14) ** 0.5), key=lambda f: abs(f - factor))
