"""The growth of every axis: places of layers, heads with their slopes, keys under norms, streams."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import (
    HALVES,
    ONE,
    Attention,
    Experts,
    Factor,
    Family,
    Lift,
    Norm,
    Rotary,
    Run,
    Way,
    copies,
    replace,
)
from growformer.errors import RequestError
from growformer.methods import METHODS
from growformer.planning.heads import alibi_places, head_growth, slopes
from growformer.planning.resolve import key_growth, layer_growth, normed_growth, pair_places, resolve_growth, spread
from growformer.planning.sizes import Sizes
from tests.planning.tiny_families import family, matrix

PAPER = METHODS["paper"]

# --- layers ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40))
def test_new_layers_spread_evenly_each_after_an_old_one(old: int, extra: int) -> None:
    places = spread(old, old + extra)
    growth = layer_growth(old, old + extra, None, PAPER.ways["layer"])
    assert [i for i, source in enumerate(growth.sources) if source is None] == places
    assert [source for source in growth.sources if source is not None] == list(range(old))
    assert growth.sources[0] == 0 and growth.sources[-1] is None  # none before the first; the last is new
    behind = [sum(1 for i in places if growth.like[i] == layer) for layer in range(old)]
    assert max(behind) - min(behind) <= 1


def test_layers_where_they_are_told() -> None:
    growth = layer_growth(3, 6, [0, 4, 5], PAPER.ways["layer"], "decoder_layer")
    assert growth.axis == "decoder_layer"
    assert growth.sources == [None, 0, 1, 2, None, None]
    assert growth.like == (0, 0, 1, 2, 2, 2)  # a new layer is like the one before it, or like the first


@pytest.mark.parametrize("places", [[0], [0, 0], [0, 6], [-1, 0], [0, 1, 2]])
def test_other_places_are_refused(places: list[int]) -> None:
    with pytest.raises(RequestError, match="2 different numbers from 0 to 5"):
        layer_growth(4, 6, places, PAPER.ways["layer"])


# --- heads -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_every_query_keeps_its_keys(kv: int, group: int, more_kv: int, more_group: int, copies: int) -> None:
    new_kv, new_group = kv * copies + more_kv - 1, more_group
    if new_kv < kv * max(copies, -(-group // new_group)):
        return  # not enough places; planning says so in the words of config.json
    queries, pairs = head_growth((kv * group, kv), (new_kv * new_group, new_kv), copies)
    assert sorted(q for q in queries if q is not None) == list(range(kv * group))
    for place, query in enumerate(queries):
        if query is not None:
            assert pairs[place // new_group] == query // group
    for old in range(kv):
        assert pairs.count(old) >= copies


# --- linear biases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_slopes_are_transformers_own(kind: str) -> None:
    for heads in range(1, 65):
        if kind == "bloom":
            from transformers.models.bloom.modeling_bloom import build_alibi_tensor

            # Token 1's bias is its distance to token 0 times the slope.
            table = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        else:
            from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

            table = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
        wanted = torch.tensor([2.0 ** -float(e) for e in slopes(kind, heads)])
        # The tables are powers in float32, 1.1e-6 off at most; the next slope is 1/16 of an octave away.
        assert table.shape == wanted.shape and bool(((table / wanted).log2().abs() < 1e-5).all())


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
@given(data=st.data())
def test_old_heads_sit_where_their_slope_is(kind: str, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, 60))
    new = data.draw(st.integers(old, 140))
    places = alibi_places(kind, old, new)
    assert len(places) == new and sorted(p for p in places if p is not None) == list(range(old))
    before, after = slopes(kind, old), slopes(kind, new)
    assert all(after[j] == before[i] for j, i in enumerate(places) if i is not None)


def test_the_families_page_s_own_examples() -> None:
    places = alibi_places("bloom", 8, 16)
    assert [j for j, i in sorted(enumerate(places), key=lambda x: (x[1] is None, x[1])) if i is not None] == [
        *range(1, 16, 2)
    ]
    twelve = alibi_places("bloom", 12, 16)
    assert [twelve.index(i) for i in range(12)] == [1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6]


ALIBI = family(("hidden", "heads", "kv_heads", "key", "value"), {}, {}, Attention(alibi="bloom", kv_heads="kv_heads"))


def sizes(model: Family, old: dict[str, int], **new: int) -> Sizes:
    old = {axis: old.get(axis, 2) for axis in model.axes}
    return Sizes(old, {**old, **new}, {}, ())


def test_linear_biases_and_groups_do_not_go_together() -> None:
    with pytest.raises(RequestError, match="so do groups; heads stay"):
        resolve_growth(ALIBI, sizes(ALIBI, {"heads": 4}, heads=6), PAPER, tied=False)
    growth = resolve_growth(ALIBI, sizes(ALIBI, {"heads": 4}, hidden=6), PAPER, tied=False)
    assert growth.at("heads").is_identity


def test_heads_of_their_own_keys_move_together() -> None:
    model = replace(ALIBI, attention=Attention(alibi="bloom"))
    growth = resolve_growth(model, sizes(model, {"heads": 4}, heads=8), PAPER, tied=False)
    assert growth.at("heads").sources == [None, 0, None, 1, None, 2, None, 3]


# --- keys ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 40))
def test_rotary_pairs_stay_pairs(half: int, extra: int) -> None:
    old, new = 2 * half, 2 * (half + extra)
    places = pair_places(old, new)
    for i in range(half):
        assert (places[i], places[i + half]) == (i, i + new // 2)


def keyed(kind: str = "", rotary: Rotary | None = None, **norm: Any) -> Family:
    norms = {role: Norm("key", kind, eps="eps", **norm) for role in "qk"} if kind else {}  # type: ignore[arg-type]
    return family(("hidden", "heads", "key", "value"), {}, norms, Attention(rotary=rotary))


@given(st.integers(1, 12), st.integers(0, 60), st.booleans())
def test_copied_keys_weigh_the_same_and_turn_as_before(half: int, extra: int, rotary: bool) -> None:
    old, new = 2 * half, 4 * half + 2 * extra
    growth = key_growth(keyed("rms", Rotary() if rotary else None), "key", old, new, PAPER.ways["key"])
    e = matrix(old, growth.lift.to_json()) * float(growth.scale)
    assert e.shape == (new, old)
    # Each channel's copies have one energy, and all of them the mean square of before: the norm sees nothing.
    energy = (e * e).sum(0) * old / new
    assert torch.allclose(energy, torch.ones(old, dtype=torch.float64), rtol=1e-12, atol=0)
    assert growth.energy == 1
    assert ((e != 0).sum(1) == 1).all()
    # The channels that are read stand where they turn as before, times the scale alone.
    places = pair_places(old, new) if rotary else list(range(old))
    assert all(e[place, i] == float(growth.scale) for i, place in enumerate(places))
    kept = [run for at, run in growth.lift.spans() if run.back is not None for _ in range(run.count)]
    assert len(kept) == old
    if rotary:
        # A copy turns as a pair: channel i beside i + new/2.
        sources = growth.sources
        assert all((sources[i] or 0) + old // 2 == sources[i + new // 2] for i in range(new // 2))


def test_keys_under_a_norm_below_twice_are_zeros_and_dead() -> None:
    growth = key_growth(keyed("rms"), "key", 6, 9, PAPER.ways["key"])
    assert growth.lift == Lift.place(6, range(6), 9) and growth.closed == "writers"
    assert growth.scale == Factor.sqrt(9, 6) and growth.energy == 1
    assert "key_size=12 is alive" in growth.dead


@pytest.mark.parametrize(("new", "works"), [(8, 12), (9, 12), (13, 18), (11, 12), (19, 24)])
def test_keys_under_a_layer_norm_grow_by_whole_heads(new: int, works: int) -> None:
    with pytest.raises(RequestError, match=rf"whole copies of the head; {works} works"):
        key_growth(keyed("layer"), "key", 6, new, PAPER.ways["key"])
    growth = key_growth(keyed("layer"), "key", 6, works, PAPER.ways["key"])
    assert growth.scale == ONE and growth.dead == ""
    assert {run.factor for run in growth.lift.runs} == {ONE}


@pytest.mark.parametrize(
    ("rotary", "lift"),
    [
        (None, Lift.place(4, range(4), 6)),
        (Rotary(), Lift.place(4, [0, 1, 3, 4], 6)),
        (Rotary(layout="interleaved"), Lift.place(4, range(4), 6)),
        (Rotary(partial="pct"), Lift.place(4, range(4), 6)),
        (Rotary(turned="rotary_dim"), Lift.place(4, range(4), 6)),
    ],
)
def test_keys_without_a_norm(rotary: Rotary | None, lift: Lift) -> None:
    growth = key_growth(keyed("", rotary), "key", 4, 6, PAPER.ways["key"])
    assert (growth.lift, growth.closed, growth.scale) == (lift, "readers", ONE)


def test_rotary_of_another_axis_places_nothing() -> None:
    model = family(("hidden", "nope", "rope", "value"), {}, {}, Attention(key=("nope", "rope"), rotary=Rotary("rope")))
    assert key_growth(model, "nope", 4, 6, PAPER.ways["key"]).lift == Lift.place(4, range(4), 6)
    assert key_growth(model, "rope", 4, 6, PAPER.ways["key"]).lift == Lift.place(4, [0, 1, 3, 4], 6)


# --- streams and the rest --------------------------------------------------------------------------------------------


def normed(*norms: Norm, **facts: Any) -> Family:
    named = {f"n{i}": norm for i, norm in enumerate(norms)}
    return family(("hidden", "heads", "key", "value", "mlp"), {}, named, Attention(), **facts)


@pytest.mark.parametrize(
    ("norms", "lift", "scale"),
    [
        ([Norm("hidden", "rms", "eps")], Lift.place(4, range(4), 6), ONE),
        ([Norm("hidden", "layer", "eps")], Lift(4, (Run(4, 0), Run(2, 0, back=None, mean=4))), ONE),
        ([Norm("hidden", "rms", 1e-6)], Lift.place(4, range(4), 6), Factor.sqrt(6, 4)),
        ([Norm("hidden", "rms", "eps"), Norm("key", "rms", "eps")], Lift.place(4, range(4), 6), Factor.sqrt(6, 4)),
        ([Norm("hidden", "rms", "eps"), Norm("key", "rms", "other")], Lift.place(4, range(4), 6), ONE),
        # One LayerNorm among RMSNorms makes the mean be carried.
        (
            [Norm("hidden", "rms", "eps"), Norm("hidden", "layer", 1e-5)],
            Lift(4, (Run(4, 0), Run(2, 0, back=None, mean=4))),
            Factor.sqrt(6, 4),
        ),
    ],
)
def test_a_stream_is_lifted_as_its_norms_ask(norms: list[Norm], lift: Lift, scale: Factor) -> None:
    growth = normed_growth(normed(*norms), "hidden", 4, 6, PAPER.ways["hidden"])
    assert (growth.lift, growth.scale, growth.closed, growth.heard) == (lift, scale, "writers", False)
    assert growth.energy == scale.square * Fraction(4, 6)


def test_a_copied_stream_is_heard_and_keeps_its_energy() -> None:
    model = normed(Norm("hidden", "layer", 1e-5), copied={"hidden": "so it is"})
    growth = normed_growth(model, "hidden", 4, 12, PAPER.ways["hidden"])
    assert (growth.lift, growth.scale, growth.heard) == (copies(4, [0, 1, 2, 3] * 3, HALVES), ONE, True)
    assert growth.energy == 1
    same = normed_growth(model, "hidden", 4, 4, PAPER.ways["hidden"])
    assert same.is_identity and not same.heard


def test_an_axis_that_a_norm_reads_is_closed_at_its_writers() -> None:
    with pytest.raises(RequestError, match="a norm reads hidden"):
        normed_growth(normed(Norm("hidden", "rms", "eps")), "hidden", 4, 6, Way(closed="readers"))


def test_every_axis_by_what_the_family_says_of_it() -> None:
    model = family(
        ("vocab", "positions", "hidden", "rank", "experts", "plain", "heads", "key", "value"),
        {},
        {"pre": Norm("hidden", "rms", "eps"), "rank": Norm("rank", "layer", "other")},
        Attention(),
        experts=Experts(),
        copied={"plain": "so it is"},
    )
    grown = resolve_growth(model, sizes(model, {}, **dict.fromkeys(model.axes, 4)), PAPER, tied=True, headed=True)
    padded, copied = Lift.place(2, range(2), 4), copies(2, [0, 1, 0, 1], HALVES)
    assert {axis.axis: axis.lift for axis in grown} == {
        "vocab": padded,
        "positions": padded,
        "hidden": padded,
        "rank": Lift(2, (Run(2, 0), Run(2, 0, back=None, mean=2))),
        "experts": copied,
        "plain": copied,
        "heads": padded,
        "key": padded,
        "value": padded,
        "layer": Lift.place(2, [0, 2], 4),
    }
    assert {axis.axis for axis in grown if axis.heard} == {"experts", "plain"}
    assert [axis.axis for axis in grown] == list(model.axes)
    assert grown.tied and grown.headed


def test_groups_beside_their_keys_cannot_be_split() -> None:
    attention = Attention(kv_heads="kv_heads", group="group")
    model = family(("hidden", "heads", "kv_heads", "group", "key", "value"), {}, {}, attention)
    old = {"heads": 4, "kv_heads": 2}
    with pytest.raises(RequestError, match="groups cannot be split"):
        resolve_growth(model, sizes(model, old, kv_heads=4, group=1), PAPER, tied=False)
    growth = resolve_growth(model, sizes(model, old, heads=9, kv_heads=3, group=3), PAPER, tied=False)
    assert growth.at("group").lift == Lift.place(2, range(2), 3)
    assert growth.at("heads").sources == [0, 1, None, 2, 3, None, None, None, None]
    assert growth.at("kv_heads").sources == [0, 1, None]


def test_one_norm_over_all_heads_prefers_copies() -> None:
    norms = {"q": Norm(("heads", "key"), "rms", "eps"), "k": Norm(("kv_heads", "key"), "rms", "eps")}
    model = family(("hidden", "heads", "kv_heads", "key", "value"), {}, norms, Attention(kv_heads="kv_heads"))
    old = {"heads": 4, "kv_heads": 2}
    copied = resolve_growth(model, sizes(model, old, heads=8, kv_heads=4), PAPER, tied=False).at("kv_heads")
    assert copied.sources == [0, 0, 1, 1] and copied.dead == "" and copied.energy == 1
    zeros = resolve_growth(model, sizes(model, old, heads=6, kv_heads=3), PAPER, tied=False).at("kv_heads")
    assert zeros.sources == [0, 1, None] and "copies (4) are alive" in zeros.dead
    bare = replace(model, norms={})
    plain = resolve_growth(bare, sizes(bare, old, heads=8, kv_heads=4), PAPER, tied=False).at("kv_heads")
    assert plain.sources == [0, 1, None, None] and plain.dead == ""
