"""Two models of one family fused into one that is as wide as both together."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from method_kit import Model, stock, tokens
from torch import Tensor

import growformer as gf
from growformer.api.fused import half_of, measure
from growformer.api.planned import on_disk
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.methods.copied import DEEPFUSION
from growformer.planning import apply
from growformer.planning.fuse import Fuser, fuse_plan
from growformer.proof.bar import BAR
from growformer.proof.claim_changed import token_cost
from tests.tiny import build

DOUBLED: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4},
    "llama-tied-bias": {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 48, "n_inner": 192, "n_head": 8},
}
NARROW: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 36, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3},
    "gpt2": {"n_embd": 36, "n_inner": 50, "n_head": 6},
}
"""Other widths than the tiny models', with their head size and groups."""
NARROW["llama-tied-bias"] = NARROW["llama"]


def of(model: Any) -> Model:
    """A model's config and tensors."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return Model(config, {name: x.detach() for name, x in on_disk(model).items()})


def fuse(one: Any, other: Any) -> Any:
    return gf.fuse(one, other, allow_change=True)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@cache
def pair(kind: str) -> tuple[Model, Model, Model]:
    """Two models of unequal widths, and what is fused of them."""
    one, other = stock(kind), build(kind, seed=1, **NARROW[kind]).double()
    return of(one), of(other), of(fuse(one, other))


@pytest.mark.parametrize("kind", DOUBLED)
def test_a_model_fused_with_itself_is_its_self_fusion(kind: str) -> None:
    one = stock(kind)
    fused, doubled = fuse(one, one), gf.expand(one, method="deepfusion", **DOUBLED[kind])
    assert fused.config.to_dict() == doubled.config.to_dict()
    got, want = on_disk(fused), on_disk(doubled)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert relative(of(one).logits, of(fused).logits) <= BAR


@pytest.mark.parametrize("kind", DOUBLED)
def test_a_model_beside_its_wider_self_computes_what_it_does(kind: str) -> None:
    one = stock(kind)
    wider = gf.expand(one, method="deepfusion", **DOUBLED[kind])
    a, c = of(one), of(fuse(one, wider))
    assert c.config["n_embd" if kind == "gpt2" else "hidden_size"] == 72
    assert relative(a.logits, c.logits) <= BAR


@pytest.mark.parametrize("kind", DOUBLED)
def test_two_models_are_neither(kind: str) -> None:
    one, other, fused = pair(kind)
    # The control of every exact case here: what is not exact is far from it.
    assert relative((one.logits + other.logits) / 2, fused.logits) > 1e-2


def on_diagonal(fused: Tensor, one: Tensor, other: Tensor, factor: float = 1.0) -> None:
    """The tensor has the two blocks and zeros."""
    rows, columns = one.shape
    assert fused.shape == (rows + other.shape[0], columns + other.shape[1])
    assert torch.equal(fused[:rows, :columns], one * factor) and torch.equal(fused[rows:, columns:], other * factor)
    assert not fused[:rows, columns:].any() and not fused[rows:, :columns].any()


def test_the_blocks_of_a_llama() -> None:
    one, other, fused = (model.tensors for model in pair("llama"))
    layer = "model.layers.1."
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        on_diagonal(*(x[f"{layer}{name}.weight"] for x in (fused, one, other)))
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        on_diagonal(*(x[f"{layer}{name}.weight"] for x in (fused, one, other)))
    for name in ("model.embed_tokens.weight", "model.norm.weight", f"{layer}input_layernorm.weight"):
        assert torch.equal(fused[name], torch.cat([one[name], other[name]], -1))
    head = torch.cat([one["lm_head.weight"] / 2, other["lm_head.weight"] / 2], -1)
    assert torch.equal(fused["lm_head.weight"], head)


def test_the_blocks_of_a_tied_llama() -> None:
    one, other, fused = (model.tensors for model in pair("llama-tied-bias"))
    # The head reads through the embedding, which is whole; so the last norm gives half.
    assert torch.equal(
        fused["model.norm.weight"], torch.cat([one["model.norm.weight"], other["model.norm.weight"]]) / 2
    )
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.bias",
    ):
        assert torch.equal(fused[name], torch.cat([one[name], other[name]], -1))


def test_the_blocks_of_a_gpt2() -> None:
    one, other, fused = (model.tensors for model in pair("gpt2"))
    names = ("transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias")
    weights = [list(x[names[0]].T.chunk(3)) for x in (fused, one, other)]
    for blocks in zip(*weights, strict=True):  # queries, keys and values, each by themselves
        on_diagonal(*blocks)
    biases = [x[names[1]].chunk(3) for x in (one, other)]
    assert torch.equal(fused[names[1]], torch.cat([torch.cat(each) for each in zip(*biases, strict=True)]))
    for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        on_diagonal(*(x[f"transformer.h.1.{name}.weight"] for x in (fused, one, other)))
    for name in ("transformer.ln_f.weight", "transformer.ln_f.bias"):
        assert torch.equal(fused[name], torch.cat([one[name], other[name]]) / 2)


def shuffled(model: Any) -> Any:
    """The same Llama with its stream's channels in another order: equal mean squares at every norm."""
    other = build("llama").double()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, x in other.named_parameters():
            rows = name.endswith(("o_proj.weight", "down_proj.weight"))
            x.copy_(model.get_parameter(name)[order] if rows else model.get_parameter(name)[..., order]) if (
                x.shape[-1] == 24 or rows
            ) else x.copy_(model.get_parameter(name))
    return other


def test_equal_mean_squares_give_the_mean_of_both_logits() -> None:
    one = stock("llama")
    other = shuffled(one)
    with torch.no_grad():
        other.lm_head.weight.copy_(build("llama", seed=9).lm_head.weight)
    a, b, c = of(one), of(other), of(fuse(one, other))
    assert relative(a.logits, b.logits) > 0.1
    assert relative((a.logits + b.logits) / 2, c.logits) <= BAR
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    b, c = of(other), of(fuse(one, other))
    assert relative((a.logits + b.logits) / 2, c.logits) > 1e-3


@pytest.mark.parametrize("kind", DOUBLED)
def test_zero_blocks_are_alive(kind: str) -> None:
    fused = pair(kind)[2]
    zeros = {name: x == 0 for name, x in fused.tensors.items() if bool((x == 0).any())}
    assert sum(int(at.sum()) for at in zeros.values()) > 10_000
    dead = {name: int((fused.gradients[name][at] == 0).sum()) for name, at in zeros.items()}
    assert {name: count for name, count in dead.items() if count} == {}


def test_nothing_tells_the_halves_of_one_model_apart() -> None:
    def apart(fused: Model) -> float:
        gradient = fused.gradients["model.layers.1.self_attn.q_proj.weight"]
        return relative(gradient, gradient.roll((gradient.shape[0] // 2, gradient.shape[1] // 2), (0, 1)))

    assert apart(of(fuse(stock("llama"), stock("llama")))) <= BAR
    assert apart(of(fuse(stock("llama"), build("llama", seed=1).double()))) > 1e-2


def test_what_is_measured() -> None:
    one, other = stock("llama"), build("llama", seed=1, **NARROW["llama"]).double()
    found = measure(one, other, fuse(one, other), tokens())
    mean = (pair("llama")[0].logits + pair("llama")[1].logits) / 2
    assert found.relative == pytest.approx(relative(mean, pair("llama")[2].logits), rel=1e-5)
    wanted = tokens()[:, 1:].flatten()
    costs = [
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), wanted) for x in (mean, pair("llama")[2].logits)
    ]
    assert found.costs[2:] == pytest.approx([float(x) for x in costs], rel=1e-5)
    assert "from the mean of both models'" in found.text and found.to_json()["cost_fused"] == found.costs[3]
    bare = one.model, other.model, fuse(one.model, other.model)
    beside = measure(*bare, tokens())  # hidden states: one's beside the other's
    assert beside.apart is None and set(beside.costs) == {None} and beside.relative > 1e-2


def test_scores_of_labels_cost_no_token() -> None:
    ids, logits = tokens(), torch.zeros(3, 16, 37)
    assert token_cost({"logits": logits}, {"input_ids": ids}) == pytest.approx(math.log(37))
    assert token_cost({"logits": logits[..., :5]}, {"input_ids": ids}) is None


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "vocabulary": ("llama", {"vocab_size": 41}, r"vocab_size is 37 in the first model and 41 in the second"),
    "layers": ("llama", {"num_hidden_layers": 2}, r"num_hidden_layers is 3 in the first model and 2 in the second"),
    "head size": ("llama", {"head_dim": 12}, r"head_dim is 10 in the first model and 12 in the second"),
    "head size, no field": ("gpt2", {"n_embd": 32}, r"the head size is 6 in the first model and 8 in the second"),
    "positions": ("gpt2", {"n_positions": 64}, r"n_positions is 32 in the first model and 64"),
    "eps": ("llama", {"rms_norm_eps": 1e-5}, r"rms_norm_eps is 0.001 in the first model and 1e-05"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        r"rope_parameters.rope_theta is 10000.0 in the first model and 500000.0",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, r"hidden_act is 'silu' in the first model and 'gelu'"),
    "tied": ("llama", {"tie_word_embeddings": True}, r"tie_word_embeddings is False in the first model and True"),
    "groups": ("llama", {"num_key_value_heads": 4}, r"num_attention_heads / num_key_value_heads is 2 in .* and 1 in"),
    "biases": ("llama", {"attention_bias": True}, r"attention_bias is False in the first model and True"),
    "code that multiplies by a size": (
        "gemma",
        {"hidden_size": 36},
        r"hidden_size is 24 .* and 36",
    ),
    "a config class's rule": ("llama", {"hidden_size": 28}, r"hidden_size would be 52 and num_attention_heads 8"),
    "gains of heads": ("qwen3", {}, r"q_norm.weight has no channel that is one model's alone.*differs by up to"),
    "a router": ("mixtral", {}, r"gate.weight writes experts, which is not added up"),
    "slopes": ("bloom", {}, r"the first model cannot stand beside another bloom"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_fused_is_said(what: str) -> None:
    kind, changes, says = REFUSED[what]
    one, other = build(kind), build(kind, seed=1, **changes)
    with pytest.raises(RequestError, match=says):
        fuse(one, other)


def test_more_that_is_refused() -> None:
    one = build("llama")
    with pytest.raises(RequestError, match=r"compute what neither of them does.*allow_change=True"):
        gf.fuse(one, one)
    with pytest.raises(RequestError, match=r"model_type is 'llama' in the first model and 'qwen2' in the second"):
        fuse(one, build("qwen2"))
    with pytest.raises(RequestError, match=r"in torch.float32 and the second in torch.float64"):
        fuse(one, build("llama", seed=1).double())
    with pytest.raises(RequestError, match=r"architectures is \['LlamaForCausalLM'\] .* and \['LlamaModel'\]"):
        fuse(one, one.model)
    other = build("llama", seed=1, attention_dropout=0.1)
    with pytest.raises(RequestError, match=r"attention_dropout is 0.0 .* and 0.1 .*--ignore-field attention_dropout"):
        fuse(one, other)
    assert gf.fuse(one, other, allow_change=True, ignore_fields=["attention_dropout"]).config.attention_dropout == 0.0


def test_what_is_made_is_as_the_first() -> None:
    one, other = build("llama").to(torch.bfloat16).train(), build("llama", seed=1).to(torch.bfloat16)
    fused = fuse(one, other)
    assert fused.dtype == torch.bfloat16 and fused.training and type(fused) is type(one)
    assert fused.growformer_fusion.parameters == (
        one.num_parameters(), other.num_parameters(), fused.num_parameters()
    )  # fmt: skip


NOT_FUSED: Mapping[str, str] = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), "writes experts"),
    "gemma4_text": "writes layer, ple",
    "deepseek_v3": "writes q_rank",
    "tokenformer": "writes qkv_tokens",
    "falcon": "beside others that are not",
    **dict.fromkeys(("olmo2", "olmo3"), "a norm over all heads"),
    **dict.fromkeys(("bloom", "mpt"), "the slope that follows from a head's number"),
    "siglip": "normalised to length one",
    **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert", "deberta_v2"), "copies that every reader shares"),
    "siglip_vision_model": "copies that every reader shares",
}
"""Families whose tiny model is refused, and why."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_fused_with_itself_is_its_self_fusion(name: str) -> None:
    declared = FAMILIES[name]
    raw = {**declared.sample, "model_type": declared.model_types[0], "architectures": [declared.architectures[0]]}
    shapes = stock_tensors(raw)
    if declared.tied is not None and full_config(raw)[0].get(declared.tied.field):
        shapes.pop(declared.tied.head, None)
    half = half_of("one", raw, shapes)
    if name in NOT_FUSED:
        with pytest.raises(RequestError, match=NOT_FUSED[name]):
            fuse_plan(half, half, DEEPFUSION)
        return
    fusion = fuse_plan(half, half, DEEPFUSION)
    generator = torch.Generator().manual_seed(0)
    source = {disk: torch.randn(shape, generator=generator) for disk, shape in shapes.items()}

    def read(disk: str, rows: slice | None) -> Tensor:
        return source[disk] if rows is None else source[disk][rows]

    from growformer.planning import make_plan

    doubled = make_plan(
        half.family, DEEPFUSION, raw, half.full, half.defaults, shapes, dict(fusion.one.request), read=half.read
    )
    assert dict(doubled.target_config) == dict(fusion.target_config)
    fuser, want = Fuser(fusion, read, read), apply(doubled, source)
    fuser.require_alike()
    assert [disk for disk in want if not torch.equal(want[disk], fuser.tensor(disk))] == []
