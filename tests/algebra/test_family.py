"""The Family type: what a config makes of it, and the questions the engine asks it."""

from typing import Any

import pytest

from growformer.algebra import Atom, Attention, Family, Field, Frozen, Lends, Norm, Tied, Unlike, replace
from growformer.errors import PatternError

FAMILY = Family(
    name="tiny",
    model_types=("tiny",),
    architectures=("TinyForCausalLM",),
    axes={"vocab": Field("vocab_size"), "hidden": Field("hidden_size"), "mlp": Field("mlp_size"), "layer": Field("n")},
    tensors={
        "model.embed": "vocab -> hidden",
        "model.layers.{layer}.up": "mlp <- hidden",
        "model.layers.{layer}.down": "hidden <- mlp",
        "model.layers.{layer}.down.bias": "-> hidden",
        "model.layers.{layer}.norm": "pre: * hidden",
        "model.conv": "hidden <- mlp",
        "head": "vocab <- hidden",
    },
    tasks={"score": "_ <- hidden"},
    norms={"pre": Norm("hidden", "rms", eps="eps")},
    attention=Attention(),
    tied=Tied("head", "model.embed", norm="pre"),
    prefix="model.",
    neutral=("act",),
)


def with_when(*when: tuple[dict[str, object], dict[str, Any]]) -> Family:
    return replace(FAMILY, when=when)


# --- when ------------------------------------------------------------------------------------------------------------


def test_mappings_are_merged_and_none_takes_away() -> None:
    changes = {"tensors": {"model.extra": "-> hidden", "model.conv": None, "head": "vocab <- mlp"}}
    of = with_when(({"gated": True}, changes)).of({"gated": True})
    assert dict(of.tensors) == {
        **{k: v for k, v in FAMILY.tensors.items() if k != "model.conv"},
        "model.extra": "-> hidden",
        "head": "vocab <- mlp",
    }
    assert "model.conv" in FAMILY.tensors


def test_other_attributes_are_replaced_and_none_replaces_them_too() -> None:
    changes = {"tied": None, "attention": Attention(scaled=False), "streams": ("hidden", "other"), "settled": 2}
    of = with_when(({}, changes)).of({})
    assert (of.tied, of.attention, of.streams, of.settled) == (None, Attention(scaled=False), ("hidden", "other"), 2)


def test_none_where_nothing_stood_is_a_value() -> None:
    """A required field may have to be null; taking it away again takes the next condition's None."""
    of = with_when(({}, {"requires": {"clip": None}})).of({})
    assert of.requires == {"clip": None}
    twice = with_when(({}, {"requires": {"clip": None}}), ({}, {"requires": {"clip": None}})).of({})
    assert twice.requires == {}


def test_conditions_hold_where_every_field_has_its_value() -> None:
    family = with_when(({"a": 1, "part.b": None}, {"settled": 1}), ({"a": 2}, {"settled": 2}))
    assert family.of({"a": 1}).settled == 1
    assert family.of({"a": 1, "part": {"b": 0}}).settled == 0  # 0 is not None
    assert family.of({"a": 2, "part": {"b": 5}}).settled == 2
    assert family.of({"a": 3}).settled == 0


def test_a_condition_may_be_that_two_fields_differ() -> None:
    family = with_when(({"width": Unlike("part.width")}, {"settled": 1}))
    assert family.of({"width": 3, "part": {"width": 4}}).settled == 1
    assert family.of({"width": 3, "part": {"width": 3}}).settled == 0
    assert "width" in family.of({"width": 3}).neutral


def test_later_changes_see_earlier_ones() -> None:
    first: dict[str, Any] = {"norms": {"post": Norm("hidden", "rms", eps="eps")}}
    second: dict[str, Any] = {"norms": {"post": None, "pre": Norm("hidden", "layer", eps="eps")}}
    of = with_when(({"a": True}, first), ({"b": True}, second)).of({"a": True, "b": True})
    assert dict(of.norms) == {"pre": Norm("hidden", "layer", eps="eps")}


def test_conditions_and_sizes_of_other_variants_become_neutral() -> None:
    changes: dict[str, Any] = {"axes": {"mlp": Field("other_size")}}
    family = with_when(({"gated": True, "part.mode": "x"}, changes))
    of = family.of({"gated": True, "part": {"mode": "x"}})
    # mlp_size sizes nothing here: known, and without effect. So are the switches.
    assert set(of.neutral) >= {"act", "gated", "part.mode", "mlp_size"}
    assert "other_size" not in of.neutral
    assert set(family.of({}).neutral) >= {"gated", "part.mode"}
    assert of.when == ()


def test_a_family_without_variants_stays_what_it_is() -> None:
    of = FAMILY.of({})
    assert replace(of, neutral=FAMILY.neutral) == FAMILY
    assert of.neutral[:1] == ("act",) and set(of.neutral) == {"act", "vocab_size", "hidden_size", "mlp_size", "n"}


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "headed"),
    [
        (["TinyForCausalLM"], True),
        (["TinyForMaskedLM"], True),
        (["TinyLMHeadModel"], True),
        (["TinyForConditionalGeneration"], True),
        (["TinyForPreTraining"], True),
        (["TinyDoubleHeadsModel"], True),
        (["TinyModel"], False),
        (["TinyForSequenceClassification"], False),
        (["TinyModel", "TinyForCausalLM"], False),  # the first counts
        ([], True),
        (None, True),
    ],
)
def test_headed(architectures: list[str] | None, headed: bool) -> None:
    assert FAMILY.headed({"architectures": architectures}) is headed
    assert replace(FAMILY, tied=None).headed({"architectures": architectures}) is False


# --- layers ----------------------------------------------------------------------------------------------------------


def closed_at(family: Family) -> set[str]:
    return {name.text for name, pattern in family.patterns if family.closes_layer(name, pattern)}


def test_a_layer_is_closed_at_what_writes_the_stream() -> None:
    assert closed_at(FAMILY) == {"model.layers.{layer}.down", "model.layers.{layer}.down.bias"}


def test_or_at_the_gains_of_norms_on_what_its_branches_add() -> None:
    norms = {**FAMILY.norms, "post": Norm("hidden", "rms", eps="eps", output="added")}
    tensors = {**FAMILY.tensors, "model.layers.{layer}.post": "post: * hidden", "model.post": "post: * hidden"}
    assert closed_at(replace(FAMILY, norms=norms, tensors=tensors)) == {"model.layers.{layer}.post"}


def test_every_stream_and_layer_axis_counts() -> None:
    tensors = {**FAMILY.tensors, "decoder.{layer2}.out": "other <- mlp", "decoder.{layer2}.in": "mlp <- other"}
    two = replace(FAMILY, tensors=tensors, streams=("hidden", "other"), layers=("layer", "layer2"))
    assert closed_at(two) - closed_at(FAMILY) == {"decoder.{layer2}.out"}
    assert closed_at(replace(two, layers=("layer",))) == closed_at(FAMILY)
    assert closed_at(replace(two, streams=("hidden",))) == closed_at(FAMILY)
    assert (two.stream, two.layer) == ("hidden", "layer")


# --- norms -----------------------------------------------------------------------------------------------------------

NORMS = {
    "pre": Norm("hidden", "rms", eps="eps", gain="1+w"),
    "qk": Norm("key", "rms", eps="eps"),
    "q": Norm(("heads", "key"), "rms", eps="other"),
    "bare": Norm("rank", "rms", eps=1e-6, gain=None),
}


@pytest.mark.parametrize(
    ("atom", "offset"),
    [
        (Atom("hidden", "gain", "pre"), 1),
        (Atom("hidden", "shift", "pre"), 0),  # a shift is stored as it is
        (Atom("hidden", "write", "pre"), 0),
        (Atom("key", "gain", "qk"), 0),
        (Atom("hidden", "gain", "unknown"), 0),
        (Atom("hidden", "gain", None), 0),
        (Atom("rank", "gain", "bare"), 0),
    ],
)
def test_offset(atom: Atom, offset: int) -> None:
    assert replace(FAMILY, norms=NORMS).offset(atom) == offset


def test_norms_over_an_axis_and_across_axes() -> None:
    family = replace(FAMILY, norms=NORMS)
    assert family.norm_over("key") == NORMS["qk"]
    assert family.norm_across("key") == family.norm_across("heads") == NORMS["q"]
    assert family.norm_over("heads") is None and family.norm_across("hidden") is None
    assert NORMS["q"].axes == ("heads", "key") and NORMS["qk"].axes == ("key",)


def test_an_eps_is_fixed_where_it_stands_in_the_code_or_serves_other_axes() -> None:
    family = replace(FAMILY, norms=NORMS)
    assert [family.fixed_eps(norm) for norm in NORMS.values()] == [True, True, False, True]
    alone = replace(FAMILY, norms={"pre": NORMS["pre"], "final": NORMS["pre"]})
    assert not alone.fixed_eps(NORMS["pre"])


# --- names -----------------------------------------------------------------------------------------------------------


def test_find() -> None:
    name, pattern, index = FAMILY.find("model.layers.12.up")
    assert (name.text, pattern.text, index) == ("model.layers.{layer}.up", "mlp <- hidden", {"layer": 12})
    assert FAMILY.find("score")[1].text == "_ <- hidden"  # a task's head
    with pytest.raises(PatternError, match=r"tiny: tensor 'layers.0.up': no pattern"):
        FAMILY.find("layers.0.up")
    twice = replace(FAMILY, tensors={**FAMILY.tensors, "model.layers.0.up": "mlp <- hidden"})
    with pytest.raises(PatternError, match="2 patterns cover it"):
        twice.find("model.layers.0.up")


@pytest.mark.parametrize(
    ("disk", "full"),
    [
        ("layers.0.up", "model.layers.0.up"),
        ("embed", "model.embed"),
        ("head", "head"),  # never had the prefix
        ("score", "score"),
        ("model.embed", "model.embed"),
        ("unknown", "model.unknown"),
    ],
)
def test_full_name(disk: str, full: str) -> None:
    assert FAMILY.full_name(disk, "model.") == full
    assert FAMILY.full_name(disk, "") == disk


def test_attention_of() -> None:
    one = Attention(kv_heads="kv_heads", group="group", key=("nope", "rope"))
    two = Attention(heads="decoder_heads", key=("decoder_key",), value="decoder_value")
    family = replace(FAMILY, attention=(one, two))
    assert family.attentions == (one, two) and FAMILY.attentions == (Attention(),)
    for axis in ("heads", "kv_heads", "group", "nope", "rope", "value"):
        assert family.attention_of(axis) is one
    for axis in ("decoder_heads", "decoder_key", "decoder_value"):
        assert family.attention_of(axis) is two
    assert family.attention_of("mlp") is None and family.attention_of("key") is None


def test_index_axes_of_patterns_stand_where_the_streams_say() -> None:
    tensors = {"up": "[experts] hidden -> mlp", "down": "[experts] mlp -> hidden"}
    family = replace(FAMILY, tensors=tensors, tasks={})
    stands = [next(atom.stand for atom in pattern.atoms() if atom.index) for _, pattern in family.patterns]
    assert stands == ["write", "read"]


def test_frozen_is_for_ever_unless_it_says_otherwise() -> None:
    assert Frozen(("key",), "why").unless == {}


# --- layers of several kinds -----------------------------------------------------------------------------------------

KINDS = replace(
    FAMILY,
    tensors={
        "model.layers.{layer:near}.up": "mlp <- hidden",
        "model.layers.{layer:far_own}.up": "(q: mlp) <- hidden",
        "model.layers.{layer}.scalar": "* 1",
        "model.layers.{layer}.norm": "pre: * hidden",
    },
    drop=("model.layers.{layer:last}.down",),
    per_layer={"types": "each", "shared": "last"},
    kinds={
        "near": {"types": "near"},
        "far_own": {"types": "far", "shared": False},
        "last": {"shared": True},
    },
    lends=Lends("types", "shared"),
)


def test_kinds_of_layers_are_placed_by_the_config() -> None:
    size = KINDS.axes["layer"]
    assert isinstance(size, Field)
    config = {size.name: 5, "types": ["far", "near", "far", "near", "far"], "shared": 2}
    family = KINDS.of(config)
    assert family.placed == {"near": {1, 3}, "far_own": {0, 2}, "last": {3, 4}}
    assert family.lenders == {1, 2}
    assert family.find("model.layers.3.up")[0].kind == "near" and family.find("model.layers.2.up")[0].kind == "far_own"
    with pytest.raises(PatternError, match="no pattern covers it"):
        family.find("model.layers.4.up")  # far, and not of its own
    assert family.drops("model.layers.4.down") and not family.drops("model.layers.2.down")
    again = family.of({**config, "types": config["types"][::-1], "shared": 0})  # of a grown model, say
    assert again.placed["near"] == {1, 3} and again.placed["last"] == set() and again.lenders == set()
    with pytest.raises(PatternError, match="there is no kind middle of layers"):
        _ = replace(KINDS, tensors={"a.{layer:middle}": "mlp <- hidden"}).patterns


def test_a_number_that_multiplies_what_passes() -> None:
    passing = [name.text for name, pattern in KINDS.patterns if KINDS.passes(pattern)]
    assert passing == ["model.layers.{layer}.scalar"]


def test_roles_have_a_side() -> None:
    family = replace(FAMILY, attention=(Attention(), Attention(heads="far", roles=("far_q", "far_k", "far_v"))))
    roles = ("q", "k", "v", "far_q", "far_k", "far_v", "pre", None)
    assert [family.side(role) for role in roles] == ["q", "k", "v", "q", "k", "v", None, None]
