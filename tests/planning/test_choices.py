"""What a request chooses beside sizes: places of rotary pairs, experts and tokens that are never chosen; refusals."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from growformer.algebra import BARRED, HALVES, Field, Lift, Rotary, copies
from growformer.api import family_of
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.planning import Plan, apply, make_plan
from growformer.planning.choices import ROPES, Choices
from growformer.planning.resolve import resolve_growth
from growformer.planning.rotary import pair_places, rotary_config, turned_channels
from growformer.planning.sizes import resolve_sizes
from tests.planning.test_rotary import key

PAPER = METHODS["paper"]


@dataclass
class Grown:
    """A tiny stock model's random tensors, grown."""

    plan: Plan
    target: dict[str, torch.Tensor]


def grow(
    name: str, fields: dict[str, Any], request: dict[str, int], dtype: torch.dtype = torch.float32, **choices: str
) -> Grown:
    family = FAMILIES[name]
    raw = {"model_type": family.model_types[0], "architectures": [family.architectures[0]], **family.sample, **fields}
    generator = torch.Generator().manual_seed(3)
    source = {k: 0.3 * torch.randn(shape, generator=generator) for k, shape in stock_tensors(raw).items()}
    return grown(raw, {k: x.to(dtype) for k, x in source.items()}, request, **choices)


def grown(raw: dict[str, Any], source: dict[str, torch.Tensor], request: dict[str, int], **choices: str) -> Grown:
    full, defaults = full_config(raw)
    shapes = {name: tuple(x.shape) for name, x in source.items()}
    plan = make_plan(family_of(raw), PAPER, raw, full, defaults, shapes, request, choices=Choices(**choices))
    return Grown(plan, apply(plan, source))


@pytest.mark.parametrize("word", ["theta", "strided"])
def test_choices_are_recorded_where_they_are_no_default(word: str) -> None:
    assert Choices(rope=word).to_json() == ({} if word == "theta" else {"rope": word})
    with pytest.raises(RequestError, match=r"rope='spiral' is unknown; there are theta, strided, longrope"):
        Choices(rope="spiral")
    with pytest.raises(RequestError, match="new_tokens='shut' is unknown; there are open, closed"):
        Choices(new_tokens="shut")


# --- places of rotary pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_strided_pairs_keep_their_frequency_at_the_same_base(layout: str, times: int) -> None:
    old, new = 8, 8 * times
    places = pair_places(old, new, layout, strided=True)
    partner = {"half": old // 2, "interleaved": 1}[layout]
    for pair in range(old // 2):
        first = pair if layout == "half" else 2 * pair
        other = places[first + partner] - places[first]
        at = places[first] if layout == "half" else places[first] // 2
        assert other == (new // 2 if layout == "half" else 1)
        assert 100.0 ** (-2 * at / new) == pytest.approx(100.0 ** (-2 * pair / old), rel=1e-12)
    assert pair_places(8, 16) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_rope_fields_of_each_way() -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    full = {"rope_parameters": rope, "max_position_embeddings": 32}
    ways = {way: rotary_config(Rotary(), {}, full, key(8, 16), {}, way) for way in ROPES}
    assert ways["strided"][0] == {"rope_parameters": rope, "rope_theta": 100.0}
    assert ways["theta"][0]["rope_theta"] == 1e4
    listed = ways["longrope"][0]
    assert listed["rope_theta"] == 1.0 and listed["rope_scaling"]["rope_type"] == "longrope"
    assert listed["rope_parameters"]["short_factor"] == [100.0 ** (i / 4) for i in range(8)]
    # rope_scaling wins over rope_parameters where both are there, so the fraction stands in both.
    share = ways["proportional"][0]
    assert share["rope_theta"] == 1e4 and share["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert share["rope_scaling"] == {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    assert "llama.cpp" in ways["longrope"][1][-1] and "vLLM" in ways["longrope"][1][-1]
    assert "llama.cpp" in ways["proportional"][1][-1]
    assert not any("llama.cpp" in note for way in ("theta", "strided") for note in ways[way][1])


def test_new_pairs_of_a_proportional_head_do_not_turn() -> None:
    full = {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10.0, "partial_rotary_factor": 0.5}}
    assert turned_channels(Rotary(), 8, full) == [True, True, False, False, True, True, False, False]
    assert turned_channels(Rotary(layout="interleaved"), 8, full) == [True] * 4 + [False] * 4
    assert turned_channels(Rotary(), 8, {"rope_parameters": {"rope_theta": 10.0}}) == [True] * 8


@pytest.mark.parametrize(
    ("name", "fields", "request_", "way", "says"),
    [
        ("llama", {}, {"head_dim": 14}, "strided", r"no whole multiple of 10; head_dim=20 works"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0}},
         {"head_dim": 20}, "strided", "rounded to whole pairs.*truncate is false"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
         {"head_dim": 20}, "longrope", "under rope_type 'dynamic': it starts from default, linear, llama3, yarn"),
        ("gpt_oss", {}, {"head_dim": 20}, "proportional", "under rope_type 'yarn'"),
        ("gemma4_text", {}, {"head_dim": 20}, "longrope",
         "head_dim 10 -> 20: its config class measures a list of frequencies by one head size, .*rope='theta'"),
        ("phi", {}, {"head_dim": 12}, "longrope", "phi turns the first channels of a head only"),
        ("gpt2", {}, {"n_embd": 48}, "strided", "gpt2 has no rotary positions"),
        ("llama", {}, {"hidden_size": 36}, "strided", "says where rotary pairs go when head_dim grows, and it stays"),
    ],
)  # fmt: skip
def test_ways_that_a_family_cannot_take(
    name: str, fields: dict[str, Any], request_: dict[str, int], way: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        grow(name, fields, request_, rope=way)


# --- experts that are never chosen -----------------------------------------------------------------------------------


def routed(name: str, new: int, **fields: Any) -> tuple[Lift, bool, str, dict[str, int]]:
    family = FAMILIES[name]
    config = full_config({"model_type": name, **family.sample, **fields})[0]
    field = family.axes["experts"]
    assert isinstance(field, Field)
    sizes = resolve_sizes(family, config, {field.name: new})
    axis = resolve_growth(family, sizes, PAPER, tied=False).at("experts")
    return axis.lift, axis.barred, axis.dead, dict(sizes.fields)


def test_experts_of_any_number_are_barred_and_named_dead() -> None:
    lift, barred, dead, fields = routed("gpt_oss", 7)
    assert (lift, barred) == (Lift.place(5, range(5), 7), True)
    assert "2 new experts have a bias of -1e+30" in dead and "10 are copies" in dead
    assert "num_experts_per_tok" not in fields
    # Whole multiples stay copies, all of them alive.
    lift, barred, dead, fields = routed("gpt_oss", 10)
    assert (lift, barred, dead) == (copies(5, [*range(5)] * 2, HALVES), False, "") and fields[
        "num_experts_per_tok"
    ] == 6


def test_barred_experts_keep_old_groups_together() -> None:
    # 6 experts in 3 groups of 2: one more in each, or a group of their own.
    lift, barred, _, fields = routed("deepseek_v3", 9)
    assert lift == Lift.place(6, [0, 1, 3, 4, 6, 7], 9) and barred and "n_group" not in fields
    lift, barred, _, fields = routed("deepseek_v3", 8)
    assert lift == Lift.place(6, range(6), 8) and barred and fields["n_group"] == 4 and "topk_group" not in fields
    with pytest.raises(RequestError, match=r"groups of 2.*n_routed_experts=8 or n_routed_experts=9 works"):
        routed("deepseek_v3", 7)
    with pytest.raises(RequestError, match="num_experts_per_tok=5 of 4 experts are chosen"):
        routed("deepseek_v3", 9, num_experts_per_tok=5)


def test_a_router_without_a_bias_takes_whole_copies_only() -> None:
    with pytest.raises(RequestError, match=r"has no bias.*num_local_experts=10 works"):
        routed("mixtral", 7)


def test_only_the_bias_of_new_experts_is_low() -> None:
    made = grow("gpt_oss", {}, {"num_local_experts": 7, "num_hidden_layers": 5})
    at = list(made.plan.layers["layer"]).index(None)
    old, new = (made.target[f"model.layers.{i}.mlp.router.bias"] for i in (0, at))
    assert old[5:].tolist() == [torch.tensor(BARRED).item()] * 2 and bool((old[:5].abs() < 10).all())
    # A new layer is closed already, and its experts are all alive.
    assert len(new) == 7 and bool((new.abs() < 10).all())
    # What is never read may be anything, so that an expert whose bias is raised by hand can learn at once.
    assert bool((made.target["model.layers.0.mlp.experts.down_proj"][5:] != 0).any())


# --- tokens that are never chosen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_closed_tokens_have_the_probability_zero_in_every_dtype(dtype: torch.dtype) -> None:
    bias = grow("phi", {}, {"vocab_size": 41}, dtype, new_tokens="closed").target["lm_head.bias"]
    assert bias.dtype == dtype and bool(bias.isfinite().all())
    lowest = max(BARRED, torch.finfo(dtype).min)
    assert bias[37:].tolist() == torch.tensor([lowest] * 4, dtype=torch.float64).to(dtype).tolist()
    assert bias.softmax(-1)[37:].tolist() == [0.0] * 4
    opened = grow("phi", {}, {"vocab_size": 41}, dtype)
    assert bool((opened.target["lm_head.bias"].softmax(-1)[37:] > 0).all())  # the control


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        ("llama", {"vocab_size": 41}, "the head of llama has no bias"),
        ("phi", {"hidden_size": 48}, r"no token is new; ask for vocab_size=\.\.\. as well"),
        ("electra", {"vocab_size": 70}, r"the checkpoint has none \(generator_lm_head.bias\)"),
    ],
)
def test_tokens_that_cannot_be_closed(name: str, request_: dict[str, int], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        grow(name, {}, request_, new_tokens="closed")


def test_a_barred_bias_is_no_measure_of_what_is_drawn_next() -> None:
    """Grown again, with tokens open: the new bias is drawn like the old numbers, not like -1e30."""
    made = grow("phi", {}, {"vocab_size": 41}, new_tokens="closed")
    again = grown(dict(made.plan.target_config), made.target, {"vocab_size": 50}).target["lm_head.bias"]
    assert bool((again[41:].abs() < 10).all()) and bool((again[37:41] < -1e29).all())
