"""The certificate of new layers in post-norm models: where gains and shifts stand is checked bit by bit."""

from __future__ import annotations

import pytest
import torch
from breaks import Break, Case, check, config, grown, layers, norm, put, told
from certified import Growth, failing

from growformer.algebra import Factor
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.proof.handing import Stack, kept_gains

E = "bert.encoder.layer."
AT = [0, 2, 3]
DEEPER = ("bert", {}, {"num_hidden_layers": 6})
"""Sources of the layers: new, 0, new, new, 1, 2."""


def swap_names(a: str, b: str) -> Break:
    def broken(growth: Growth) -> None:
        growth.target[a], growth.target[b] = growth.target[b], growth.target[a]

    return broken


def one_ulp(name: str) -> Break:
    def broken(growth: Growth) -> None:
        x = growth.target[name]
        x[3] = torch.nextafter(x[3], torch.tensor(9.0, dtype=x.dtype))

    return broken


def all_k(factor: float) -> Break:
    """Another K, in every norm that keeps one."""

    def broken(growth: Growth) -> None:
        names = [f"{E}{i}.output.LayerNorm.weight" for i in (1, 2)] + ["bert.embeddings.LayerNorm.weight"]
        names += [f"{E}{i}.attention.output.LayerNorm.weight" for i in AT]
        for name in names:
            growth.target[name] *= factor

    return broken


WRONG: dict[str, tuple[Break, tuple[str, ...]]] = {
    "K at the wrong tensor": (
        swap_names(E + "1.output.LayerNorm.weight", E + "3.output.LayerNorm.weight"),
        (E + "1.output.LayerNorm.weight[0]", "required 1.0", "what a norm keeps"),
    ),
    "a shift that is not moved": (
        swap_names(E + "1.output.LayerNorm.bias", E + "3.output.LayerNorm.bias"),
        (E + "3.output.LayerNorm.bias[0]: found 0.0", E + "0.output.LayerNorm.bias"),
    ),
    "a shift that stays as well": (
        put(E + "1.output.LayerNorm.bias", (5,), 0.25),
        (E + "1.output.LayerNorm.bias[5]: found 0.25", "required 0.0"),
    ),
    "a moved gain off by the last bit": (
        one_ulp(E + "3.output.LayerNorm.weight"),
        (E + "3.output.LayerNorm.weight[3]", E + "0.output.LayerNorm.weight[3]"),
    ),
    "a kept gain off by the last bit": (
        one_ulp("bert.embeddings.LayerNorm.weight"),
        ("bert.embeddings.LayerNorm.weight[3]", "required 1.0"),
    ),
    "the embedding's gain moved past its place": (
        swap_names(E + "0.output.LayerNorm.weight", E + "2.output.LayerNorm.weight"),
        (E + "0.output.LayerNorm.weight[0]", "bert.embeddings.LayerNorm.weight"),
    ),
    "a norm inside that scales": (
        put(E + "2.attention.output.LayerNorm.weight", (7,), 1.5),
        (E + "2.attention.output.LayerNorm.weight[7]: found 1.5", "required 1.0"),
    ),
    "a norm inside that shifts": (
        put(E + "2.attention.output.LayerNorm.bias", (7,), 0.5),
        (E + "2.attention.output.LayerNorm.bias[7]: found 0.5",),
    ),
    "a branch that writes": (
        put(E + "2.output.dense.bias", (7,), 0.5),
        (E + "2.output.dense.bias[7]: found 0.5", "zero"),
    ),
    "another K than the receipt's": (all_k(2.0), ("required 1.0", "what a norm keeps")),
    "a receipt with another K": (told("layer", kept="4"), ("required 2.0", "what a norm keeps")),
    "a receipt without K": (lambda g: g.axes["layer"].pop("kept"), ("axis layer", "no gain is told")),
    "a K below one": (told("layer", kept="1/4"), ("axis layer", "1/4", "required 1 or more")),
    "a K that is no number": (told("layer", kept="much"), ("axis layer", "'much'")),
    "layers told at other places": (layers(layer=[0, None, None, None, 1, 2]), ("axis layer",)),
    "a fact of another norm": (norm("attn_out", feeds="layer"), ("axis layer", "both feed it", "not covered")),
    "no norm that ends a layer": (norm("out", feeds=""), ("axis layer", "ends none", "not covered")),
    "norms of several eps": (norm("attn_out", eps=1e-5), ("axis layer", "several eps", "not covered")),
    "an eps that changed": (config("layer_norm_eps", 1e-5), ("layer_norm_eps", "found 1e-05")),
}


@pytest.mark.parametrize("what", WRONG)
def test_broken_it_is_noticed(what: str) -> None:
    broken, said = WRONG[what]
    case: Case = (*DEEPER, broken, said)
    check(case, AT)


def test_any_other_k_is_as_good_where_it_is_told() -> None:
    growth = grown(*DEEPER, AT)
    all_k(2.0)(growth)
    told("layer", kept="4")(growth)
    assert growth.certify().failures == []


def test_both_stacks_of_an_encoder_decoder() -> None:
    request = {"encoder_layers": 6, "decoder_layers": 5, "d_model": 48}
    growth = grown("bart", {}, request, {"layer": [0, 5], "decoder_layer": [0, 1]})
    assert growth.certify().failures == []
    gain = "model.decoder.layers.1.final_layer_norm.weight"
    assert torch.equal(growth.target[gain], growth.source["model.decoder.layernorm_embedding.weight"].repeat(2))
    growth.target[gain] = growth.source["model.encoder.layernorm_embedding.weight"].repeat(2)
    failing(growth, gain, "model.decoder.layernorm_embedding.weight")


def test_the_last_gain_of_a_tied_head_moves_with_its_factor() -> None:
    growth = grown("bart", {}, {"decoder_layers": 4, "d_model": 48}, {"decoder_layer": [3]})
    last, before = (f"model.decoder.layers.{i}.final_layer_norm" for i in (3, 2))
    assert growth.certify().failures == []
    source = growth.source["model.decoder.layers.2.final_layer_norm.weight"].repeat(2)
    assert torch.equal(growth.target[f"{last}.weight"], source / 2)
    growth.times(f"{last}.weight", 2.0)
    failing(growth, f"{last}.weight[0]", "times 0.5")
    assert (growth.target[f"{before}.weight"] == 1).all()


def test_what_has_no_first_norm_takes_no_first_layer() -> None:
    growth = grown("electra", {}, {"num_hidden_layers": 5}, [1, 4])
    assert growth.certify().failures == []
    layers(layer=[None, 0, 1, 2, None])(growth)
    growth.axes["layer"] = {"old": 3, "new": 5, "lift": [[1, None], [3, 0], [1, None]], "kept": "1"}
    failing(growth, "axis layer", "a new layer at 0", "no norm stands before the first")


@pytest.mark.parametrize("projected", [24, 18])
def test_opt_350m_is_post_norm_and_projects_its_embeddings(projected: int) -> None:
    fields = {"do_layer_norm_before": False, "word_embed_proj_dim": projected}
    request = {"num_hidden_layers": 5, "hidden_size": 48, "num_attention_heads": 8}
    growth = grown("opt", fields, request, [1, 4])
    assert growth.certify().failures == []
    last = "model.decoder.layers.4.final_layer_norm.weight"
    # A head that reads the stream reads all its copies; one that reads what is projected does not.
    share = 2 if projected == 24 else 1
    source = growth.source["model.decoder.layers.2.final_layer_norm.weight"].repeat(2)
    assert torch.equal(growth.target[last], source / share)
    growth.times(last, 2.0)
    failing(growth, f"{last}[0]")
    with pytest.raises(RequestError, match="no norm stands before the first layer"):
        grown("opt", fields, {"num_hidden_layers": 4}, [0])


def test_what_opt_350m_cannot_do() -> None:
    fields = {"do_layer_norm_before": False, "word_embed_proj_dim": 18}
    with pytest.raises(RequestError, match="word_embed_proj_dim 18 -> 36: the tied head reads it"):
        grown("opt", fields, {"word_embed_proj_dim": 36})
    with pytest.raises(RequestError, match=r"hidden_size=36.*48"):
        grown("opt", fields, {"hidden_size": 36})
    with pytest.raises(RequestError, match="layer_norm_elementwise_affine"):
        grown("opt", {**fields, "layer_norm_elementwise_affine": False}, {"ffn_dim": 36})


def test_how_many_norms_a_layer_has() -> None:
    assert Stack(FAMILIES["bert"], "layer").norms == 2
    assert Stack(FAMILIES["bart"], "layer").norms == 2
    assert Stack(FAMILIES["bart"], "decoder_layer").norms == 3
    assert Stack(FAMILIES["modernbert"], "layer").empty and Stack(FAMILIES["llama"], "layer").empty
    assert not Stack(FAMILIES["electra"], "layer").first


def test_kept_gains() -> None:
    assert kept_gains(FAMILIES["bert"], {"layer": {"kept": "4"}}) == ({"layer": Factor.of(2)}, [])
    assert kept_gains(FAMILIES["bert"], {}) == ({}, [])
    assert kept_gains(FAMILIES["bert"], {"layer": {"kept": "1/0"}})[1]
