"""The pattern language: what it reads, and how it says no."""

import pytest

from growformer.algebra import RAW, WILD, Atom, Dim, Lift, NamePattern, TensorPattern
from growformer.errors import PatternError

SIZES = {
    "hidden": 12,
    "mlp": 17,
    "heads": 6,
    "kv_heads": 3,
    "group": 2,
    "key": 4,
    "value": 5,
    "nope": 7,
    "kv_rank": 8,
    "vocab": 23,
    "positions": 9,
    "colors": 3,
    "patch": 14,
    "buckets": 10,
    "pooled": 11,
    "experts": 13,
    WILD: 21,
}


def size(atom: Atom) -> int:
    return atom.axis if isinstance(atom.axis, int) else SIZES[atom.axis]


def shape(text: str) -> tuple[int, ...]:
    return tuple(dim.size(size) for dim in TensorPattern.parse(text).dims)


def standing(text: str) -> list[tuple[str | int, str, str | None]]:
    return [(atom.axis, atom.stand, atom.role) for atom in TensorPattern.parse(text).atoms()]


# Every example of the design's section on the language, with the shape that it means.
EXAMPLES = {
    "mlp <- hidden": (17, 12),
    "(q: kv_heads group key) <- hidden": (3 * 2 * 4, 12),
    "hidden -> (q: heads key | k: heads key | v: heads value)": (12, 24 + 24 + 30),
    "(heads (q: key | k: key | v: value)) <- hidden": (6 * (4 + 4 + 5), 12),
    "(kv_heads (q: group key | k: key | v: value)) <- hidden": (3 * (8 + 4 + 5), 12),
    "(heads (k: nope | v: value)) <- kv_rank": (6 * (7 + 5), 8),
    "vocab -> hidden": (23, 12),
    "(2 | positions) -> hidden": (11, 12),
    "hidden <- colors patch patch": (12, 3, 14, 14),
    "buckets -> heads": (10, 6),
    "pooled <- hidden": (11, 12),
    "-> mlp": (17,),
    "pre: * hidden": (12,),
    "post: * hidden": (12,),
    "qk: * key": (4,),
    "scale: * hidden": (12,),
    "pre: + hidden": (12,),
    "[experts] hidden -> (mlp (gate: 1 | up: 1))": (13, 12, 34),
    "hidden <- [experts] mlp": (12, 13, 17),
    "-> [experts] mlp": (13, 17),
    "_ <- hidden": (21, 12),
    "_ -> (q: heads)": (21, 6),
    "(q: heads key) <- (raw: hidden)": (24, 12),
    "-> 1 vocab": (1, 23),
    ".": (),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_have_the_shapes_they_mean(text: str) -> None:
    assert shape(text) == EXAMPLES[text]


def index_stands(text: str) -> list[tuple[str | int, str, bool]]:
    pattern = TensorPattern.parse(text).indexed(("hidden", "other"))
    return [(atom.axis, atom.stand, atom.index) for atom in pattern.atoms()]


@pytest.mark.parametrize(
    ("text", "stand"),
    [
        ("[experts] mlp <- hidden", "write"),
        ("[experts] hidden -> (mlp (gate: 1 | up: 1))", "write"),  # in the text's order it stands with what is read
        ("-> [experts] mlp", "write"),
        ("hidden <- [experts] mlp", "read"),
        ("[experts] mlp -> hidden", "read"),
        ("other <- [experts] mlp", "read"),
        ("-> [experts] hidden", "read"),
        ("[experts] hidden <- mlp", "read"),
    ],
)
def test_an_index_stands_where_the_stream_says(text: str, stand: str) -> None:
    index = [(axis, how) for axis, how, is_index in index_stands(text) if is_index]
    assert index == [("experts", stand)]
    # Nothing else is touched.
    plain = [(atom.axis, atom.stand) for atom in TensorPattern.parse(text).atoms() if not atom.index]
    assert [(axis, how) for axis, how, is_index in index_stands(text) if not is_index] == plain
    assert TensorPattern.parse(text).indexed(("hidden", "other")).text == text


def test_without_a_stream_nothing_reads_an_index() -> None:
    pattern = TensorPattern.parse("hidden <- [experts] mlp").indexed(())
    assert [atom.stand for atom in pattern.atoms() if atom.index] == ["write"]


def test_a_wild_dim_is_no_axis_and_a_raw_one_has_a_role() -> None:
    assert TensorPattern.parse("_ <- hidden").axes() == {"hidden"}
    assert standing("_ -> (q: heads)") == [(WILD, "read", None), ("heads", "write", "q")]
    assert standing("(q: heads key) <- (raw: hidden)")[-1] == ("hidden", "read", RAW)


def test_a_scalar_has_no_dims() -> None:
    assert TensorPattern.parse(" . ").dims == ()
    assert TensorPattern.parse(".").axes() == set()
    assert TensorPattern.parse(".").indexed(("hidden",)).dims == ()


def test_the_arrow_says_who_reads() -> None:
    assert standing("mlp <- hidden") == [("mlp", "write", None), ("hidden", "read", None)]
    assert standing("hidden -> mlp") == [("hidden", "read", None), ("mlp", "write", None)]
    assert standing("-> mlp") == [("mlp", "write", None)]
    assert standing("pre: * hidden") == [("hidden", "gain", "pre")]
    assert standing("pre: + hidden") == [("hidden", "shift", "pre")]


def test_a_role_covers_its_part_and_no_other() -> None:
    assert standing("hidden -> (q: heads key | v: heads value)") == [
        ("hidden", "read", None),
        ("heads", "write", "q"),
        ("key", "write", "q"),
        ("heads", "write", "v"),
        ("value", "write", "v"),
    ]
    # Inside a product the inner part's role wins; the outer axis has none.
    assert standing("(heads (k: nope | v: value)) <- kv_rank")[0] == ("heads", "write", None)


def test_a_number_is_that_many_channels_of_no_axis() -> None:
    pattern = TensorPattern.parse("(2 | positions) -> hidden")
    assert [atom.axis for atom in pattern.atoms()] == [2, "positions", "hidden"]
    assert pattern.axes() == {"positions", "hidden"}


def test_structure() -> None:
    (fused, hidden) = TensorPattern.parse("(heads (q: key | v: value)) <- hidden").dims
    assert (fused.kind, hidden.kind) == ("product", "atom")
    assert [part.kind for part in fused.parts] == ["atom", "concat"]
    # A group of one is what it holds.
    assert TensorPattern.parse("(key) <- hidden").dims[0] == Dim("atom", Atom("key", "write", None))


def test_the_lift_of_a_dim_is_put_together_from_its_axes() -> None:
    grown = {"heads": Lift.place(2, [0, 2], 3), "key": Lift.place(2, range(2), 3), "value": Lift.identity(1)}
    dim = TensorPattern.parse("(heads (q: key | v: value)) <- hidden").dims[0]
    lift = dim.lift(lambda atom: grown[str(atom.axis)])
    # Old channels of two heads, (key 0, key 1, value) each; a new key channel in each, and a new head between.
    sources = [0, 1, None, 2, None, None, None, None, 3, 4, None, 5]
    assert lift == Lift.rows(6, sources)


@pytest.mark.parametrize(
    ("text", "wanted", "at"),
    [
        ("mlp hidden", "an arrow", "the end"),
        ("", "an arrow", "the end"),
        ("mlp <-", "a dim", "the end"),
        ("->", "a dim", "the end"),
        ("pre: *", "a dim", "the end"),
        ("mlp <- hidden -> vocab", "the end", "-> vocab"),
        ("mlp <- (hidden", ")", "the end"),
        ("mlp <- hidden)", "the end", ")"),
        ("(q: | k: key) <- hidden", "a dim", "| k: key) <- hidden"),
        ("<- hidden", "a dim", "<- hidden"),
        ("mlp <- hidden / 2", "a name, a number", "/ 2"),
        ("mlp <- * hidden", "an axis, a number or (", "* hidden"),
        ("mlp {layer} <- hidden", "a name, a number", "{layer} <- hidden"),
        ("[experts <- hidden", "]", "<- hidden"),
        ("[(experts)] <- hidden", "an axis, a number or (", "(experts)] <- hidden"),
        ("[] mlp <- hidden", "an axis, a number or (", "] mlp <- hidden"),
        ("experts] <- hidden", "an axis, a number or (", "] <- hidden"),
        (". <- hidden", "an axis, a number or (", ". <- hidden"),
    ],
)
def test_errors_point_at_the_place(text: str, wanted: str, at: str) -> None:
    with pytest.raises(PatternError) as raised:
        TensorPattern.parse(text)
    message = str(raised.value)
    assert message.startswith(f"pattern {text!r}: expected {wanted}")
    assert message.endswith(f" at {at!r}")


def test_name_patterns_read_and_write_index_axes() -> None:
    name = NamePattern("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")
    assert name.axes == ("layer", "expert")
    assert name.match("model.layers.3.mlp.experts.12.up_proj.weight") == {"layer": 3, "expert": 12}
    assert name.format({"layer": 3, "expert": 12}) == "model.layers.3.mlp.experts.12.up_proj.weight"


@pytest.mark.parametrize(
    "other",
    [
        "model.layers.3.mlp.experts.12.up_proj.bias",
        "model.layers.03.mlp.experts.12.up_proj.weight",  # format would not give it back
        "model.layers.-1.mlp.experts.12.up_proj.weight",
        "model.layers.3.mlp.experts.12.up_projXweight",  # a dot is a dot
        "base.model.layers.3.mlp.experts.12.up_proj.weight",
    ],
)
def test_name_patterns_match_nothing_else(other: str) -> None:
    assert NamePattern("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight").match(other) is None


def test_a_name_may_speak_of_one_kind_of_layers() -> None:
    text = "model.layers.{layer:wide}.experts.{expert}.weight"
    name = NamePattern(text, frozenset({1, 3}))
    assert (name.axes, name.kind, NamePattern("a.{layer}.b").kind) == (("layer", "expert"), "wide", "")
    assert name.format({"layer": 1, "expert": 0}) == "model.layers.1.experts.0.weight"
    assert name.match("model.layers.2.experts.4.weight") == {"layer": 2, "expert": 4}  # of whatever kind
    assert name.has((3, 0)) and not name.has((2, 1)) and NamePattern(text).has((2, 1))


@pytest.mark.parametrize(
    "text", ["model.layers.{layer=0}.weight", "a.{layer:}.b", "a.{layer:2}.b", "a.{}.b", "a.{0}.b"]
)
def test_a_name_with_anything_but_an_axis_in_braces_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match=r"such as \{layer\}"):
        NamePattern(text)
    assert NamePattern("model.layers.{layer}.weight").axes == ("layer",)
