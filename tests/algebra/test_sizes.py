"""Config fields: how they are read and written through dots, and which of them a size is made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import Field, Layered, Ratio, Times, assigned, fields_of, lookup

CONFIG = {"a": 1, "part": {"b": 2, "deep": {"c": 3}}, "none": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", 1),
        ("part.b", 2),
        ("part.deep.c", 3),
        ("part", {"b": 2, "deep": {"c": 3}}),
        ("none", None),
        ("other", None),
        ("part.other", None),
        ("a.b", None),  # no part of a number
        ("none.b", None),
    ],
)
def test_lookup(name: str, value: object) -> None:
    assert lookup(CONFIG, name) == value


def test_assigned_changes_one_field_and_not_the_config() -> None:
    out = assigned(CONFIG, "part.deep.c", 9)
    assert out == {"a": 1, "part": {"b": 2, "deep": {"c": 9}}, "none": None}
    assert CONFIG["part"] == {"b": 2, "deep": {"c": 3}}
    assert assigned(CONFIG, "none.b", 1)["none"] == {"b": 1}
    assert assigned({}, "x.y.z", 1) == {"x": {"y": {"z": 1}}}
    # What is no part of a config becomes one.
    assert assigned(CONFIG, "a.b", 1)["a"] == {"b": 1}


NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)


@given(st.lists(st.tuples(NAMES, st.integers()), max_size=6), NAMES, st.integers())
def test_what_was_assigned_is_found(before: list[tuple[str, int]], name: str, value: int) -> None:
    config: dict[str, object] = {}
    for key, old in before:
        config = assigned(config, key, old)
    out = assigned(config, name, value)
    assert lookup(out, name) == value
    for key, _ in before:
        if not (f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")):
            assert lookup(out, key) == lookup(config, key)


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (Field("n"), {"n"}),
        (Field("n", default=Times(4, "h")), {"n", "h"}),
        (Field("n", default=Layered("h", "far")), {"n", "h", "layer_types", "per_layer_config"}),
        (Field("n", default=Field("m", default=Ratio("h", "e"))), {"n", "m", "h", "e"}),
        (Ratio("h", "e"), {"h", "e"}),
        (Times(4, "h"), {"h"}),
        (Times("ratio", "h"), {"ratio", "h"}),
        (None, set()),
    ],
)
def test_fields_of_a_size(size: Field | Ratio | Times | None, fields: set[str]) -> None:
    assert fields_of(size) == fields
