"""Draws that are the same bits everywhere, and fills as data."""

import itertools
import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import Factor, Fill
from growformer.algebra.fill import PIECE, draw, numbers, quantiles, shares

SHAPE = (5, PIECE // 2)
TOTAL = 5 * (PIECE // 2)
WHOLE = draw(7, "layers.0.w1", SHAPE, 0, TOTAL)


@given(st.lists(st.integers(0, TOTAL), max_size=6))
def test_a_draw_does_not_depend_on_the_windows_it_is_cut_into(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), TOTAL]
    parts = [draw(7, "layers.0.w1", SHAPE, a, b) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), WHOLE)


@pytest.mark.parametrize("start", [0, 1, PIECE - 1, PIECE, PIECE + 1])
@pytest.mark.parametrize("stop", [PIECE + 2, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1])
def test_windows_at_the_edges_of_pieces(start: int, stop: int) -> None:
    assert np.array_equal(draw(7, "layers.0.w1", SHAPE, start, stop), WHOLE[start:stop])


@pytest.mark.parametrize(
    ("seed", "name", "shape"),
    [
        (8, "layers.0.w1", SHAPE),
        (7, "layers.1.w1", SHAPE),
        (7, "layers.0.w1", SHAPE[::-1]),
        (7, "layers.0.w1", (TOTAL,)),
        (7, "layers.0.w1", (*SHAPE, 1)),
    ],
)
def test_another_seed_name_or_shape_draws_other_numbers(seed: int, name: str, shape: tuple[int, ...]) -> None:
    other = draw(seed, name, shape, 0, TOTAL)
    # Two normal draws in float32 are equal by chance about once in 10^7; shifted copies would show as well.
    assert np.mean(other == WHOLE) < 1e-4
    assert abs(np.corrcoef(other, WHOLE)[0, 1]) < 0.02


def test_the_label_cannot_be_split_in_two_ways() -> None:
    # Seed 1 for tensor "1w" and seed 11 for tensor "w" would collide in a label without a mark between them.
    assert not np.array_equal(draw(1, "1w", (4,), 0, 4), draw(11, "w", (4,), 0, 4))


def test_pieces_differ_from_each_other() -> None:
    assert np.mean(WHOLE[:PIECE] == WHOLE[PIECE : 2 * PIECE]) < 1e-4


def test_a_draw_is_standard_normal() -> None:
    count = len(WHOLE)
    assert abs(float(WHOLE.mean(dtype=np.float64))) < 6 / count**0.5
    assert abs(float(WHOLE.var(dtype=np.float64)) - 1) < 6 * (2 / count) ** 0.5
    assert abs(float(np.mean(np.abs(WHOLE) < 1)) - 0.6827) < 6 * (0.6827 * 0.3173 / count) ** 0.5


def test_a_draw_never_changes() -> None:
    # Bits promised to whoever re-runs a plan: a change here is a change of every grown checkpoint.
    assert draw(0, "w", (3,), 0, 3).tobytes().hex() == "cd47943f72eee73e23a7edbe"


@pytest.mark.parametrize(
    "fill",
    [
        Fill("normal", "layers.0.w1"),
        Fill("normal", None, 0.02),
        Fill("mean", "norm", None, Factor.sqrt(2, 3)),
        Fill("mean", "norm", None, Factor.of(1, 2)),
        Fill("constant", "norm", None, Factor.of(2)),
    ],
)
def test_json_round_trip(fill: Fill) -> None:
    assert Fill.from_json(json.loads(json.dumps(fill.to_json()))) == fill


def test_json_leaves_defaults_out() -> None:
    assert Fill("normal", "w").to_json() == {"kind": "normal", "like": "w"}


def test_the_quantiles_are_a_standard_normal() -> None:
    table = quantiles().astype(np.float64)
    assert len(set(table.tolist())) == len(table) == 2**16
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()
    # Rounded to float32, so exact only to its eps.
    assert abs((table**2).mean() - 1) < np.finfo(np.float32).eps
    # Kurtosis of a normal is 3; cutting the tails at 4.3 costs less than one part in 300. A uniform has 1.8.
    assert 2.99 < (table**4).mean() < 3


def test_draws_follow_the_normal() -> None:
    values = np.sort(draw(0, "w", (1 << 18,), 0, 1 << 18).astype(np.float64))
    normal = np.array([NormalDist().cdf(x) for x in values[::64]])
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand seeds; the seed is fixed.
    distance = np.abs(normal - np.arange(0, len(values), 64) / len(values)).max()
    assert distance < 1.95 / len(values) ** 0.5
    assert np.abs(normal - np.linspace(0, 1, len(normal)) ** 1.02).max() > 1.95 / len(values) ** 0.5


# --- shares ----------------------------------------------------------------------------------------------------------

EVERY = np.arange(2**16, dtype=np.uint16)
"""Every 16 bits that an entry can draw."""


@pytest.mark.parametrize("m", range(2, 8))
def test_shares_of_any_entry_add_up_to_one(m: int) -> None:
    parts = [shares(EVERY, k, m) for k in range(m)]
    assert np.array_equal(sum(parts), np.ones(2**16))
    # Parts that round nothing, each of which comes up.
    assert all(set(np.unique(part)) == {0.0, 0.5, 1.0} for part in parts)


@pytest.mark.parametrize("m", range(2, 8))
def test_no_two_copies_have_the_same_shares(m: int) -> None:
    parts = [shares(EVERY, k, m) for k in range(m)]
    for one, other in itertools.combinations(parts, 2):
        # Copies k and l agree on an entry where both of its draws miss them, or each has one.
        agree = ((m - 2) / m) ** 2 + 2 / m**2
        assert abs(float(np.mean(one == other)) - agree) < 0.02
    # Each copy has as much as any other, to the resolution of 8 bits.
    assert all(abs(float(part.mean()) - 1 / m) <= 1 / 256 for part in parts)


@pytest.mark.parametrize("m", [8, 200, 256])
def test_shares_of_many_copies_add_up_too(m: int) -> None:
    assert np.array_equal(sum(shares(EVERY, k, m) for k in range(m)), np.ones(2**16))


@given(st.lists(st.integers(0, TOTAL), max_size=6), st.integers(2, 7))
def test_shares_do_not_depend_on_the_windows_they_are_cut_into(cuts: list[int], m: int) -> None:
    whole = shares(numbers(7, "layers.0.w2", SHAPE, 0, TOTAL), 1, m)
    edges = [0, *sorted(cuts), TOTAL]
    parts = [shares(numbers(7, "layers.0.w2", SHAPE, a, b), 1, m) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_both_bytes_of_a_number_are_as_likely_as_any() -> None:
    # Chi-squared over 256 values of a byte: 255 +- 22.6; six deviations at a fixed seed.
    drawn = numbers(7, "layers.0.w2", SHAPE, 0, TOTAL)
    for byte in (drawn & 255, drawn >> 8):
        count = np.bincount(byte, minlength=256)
        assert abs(float(((count - TOTAL / 256) ** 2 / (TOTAL / 256)).sum()) - 255) < 6 * 510**0.5
