"""The target's config.json: which fields are known, and what becomes of each."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import Attention, Experts, Family, Field, Frozen, Lift, Norm, Rotary, Tied, Times, replace
from growformer.errors import RequestError
from growformer.methods import METHODS
from growformer.planning.config import check_fields, known_fields, per_layer, target_config
from growformer.planning.growth import AxisGrowth
from growformer.planning.resolve import layer_growth, resolve_growth
from growformer.planning.sizes import resolve_sizes
from tests.planning.tiny_families import family

PAPER = METHODS["paper"]
AXES = ("hidden", "heads", "key", "value", "rank", "layer")
NORMS = {
    "pre": Norm("hidden", "rms", eps="eps"),
    "final": Norm("hidden", "rms", eps="eps"),
    "rank": Norm("rank", "rms", eps="part.rank_eps"),
    "bare": Norm("hidden", "rms", eps="eps"),
}
MODEL = family(AXES, {}, NORMS, Attention())
CONFIG: dict[str, Any] = {f"{axis}_size": 4 for axis in AXES} | {"eps": 0.25, "part": {"rank_eps": 0.5, "kept": 1}}


def target(
    model: Family, request: dict[str, int], full: dict[str, Any] | None = None, raw: dict[str, Any] | None = None
) -> dict[str, Any]:
    config = {**CONFIG, **(full or {})}
    sizes = resolve_sizes(model, config, request)
    growth = resolve_growth(model, sizes, PAPER, tied=False)
    return target_config(model, config if raw is None else raw, config, growth, sizes)[0]


# --- what is known ---------------------------------------------------------------------------------------------------

KNOWING = replace(
    MODEL,
    axes={**MODEL.axes, "mlp": Field("mlp_size", default=Times("ratio", "hidden_size"))},
    attention=Attention(rotary=Rotary(partial="pct", turned="rotary_dim")),
    experts=Experts(chosen="chosen", groups=("groups",), requires={"normed": True}),
    tied=Tied("head", "embed", norm="final", field="tie"),
    neutral=("act",),
    per_layer={"types": "each"},
    requires={"clip": None},
    optional={"bias": "has_bias"},
    follows={"again": "heads_size"},
    aliases={"old_name": "heads_size"},
    frozen=(Frozen(("key",), "no", unless={"scale": 1}),),
)


def test_every_fact_makes_its_fields_known() -> None:
    assert known_fields(KNOWING) == {
        *(f"{axis}_size" for axis in AXES),
        *("mlp_size", "ratio", "eps", "part.rank_eps", "pct", "rotary_dim", "chosen", "groups", "normed", "tie"),
        *("act", "types", "clip", "has_bias", "again", "old_name", "scale"),
    }


def refused(full: dict[str, Any], defaults: dict[str, Any], model: Family = MODEL) -> str:
    with pytest.raises(RequestError) as raised:
        check_fields(model, {**CONFIG, **full}, defaults)
    return str(raised.value)


def test_an_unknown_field_that_is_not_at_its_default_is_refused() -> None:
    assert refused({"twist": 3}, {"twist": 2}).startswith(
        "config.json: twist=3 is not tiny's default (2), and no fact of the family says what growth must do about it"
    )
    check_fields(MODEL, {**CONFIG, "twist": 2}, {"twist": 2})
    check_fields(MODEL, {**CONFIG, "twist": 3}, {})  # the class does not declare it, so no code reads it
    check_fields(replace(MODEL, neutral=("twist",)), {**CONFIG, "twist": 3}, {"twist": 2})
    check_fields(MODEL, {**CONFIG, "bos_token_id": 3}, {"bos_token_id": 2})


def test_the_fields_of_a_part_are_looked_at_one_by_one() -> None:
    part = {"rank_eps": 0.5, "twist": 3}
    assert refused({"part": part}, {"part": {"twist": 2}}).startswith("config.json: part.twist=3 is not")
    check_fields(MODEL, {**CONFIG, "part": part}, {"part": {"twist": 3}})
    check_fields(MODEL, {**CONFIG, "part": part}, {"part": None})
    # A part that no fact reaches into is one value.
    assert "other={'twist': 3}" in refused({"other": {"twist": 3}}, {"other": {"twist": 2}})


def test_a_required_field() -> None:
    model = replace(MODEL, requires={"clip": None, "part.mode": "x"})
    check_fields(model, {**CONFIG, "part": {**CONFIG["part"], "mode": "x"}}, {})
    assert "part.mode=None changes what tiny computes" in refused({}, {}, model)
    assert "only clip=None is" in refused({"clip": 1.0}, {}, model)


@pytest.mark.parametrize("eps", [None, "1e-5", float("inf"), float("nan"), -1e-5, 1])
def test_an_eps_is_a_number(eps: object) -> None:
    assert "an eps is a finite number" in refused({"eps": eps}, {})
    assert "part.rank_eps" in refused({"part": {"rank_eps": eps}}, {})
    check_fields(replace(MODEL, norms={"pre": Norm("hidden", "rms", eps=1e-6)}), {**CONFIG, "eps": eps}, {"eps": eps})


# --- what is written -------------------------------------------------------------------------------------------------


def test_nothing_else_changes() -> None:
    out = target(MODEL, {"key_size": 6})
    assert out == {**CONFIG, "key_size": 6}
    assert out is not CONFIG and CONFIG["key_size"] == 4


def test_each_eps_follows_its_own_axis() -> None:
    assert target(MODEL, {"hidden_size": 5})["eps"] == 0.25 * 4 / 5
    out = target(MODEL, {"rank_size": 8})
    assert (out["eps"], out["part"]) == (0.25, {"rank_eps": 0.25, "kept": 1})


def test_an_eps_for_several_axes_stays() -> None:
    model = replace(MODEL, norms={**NORMS, "rank": Norm("rank", "rms", eps="eps")})
    assert target(model, {"hidden_size": 8, "rank_size": 5})["eps"] == 0.25
    assert target(replace(MODEL, norms={"pre": Norm("hidden", "rms", eps=1e-6)}), {"hidden_size": 8})["eps"] == 0.25


def test_an_alias_is_kept_up_where_the_source_has_it() -> None:
    model = replace(MODEL, aliases={"n_embed": "hidden_size", "part.width": "hidden_size"})
    assert "n_embed" not in target(model, {"hidden_size": 8})
    raw = {**CONFIG, "n_embed": 4, "part": {**CONFIG["part"], "width": 4}}
    out = target(model, {"hidden_size": 8}, raw=raw)
    assert (out["n_embed"], out["part"]["width"], out["hidden_size"]) == (8, 8, 8)


def test_what_was_left_out_is_written() -> None:
    raw = {"hidden_size": 4}
    assert target(MODEL, {"rank_size": 8}, raw=raw)["part"] == {"rank_eps": 0.25}


# --- fields that speak of layers -------------------------------------------------------------------------------------

FOUR = layer_growth(2, 4, [0, 2], PAPER.ways["layer"])  # new, 0, new, 1


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("each", ["a", "b"], ["a", "a", "a", "b"]),
        ("numbers", [0], [0, 1, 2]),
        ("numbers", [1], [3]),
        ("numbers", [], []),
        ("first", 0, 0),
        ("first", 1, 3),
        ("first", 2, 4),
        ("runs", [[["a", "b"], 1]], [[["a", "a", "a", "b"], 1]]),
        ("runs", [[["a"], 1], [["b"], 1]], [[["a", "a", "a", "b"], 1]]),
    ],
)
def test_a_new_layer_is_like_the_one_before_it(kind: Any, value: Any, wanted: Any) -> None:
    assert per_layer(value, kind, FOUR) == wanted


def test_runs_are_counted_with_their_times() -> None:
    growth = layer_growth(5, 6, [3], PAPER.ways["layer"])
    value = [[["a", "b"], 2], [["c"], 1]]  # a b a b c
    assert per_layer(value, "runs", growth) == [[["a", "b", "a", "a", "b", "c"], 1]]


@given(st.integers(1, 6), st.integers(0, 6), st.data())
def test_the_kinds_say_the_same(old: int, extra: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, old + extra - 1), min_size=extra, max_size=extra, unique=True))
    growth = layer_growth(old, old + extra, places, PAPER.ways["layer"])
    marks = data.draw(st.lists(st.booleans(), min_size=old, max_size=old))
    each = per_layer(marks, "each", growth)
    assert [each[i] for i, source in enumerate(growth.sources) if source is not None] == marks
    assert per_layer([i for i, mark in enumerate(marks) if mark], "numbers", growth) == [
        i for i, mark in enumerate(each) if mark
    ]
    assert per_layer([[marks, 1]], "runs", growth) == [[each, 1]]
    leading = sum(marks)
    first = [i < leading for i in range(old)]
    assert per_layer(leading, "first", growth) == sum(per_layer(first, "each", growth))


def test_fields_of_layers_are_written_where_they_are_set() -> None:
    model = replace(MODEL, per_layer={"types": "each", "runs": "runs", "absent": "each"})
    full = {"types": list("abab"), "runs": [[["a", "b"], 2]], "absent": None}
    out = target(model, {"layer_size": 5}, full)
    assert out["types"] == list("ababb") and out["absent"] is None
    assert out["runs"] == [[list("ababb"), 1]]
    # Runs are rewritten only where layers move: the shorter form stays.
    assert target(model, {"key_size": 8}, full)["runs"] == full["runs"]


def test_an_identity_leaves_every_kind_alone() -> None:
    same = AxisGrowth("layer", Lift.identity(3), like=(0, 1, 2))
    assert per_layer(["a", "b", "c"], "each", same) == ["a", "b", "c"]
    assert per_layer([1], "numbers", same) == [1] and per_layer(2, "first", same) == 2
