"""Requests: what they may say, what moves along, and what is refused with the nearest request that works."""

from collections.abc import Mapping
from typing import Any

import pytest

from growformer.algebra import Attention, Divides, Experts, Family, Field, Norm, Ratio, Rotary, Size, Times, replace
from growformer.errors import RequestError
from growformer.planning.sizes import Sizes, growable, read_request, resolve_sizes, size_of
from tests.planning.tiny_families import family

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
HEADS: dict[str, Size] = {axis: Field(f"{axis}_size") for axis in ("hidden", "mlp", "heads", "kv_heads")}
HEADS |= {axis: Field("head_dim") for axis in ("key", "value")}
RATIO: dict[str, Size] = {
    **HEADS,
    "key": Ratio("hidden_size", "heads_size"),
    "value": Ratio("hidden_size", "heads_size"),
}
GROUPED = family(HEADS, {}, {}, Attention(kv_heads="kv_heads"))
RATIOS = family(RATIO, {}, {}, Attention(kv_heads="kv_heads"))
CONFIG: dict[str, Any] = {
    "hidden_size": 24,
    "mlp_size": 10,
    "heads_size": 4,
    "kv_heads_size": 2,
    "head_dim": 6,
    "layer_size": 3,
    "rope_parameters": ROPE["rope_parameters"],
}


def ask(model: Family, config: Mapping[str, Any] | None = None, **request: Any) -> Sizes:
    return resolve_sizes(model, {**CONFIG, **(config or {})}, request)


def refused(model: Family, config: Mapping[str, Any] | None = None, **request: Any) -> str:
    with pytest.raises(RequestError) as raised:
        ask(model, config, **request)
    return str(raised.value)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (Field("a"), 5),
        (Field("part.b"), 6),
        (Field("none", default=Field("a")), 5),
        (Field("none", default=Times(4, "a")), 20),
        (Ratio("part.b", "two"), 3),
        (Times("two", "a"), 10),
        (Times("half", "a"), 2),  # a field that is no whole number, as transformers rounds it
        (Field("a", default=Field("two")), 5),
    ],
)
def test_size_of(size: Size, value: int) -> None:
    assert size_of(size, {"a": 5, "part": {"b": 6}, "none": None, "two": 2, "half": 0.5}) == value


@pytest.mark.parametrize("value", [None, 0, -3, True, 2.0, "7"])
def test_a_size_in_a_config_is_a_positive_whole_number(value: object) -> None:
    with pytest.raises(RequestError, match="a should be a positive whole number"):
        size_of(Field("a"), {"a": value})


# --- requests --------------------------------------------------------------------------------------------------------


def test_what_can_be_asked_is_each_field_once_and_multiples() -> None:
    model = replace(GROUPED, axes={**HEADS, "mlp": Times("mlp_ratio", "hidden_size"), "inner": Times(4, "hidden_size")})
    assert growable(model) == ["hidden_size", "mlp_ratio", "heads_size", "kv_heads_size", "head_dim"]


@pytest.mark.parametrize(("value", "number"), [(8, 8), ("8", 8), ("008", 8)])
def test_a_number_may_be_written(value: object, number: int) -> None:
    assert read_request(GROUPED, {"mlp_size": value}) == {"mlp_size": number}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "nothing was asked; tiny grows by hidden_size=SIZE, mlp_size=SIZE"),
        ({"mlp_size": 1.5}, "mlp_size=1.5: a size is a whole number"),
        ({"mlp_size": True}, "mlp_size=True: a size is a whole number"),
        ({"mlp_size": "1e3"}, "mlp_size=1e3: a size is a whole number"),
        ({"mlp_size": 0}, "mlp_size=0: a size is a positive whole number"),
        ({"mlp_size": "-4"}, "mlp_size=-4: a size is a positive whole number"),
        ({"mpl_size": 4}, "unknown key mpl_size: did you mean mlp_size?"),
        ({"intermediate_size": 4}, "unknown key intermediate_size: did you mean mlp_size?"),
        ({"n_embd": 4}, "did you mean hidden_size?"),
        ({"zzz": 4}, "unknown key zzz: tiny grows by hidden_size, mlp_size"),
    ],
)
def test_bad_requests(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_request(GROUPED, request_)
    assert str(raised.value).startswith(said) or said in str(raised.value)


def test_a_size_that_no_field_holds_is_asked_for_by_what_makes_it() -> None:
    with pytest.raises(RequestError) as raised:
        read_request(RATIOS, {"head_dim": 8})
    assert "its head size is hidden_size / heads_size; ask for hidden_size=... and the head size follows" in str(
        raised.value
    )


def test_a_request_that_changes_nothing_or_takes_away() -> None:
    assert "mlp_size=10 is the source's own size" in refused(GROUPED, mlp_size=10)
    assert "mlp_size=9 is smaller than the source's 10; growing never takes away" in refused(GROUPED, mlp_size=9)
    assert "layer_size=5000: at most 4096 is planned" in refused(GROUPED, layer_size=5000)
    assert "mlp_size=262145: at most 262144 is planned" in refused(GROUPED, mlp_size=2**18 + 1)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_one_field_of_two_axes_moves_both() -> None:
    sizes = ask(GROUPED, head_dim=9)
    assert (sizes.new["key"], sizes.new["value"], sizes.fields["head_dim"]) == (9, 9, 9)
    assert sizes.moved == ()


def test_key_value_heads_that_are_as_many_as_heads_stay_so() -> None:
    sizes = ask(GROUPED, {"kv_heads_size": 4}, heads_size=6)
    assert sizes.new["kv_heads"] == sizes.fields["kv_heads_size"] == 6
    assert sizes.moved == (
        "kv_heads_size 4 -> 6: every head has its own keys and values, and so do the new ones "
        "(ask kv_heads_size=4 to share the old ones)",
    )
    assert ask(GROUPED, heads_size=6).new["kv_heads"] == 2


@pytest.mark.parametrize(
    ("config", "request_", "said", "works"),
    [
        (
            {},
            {"heads_size": 5},
            "heads_size=5 is no multiple of kv_heads_size=2",
            "heads_size=6 or kv_heads_size=5",
        ),
        (
            {},
            {"kv_heads_size": 3},
            "heads_size=4 is no multiple of kv_heads_size=3",
            "heads_size=6 or kv_heads_size=4",
        ),
        # Groups of 3 become groups of 2: both old keys must be there twice, and 3 places are not enough.
        (
            {"heads_size": 6},
            {"kv_heads_size": 3},
            "heads_size=6 with kv_heads_size=3 leaves 2 query heads to a key/value head, where the source has 3: each "
            "old key/value head must be copied 2 times",
            "kv_heads_size=6 or heads_size=9",
        ),
        (
            {"heads_size": 8},
            {"heads_size": 9, "kv_heads_size": 3},
            "leaves 3 query heads to a key/value head, where the source has 4: each old key/value head must be copied "
            "2 times",
            "kv_heads_size=9 or heads_size=12",
        ),
    ],
)
def test_groups_and_their_repairs(config: dict[str, int], request_: dict[str, int], said: str, works: str) -> None:
    message = refused(GROUPED, config, **request_)
    assert said in message
    assert message.endswith(f"; {works} works with the rest of the request")
    # What is said to work does.
    for repair in works.split(" or "):
        name, number = repair.split("=")
        assert ask(GROUPED, config, **{**request_, name: int(number)}).fields[name] == int(number)


def test_a_group_of_one_has_places_for_all() -> None:
    assert ask(GROUPED, heads_size=6, kv_heads_size=6).new["kv_heads"] == 6


# --- ratios and multiples --------------------------------------------------------------------------------------------


def test_more_heads_of_the_old_size_widen_the_stream() -> None:
    sizes = ask(RATIOS, heads_size=6)
    assert sizes.new == {**sizes.old, "heads": 6, "hidden": 36}
    assert sizes.moved == ("hidden_size 24 -> 36: it is heads_size x the head size, which stays 6",)


def test_a_wider_stream_makes_larger_heads() -> None:
    sizes = ask(RATIOS, hidden_size=36)
    assert (sizes.new["key"], sizes.new["value"]) == (9, 9)
    assert sizes.moved == (
        "head size 6 -> 9 (key and value): it is hidden_size / heads_size; hidden_size=36 with heads_size=6 would keep "
        "it",
    )
    # Where no number of heads would, nothing is suggested.
    assert ask(RATIOS, hidden_size=28).moved == ("head size 6 -> 7 (key and value): it is hidden_size / heads_size",)


@pytest.mark.parametrize(
    ("request_", "said", "works"),
    [
        ({"hidden_size": 30}, "hidden_size=30 is no multiple of heads_size=4", "hidden_size=32"),
        (
            {"hidden_size": 24, "heads_size": 6},
            "makes the head size 4, smaller than the source's 6",
            "hidden_size=36",
        ),
    ],
)
def test_ratios_and_their_repairs(request_: dict[str, int], said: str, works: str) -> None:
    message = refused(RATIOS, None, **request_)
    assert said in message and message.endswith(f"; {works} works with the rest of the request")


def test_a_multiple_follows_its_field() -> None:
    model = family(
        {**HEADS, "mlp": Times(4, "hidden_size"), "inner": Field("none", default=Times(4, "hidden_size"))}, {}
    )
    sizes = resolve_sizes(model, {**CONFIG, "none": None}, {"hidden_size": 30})
    assert (sizes.new["mlp"], sizes.new["inner"], sizes.fields["none"]) == (120, 96, 96)
    assert sizes.moved == (
        "mlp size 96 -> 120: it is 4 x hidden_size",
        "none is written as 96; config.json left it to follow another field",
    )


def test_a_multiple_whose_number_is_a_field_grows_by_it() -> None:
    model = family({**HEADS, "mlp": Times("ratio", "hidden_size")}, {})
    sizes = resolve_sizes(model, {**CONFIG, "ratio": 4}, {"ratio": 5})
    assert sizes.new["mlp"] == 120 and sizes.fields["ratio"] == 5
    assert sizes.moved == ("mlp size 96 -> 120: it is ratio x hidden_size",)


def test_more_groups_bring_their_query_heads() -> None:
    axes: dict[str, Size] = {**HEADS, "group": Ratio("heads_size", "kv_heads_size")}
    model = family(axes, {}, {}, Attention(kv_heads="kv_heads", group="group"))
    sizes = ask(model, kv_heads_size=3)
    assert (sizes.new["heads"], sizes.new["group"], sizes.fields["heads_size"]) == (6, 2, 6)
    assert sizes.moved == ("heads_size -> 6: a new group comes with its query heads",)
    both = ask(model, kv_heads_size=3, heads_size=9)
    assert (both.new["group"], both.moved) == (3, ())


# --- what must be a multiple -----------------------------------------------------------------------------------------

MIXTURE = family(
    {**HEADS, "experts": Field("experts_size")},
    {},
    experts=Experts(chosen="chosen", groups=("groups", "part.best"), requires={"normed": True}),
)
EXPERTS = {"experts_size": 6, "chosen": 2, "groups": 3, "part": {"best": 1}, "normed": True}


def test_copies_of_experts_multiply_what_counts_them() -> None:
    sizes = ask(MIXTURE, EXPERTS, experts_size=18)
    assert sizes.new["experts"] == 18
    counts = {name: sizes.fields[name] for name in ("chosen", "groups", "part.best")}
    assert counts == {"chosen": 6, "groups": 9, "part.best": 3}
    assert sizes.moved == tuple(
        f"{name}: every expert is there 3 times" for name in ("chosen 2 -> 6", "groups 3 -> 9", "part.best 1 -> 3")
    )
    assert ask(MIXTURE, EXPERTS, mlp_size=11).moved == ()


@pytest.mark.parametrize(("asked", "works"), [(7, 12), (13, 18), (17, 18)])
def test_other_numbers_of_experts_are_refused(asked: int, works: int) -> None:
    assert refused(MIXTURE, EXPERTS, experts_size=asked) == (
        f"experts_size={asked}: experts grow by whole copies of all of them, for a router's weights must add up (and "
        f"it has no bias that could keep new ones from being chosen); "
        f"experts_size={works} works with the rest of the request"
    )


def test_copies_of_experts_need_weights_that_add_up() -> None:
    message = refused(MIXTURE, {**EXPERTS, "normed": False}, experts_size=12)
    assert "normed=False; they are exact with True; experts_size stays 6" in message
    assert ask(MIXTURE, {**EXPERTS, "normed": False}, mlp_size=11).new["mlp"] == 11


def test_copied_axes_and_their_repair() -> None:
    model = family(HEADS, {}, copied={"hidden": "a norm is in the way"})
    assert ask(model, hidden_size=48).new["hidden"] == 48
    assert refused(model, hidden_size=36) == (
        "hidden_size=36: a norm is in the way, so only whole copies of its channels are exact; "
        "hidden_size=48 works with the rest of the request"
    )


def test_a_repair_may_need_another() -> None:
    """Five heads of the old size make 30 channels, 48 are no multiple of 5 heads, and six heads stay refused at 36."""
    model = replace(RATIOS, copied={"hidden": "a norm is in the way"})
    message = refused(model, {"kv_heads_size": 4}, heads_size=5)
    assert message == (
        "hidden_size=30: a norm is in the way, so only whole copies of its channels are exact; "
        "heads_size=6, hidden_size=72 works with the rest of the request"
    )
    assert ask(model, {"kv_heads_size": 4}, heads_size=6, hidden_size=72).new["hidden"] == 72


def test_rules_of_the_config_class() -> None:
    model = family(HEADS, {}, rules=(Divides(by="heads_size", over="hidden_size"),))
    assert refused(model, hidden_size=26) == (
        "hidden_size=26 is no multiple of heads_size=4, which tiny's config class refuses; "
        "hidden_size=28 or heads_size=13 works with the rest of the request"
    )
    said = refused(model, {"hidden_size": 26}, mlp_size=11)
    assert said == "config.json: hidden_size=26 is no multiple of heads_size=4; no tiny has such sizes"


# --- followers -------------------------------------------------------------------------------------------------------


def test_a_field_that_repeats_another_grows_with_it() -> None:
    model = replace(GROUPED, follows={"again": "heads_size"})
    sizes = ask(model, {"again": 4}, heads_size=6)
    assert sizes.fields["again"] == 6 and sizes.moved == ("again -> 6: it repeats heads_size",)
    # It is written in any case: left out, it may have another field's default.
    unmoved = ask(model, {"again": 4}, mlp_size=11)
    assert unmoved.fields["again"] == 4 and unmoved.moved == ()
    assert "again repeats heads_size; ask for heads_size=... and it follows" in refused(model, {"again": 4}, again=6)
    assert refused(model, {"again": 3}, mlp_size=11) == (
        "config.json: again=3 is other than heads_size=4, and no fact of tiny says what growth must do about it"
    )


# --- rotary ----------------------------------------------------------------------------------------------------------


def rotary(rotary: Rotary, qk: bool = False) -> Family:
    norms = {"q": Norm("key", "rms", eps="eps")} if qk else {}
    return family(HEADS, {}, norms, Attention(kv_heads="kv_heads", rotary=rotary))


def test_pairs_turn_so_sizes_are_even() -> None:
    message = refused(rotary(Rotary()), head_dim=9)
    assert message == (
        "head_dim=9: rotary positions turn channels in pairs; head_dim=10 works with the rest of the request"
    )
    assert refused(rotary(Rotary(), qk=True), head_dim=9).endswith("head_dim=12 works with the rest of the request")
    assert ask(rotary(Rotary(partial="pct")), head_dim=9).new["key"] == 9


@pytest.mark.parametrize("kind", ["longrope", "proportional", "unheard of"])
def test_types_without_a_steady_base(kind: str) -> None:
    rope = {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0}}
    assert f"under rope_type '{kind}' no new base keeps the old frequencies" in refused(
        rotary(Rotary()), rope, head_dim=8
    )
    assert ask(rotary(Rotary()), rope, mlp_size=11).new["mlp"] == 11
    partial = rotary(Rotary(partial="pct"))
    if kind == "longrope":
        assert ask(partial, rope, head_dim=8).new["key"] == 8
    else:
        assert f"rope_type '{kind}' turns by the whole head; it stays 6" in refused(partial, rope, head_dim=8)


def test_any_layer_type_s_rope_may_refuse() -> None:
    rope = {"rope_parameters": {"a": {"rope_theta": 2.0}, "b": {"rope_type": "longrope", "rope_theta": 2.0}}}
    assert "rope_type 'longrope'" in refused(rotary(Rotary()), rope, head_dim=8)


def test_a_base_beyond_float32_names_the_last_size_that_is_not() -> None:
    message = refused(rotary(Rotary()), {"rope_parameters": {"rope_theta": 1e6}}, head_dim=64)
    assert "rope_theta would become 1e+06^(64/6), beyond float32" in message
    assert message.endswith("; head_dim=38 works with the rest of the request")
