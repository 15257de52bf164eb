"""The certificate's rules of norms and of the head: each broken alone, and the certificate names where."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from breaks import ATTN, L0, ROOT2, Case, check, fact, norm, put, times, told
from certified import Growth

from growformer.algebra import Power

WRONG: dict[str, Case] = {
    "1 + w scaled as w": (
        "gemma2",
        {},
        {"hidden_size": 36},
        lambda g: g.target.update({L0 + "input_layernorm.weight": _as_w(g, L0 + "input_layernorm.weight")}),
        (L0 + "input_layernorm.weight[0]", "(1 + "),
    ),
    "gain of an added norm left alone": (
        "gemma2",
        {},
        {"hidden_size": 48},
        lambda g: _old(g, L0 + "post_attention_layernorm.weight", 24),
        (L0 + "post_attention_layernorm.weight[0]",),
    ),
    "power of the embedding left out": (
        "gemma2",
        {},
        {"hidden_size": 48},
        times("model.embed_tokens.weight", ROOT2),
        ("model.embed_tokens.weight[0, 0]",),
    ),
    "power of the logits left out": (
        "t5",
        {},
        {"d_model": 36},
        times("decoder.final_layer_norm.weight", 1.5**0.5),
        ("decoder.final_layer_norm.weight[0]",),
    ),
    "a power on the wrong writer": (
        "gemma2",
        {},
        {"hidden_size": 48},
        fact(powers={"q": Power("hidden", Fraction(1, 2))}),
        ("axis hidden", "role q", "not covered"),
    ),
    "a power that is no root": (
        "gemma2",
        {},
        {"hidden_size": 48},
        fact(powers={"embed": Power("hidden", Fraction(1, 3))}),
        ("axis hidden", "1/3", "not covered"),
    ),
    "no gain, and a reader that does not make up for it": (
        "olmo",
        {},
        {"hidden_size": 36},
        times(L0 + "mlp.up_proj.weight", 1.5**0.5),
        (L0 + "mlp.up_proj.weight[0, 0]",),
    ),
    "eps in the code, and no scale": (
        "olmo",
        {},
        {"hidden_size": 36},
        told("hidden", scale="1"),
        ("axis hidden", "eps 1e-05 in the code", "2/3"),
    ),
    "no gain before a tied head": (
        "olmo",
        {"tie_word_embeddings": True},
        {"intermediate_size": 41},
        told("hidden", new=36, lift=[[24, 0], [12, 0, "1", None, 24]], scale="3/2"),
        ("axis hidden", "no gain"),
    ),
    "the stream read raw with its scale": (
        "olmo2",
        {},
        {"hidden_size": 36},
        times(ATTN + "v_proj.weight", 1.5**0.5),
        (ATTN + "v_proj.weight[0, 0]",),
    ),
    "an added norm without a gain": (
        "olmo2",
        {},
        {"num_hidden_layers": 5},
        norm("post", gain=None),
        ("axis layer", "no gain to close"),
    ),
    "zeros under a post-norm": (
        "bert",
        {},
        {"hidden_size": 48},
        told("hidden", lift=[[24, 0], [24, None]]),
        ("axis hidden", "LayerNorm"),
    ),
    "a mean where copies must be": (
        "bert",
        {},
        {"hidden_size": 48},
        told("hidden", lift=[[24, 0], [24, 0, "1", None, 24]]),
        ("axis hidden", "only whole copies"),
    ),
    "copies whose columns do not add up": (
        "bert",
        {},
        {"hidden_size": 48},
        put("bert.encoder.layer.0.intermediate.dense.weight", (3, 30), 9.0),
        ("bert.encoder.layer.0.intermediate.dense.weight", "[3, 6]", "their sum"),
    ),
    "a shift that is no copy": (
        "bert",
        {},
        {"hidden_size": 48},
        put("bert.embeddings.LayerNorm.bias", (30,), 9.0),
        ("bert.embeddings.LayerNorm.bias[30]",),
    ),
    "the norm before a tied head that reads copies": (
        "bert",
        {},
        {"hidden_size": 48},
        times("cls.predictions.transform.LayerNorm.bias", 2.0),
        ("cls.predictions.transform.LayerNorm.bias[0]",),
    ),
    "what the head demands, of two norms": (
        "t5",
        {},
        {"d_model": 48},
        lambda g: fact(tensors=_one_final(g), powers={"logits": Power("hidden", Fraction(1))})(g),
        ("axis hidden", "encoder.final_layer_norm.weight", "all give to the head"),
    ),
    "what the head demands, of an inner post-norm too": (
        "bart",
        {},
        {"d_model": 48},
        times("model.decoder.layers.0.final_layer_norm.weight", 0.5),
        ("model.decoder.layers.0.final_layer_norm.weight[0]",),
    ),
    "what the head demands, of the last post-norm not": (
        "bart",
        {},
        {"d_model": 48},
        times("model.decoder.layers.2.final_layer_norm.weight", 2.0),
        ("model.decoder.layers.2.final_layer_norm.weight[0]",),
    ),
    "a gain behind a mean that is not one": (
        "dinov2",
        {},
        {"hidden_size": 48},
        put("encoder.layer.0.layer_scale1.lambda1", (30,), 9.0),
        ("encoder.layer.0.layer_scale1.lambda1[30]", "found 9.0", "required 1"),
    ),
    "a mean that leaves out the gain behind it": (
        "dinov2",
        {},
        {"hidden_size": 48},
        lambda g: _plain_mean(g, "encoder.layer.0.mlp.fc2.bias", 24),
        ("encoder.layer.0.mlp.fc2.bias[24]", "mean"),
    ),
    "a mean past a gain of each channel": (
        "dinov2",
        {},
        {"hidden_size": 48},
        lambda g: fact(tensors=_without_roles(g))(g),
        ("layer_scale1.lambda1", "axis hidden", "no mean passes"),
    ),
}


def _as_w(growth: Growth, name: str) -> torch.Tensor:
    """A gain scaled as if nothing were added to it."""
    out = growth.target[name].clone()
    old = growth.source[name]
    out[: len(old)] = (old.double() * (len(old) / len(out)) ** 0.5).to(out.dtype)
    return out


def _plain_mean(growth: Growth, name: str, size: int) -> None:
    growth.target[name][size:] = growth.source[name].mean()


def _one_final(growth: Growth) -> dict[str, str]:
    """The patterns, with one role for the last norm of either stack."""
    return {name: text.replace("encoder_final:", "final:") for name, text in growth.family.tensors.items()}


def _without_roles(growth: Growth) -> dict[str, str]:
    """The patterns, with writers that do not say which gain stands behind them."""
    tensors = growth.family.tensors.items()
    return {name: text.replace("(scale1: hidden)", "hidden").replace("scale1: ->", "->") for name, text in tensors}


def _old(growth: Growth, name: str, size: int) -> None:
    growth.target[name][:size] = growth.source[name]


@pytest.mark.parametrize("case", WRONG)
def test_broken_rules_are_found(case: str) -> None:
    check(WRONG[case])
