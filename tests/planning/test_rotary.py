"""Rotary positions in config.json: bases, fractions, nested sets, and which sizes a float32 table can hold."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import Lift, Rotary
from growformer.errors import RequestError
from growformer.planning.growth import AxisGrowth
from growformer.planning.rotary import FLOAT32_MAX, ropes, rotary_config, turned_fraction, widest


def key(old: int, new: int) -> AxisGrowth:
    return AxisGrowth("key", Lift.place(old, range(old), new))


def grown(
    rotary: Rotary, rope: dict[str, Any], old: int = 8, new: int = 12, raw: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    return rotary_config(rotary, raw or {}, {"rope_parameters": rope}, key(old, new), {"kept": 1})


# --- fractions -------------------------------------------------------------------------------------------------------


def test_a_fraction_turns_as_many_channels_as_it_says() -> None:
    missed = 0
    for size in range(2, 513, 2):
        for turned in range(2, size + 1, 2):
            fraction = turned_fraction(turned, size)
            assert int(size * fraction) == turned
            # Nothing nearer to the quotient would do.
            nearer = math.nextafter(fraction, turned / size)
            assert fraction == turned / size or int(size * nearer) != turned
            missed += int(size * (turned / size)) != turned
    assert missed == 1087  # the control: so many plain quotients turn two channels too few


def test_thirty_of_forty_four() -> None:
    assert int(44 * (30 / 44)) == 29 and int(44 * turned_fraction(30, 44)) == 30


@pytest.mark.parametrize("older", ["partial_rotary_factor", "rotary_pct"])
def test_a_partial_rotary_keeps_its_base_and_its_channels(older: str) -> None:
    out, notes = grown(Rotary(partial=older), {"rope_theta": 100.0, "partial_rotary_factor": 0.5}, 60, 88)
    fraction = turned_fraction(30, 88)
    assert out["rope_parameters"] == {"rope_theta": 100.0, "partial_rotary_factor": fraction}
    assert out[older] == fraction and out["rope_theta"] == 100.0 and out["kept"] == 1
    assert "rope_scaling" not in out
    assert notes == ["partial_rotary_factor 0.5 -> 0.340909: 30 channels of a head turn, as before"]


def test_what_turns_is_counted_by_the_code_s_own_rounding() -> None:
    # 0.4 of 8 channels: the code turns int(3.2) = 3 of them.
    out, _ = grown(Rotary(partial="pct"), {"rope_theta": 100.0, "partial_rotary_factor": 0.4}, 8, 12)
    assert int(12 * out["pct"]) == 3


def test_a_count_of_turned_channels_stays_as_it_is() -> None:
    config = {"rotary_dim": 4}
    assert rotary_config(Rotary(turned="rotary_dim"), {}, {"rotary_dim": 4}, key(8, 12), config) == (config, [])


# --- bases -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(0, 64), st.floats(2.0, 1e6))
def test_a_new_base_keeps_every_old_pair_s_frequency(half: int, extra: int, theta: float) -> None:
    old, new = 2 * half, 2 * (half + extra)
    if theta ** (new / old) > 1e300:
        return
    base = grown(Rotary(), {"rope_theta": theta}, old, new)[0]["rope_theta"]
    for pair in range(half):
        assert base ** (-2 * pair / new) == pytest.approx(theta ** (-2 * pair / old), rel=1e-12)


def test_both_key_styles_are_written() -> None:
    out, notes = grown(Rotary(), {"rope_type": "default", "rope_theta": 10000.0}, 8, 12)
    assert out["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert out["rope_theta"] == 1e6 and "rope_scaling" not in out
    assert notes == ["rope_theta 10000 -> 1e+06: theta^(12/8) keeps every old pair's frequency"]
    scaled, _ = grown(Rotary(), {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0})
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    # An older rope_scaling beside new parameters would win over them.
    stale, _ = grown(Rotary(), {"rope_theta": 100.0}, raw={"rope_scaling": {"type": "default"}})
    assert stale["rope_scaling"] is None


def test_nothing_moves_where_the_key_does_not() -> None:
    rope = {"rope_type": "default", "rope_theta": 50.0}
    assert grown(Rotary(), rope, 8, 8) == ({"kept": 1, "rope_parameters": rope, "rope_theta": 50.0}, [])


def test_some_types_hold_only_so_far() -> None:
    _, notes = grown(Rotary(), {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    assert notes[0] == "rope_type 'dynamic': exact up to max_position_embeddings only"


def test_nested_sets_grow_each_by_itself() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 16.0},
    }
    out, notes = grown(Rotary(), rope, 4, 6)
    assert out == {
        "kept": 1,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 64.0},
        },
    }
    assert len(notes) == 2


@pytest.mark.parametrize("theta", [None, 0, -1.0, math.inf, math.nan, True, "10000"])
def test_a_base_that_is_no_positive_number_is_refused(theta: object) -> None:
    with pytest.raises(RequestError, match=r"rope_theta=.*for each layer type"):
        grown(Rotary(), {"rope_theta": theta})
    with pytest.raises(RequestError, match="one positive number"):
        grown(Rotary(), {"a": {"rope_theta": 2.0}, "b": {"rope_theta": theta}})


def test_ropes() -> None:
    assert ropes({}) == ropes({"rope_parameters": None}) == {"": {}}
    assert ropes({"rope_parameters": {"rope_theta": 2.0}}) == {"": {"rope_theta": 2.0}}
    assert ropes({"rope_parameters": {"a": {"rope_theta": 2.0}, "b": {}}}) == {"a": {"rope_theta": 2.0}, "b": {}}
    with pytest.raises(RequestError, match="rope_parameters is 'x', not an object"):
        ropes({"rope_parameters": "x"})


@pytest.mark.parametrize(("theta", "size"), [(10000.0, 8), (1e6, 128), (500000.0, 64), (1.5, 4)])
def test_the_widest_size_is_the_last_whose_base_is_a_float32(theta: float, size: int) -> None:
    most = widest({"rope_theta": theta}, size)
    assert most is not None and most % 2 == 0
    assert theta ** (most / size) <= FLOAT32_MAX < theta ** ((most + 2) / size)
    assert not torch.tensor(theta ** (most / size), dtype=torch.float32).isinf()
    assert torch.tensor(FLOAT32_MAX).item() == torch.finfo(torch.float32).max


@pytest.mark.parametrize("theta", [None, 1.0, 0.5, math.inf, math.nan])
def test_a_base_that_does_not_grow_has_no_widest_size(theta: object) -> None:
    assert widest({"rope_theta": theta}, 8) is None
