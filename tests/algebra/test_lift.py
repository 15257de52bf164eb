"""Lifts against the dense matrices E and R that they stand for."""

import json
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import HALVES, ONE, Factor, Lift, Run, concat, product, shared

Dense = npt.NDArray[np.object_]

# Squares of fractions, so that the dense matrices below are exact.
FACTORS = st.sampled_from([ONE, Factor.of(2), Factor.of(1, 2), Factor.of(3), Factor.of(2, 3)])


def exact(factor: Factor) -> Fraction:
    return Fraction(str(factor))


def zeros(rows: int, columns: int) -> Dense:
    return np.full((rows, columns), Fraction(0), dtype=object)


def dense(lift: Lift) -> tuple[Dense, Dense]:
    """E [new, old] and R [old, new] in fractions, written out entry by entry."""
    e, r = zeros(lift.new, lift.old), zeros(lift.old, lift.new)
    for start, run in lift.spans():
        for i in range(run.count):
            if run.old is None:
                continue
            for channel in range(run.old, run.old + run.mean) if run.mean else [run.old + i]:
                e[start + i, channel] = exact(run.factor) / max(run.mean, 1)
                if run.back is not None:
                    r[channel, start + i] = exact(run.back)
    return e, r


def closed_and_free(lift: Lift) -> list[bool | None]:
    """For each new channel: None where an old one arrives, else whether it is free."""
    return [None if run.old is not None else run.free for run in lift.runs for _ in range(run.count)]


@st.composite
def lifts(draw: st.DrawFn, least: int = 0, means: bool = True) -> Lift:
    """Lifts of up to four old channels: all arrive, some twice, among new ones, scaled; a mean or none."""
    old = draw(st.integers(least, 4))
    extra = draw(st.lists(st.one_of(st.none(), st.integers(0, old - 1)) if old else st.none(), max_size=4))
    sources = draw(st.permutations([*range(old), *extra]))
    lift = Lift.rows(old, sources, free=draw(st.booleans())).times(draw(FACTORS))
    if means and old and draw(st.booleans()):
        lift = Lift(old, (*lift.runs, Run(draw(st.integers(1, 2)), 0, back=None, mean=old)))
    return lift


def eye(size: int) -> Dense:
    out = zeros(size, size)
    for i in range(size):
        out[i, i] = Fraction(1)
    return out


@given(lifts())
def test_back_is_a_left_inverse(lift: Lift) -> None:
    e, r = dense(lift)
    assert e.shape == (lift.new, lift.old)
    assert (r @ e == eye(lift.old)).all()


def test_left_inverse_control() -> None:
    # A copy that is read too: R E = 2.
    e, r = dense(Lift(1, (Run(1, 0), Run(1, 0))))
    assert not (r @ e == eye(1)).all()


def kron(a: Dense, b: Dense) -> Dense:
    out = zeros(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])
    for (i, j), x in np.ndenumerate(a):
        for (k, m), y in np.ndenumerate(b):
            out[i * b.shape[0] + k, j * b.shape[1] + m] = x * y
    return out


@given(lifts(means=False), lifts())
def test_product_is_the_kronecker_product(outer: Lift, inner: Lift) -> None:
    both = product(outer, inner)
    for mine, a, b in zip(dense(both), dense(outer), dense(inner), strict=True):
        assert mine.shape == (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])
        assert (mine == kron(a, b)).all()


@given(lifts(means=False), lifts())
def test_inside_a_new_outer_channel_nothing_else_is_closed(outer: Lift, inner: Lift) -> None:
    wanted = [a if a is not None else b for a in closed_and_free(outer) for b in closed_and_free(inner)]
    outer_new = [a is not None for a in closed_and_free(outer) for _ in range(inner.new)]
    found = closed_and_free(product(outer, inner))
    assert found == wanted
    assert all(free is not None for free, new in zip(found, outer_new, strict=True) if new)


@given(st.lists(lifts(), min_size=1, max_size=3))
def test_concat_is_block_diagonal(parts: list[Lift]) -> None:
    whole = concat(parts)
    e, r = dense(whole)
    wanted_e, wanted_r = zeros(whole.new, whole.old), zeros(whole.old, whole.new)
    row = column = 0
    for part in parts:
        part_e, part_r = dense(part)
        wanted_e[row : row + part.new, column : column + part.old] = part_e
        wanted_r[column : column + part.old, row : row + part.new] = part_r
        row, column = row + part.new, column + part.old
    assert (e == wanted_e).all()
    assert (r == wanted_r).all()
    assert closed_and_free(whole) == [free for part in parts for free in closed_and_free(part)]


@given(lifts(), FACTORS)
def test_times(lift: Lift, factor: Factor) -> None:
    (e, r), (scaled_e, scaled_r) = dense(lift), dense(lift.times(factor))
    assert (scaled_e == e * exact(factor)).all()
    assert (scaled_r == r / exact(factor)).all()


@given(lifts())
def test_json_round_trip(lift: Lift) -> None:
    assert Lift.from_json(lift.old, json.loads(json.dumps(lift.to_json()))) == lift


def test_json_leaves_defaults_out() -> None:
    assert Lift.place(3, range(3), 5).to_json() == [[3, 0], [2, None]]
    assert Lift.place(3, range(3), 5, free=True).to_json() == [[3, 0], [2, None, "1", None, 0, True]]


def test_place_puts_old_channels_where_it_is_told() -> None:
    lift = Lift.place(3, [4, 0, 1], 6)
    assert (lift.old, lift.new) == (3, 6)
    e, _ = dense(lift)
    assert [(int(i), int(j)) for i, j in np.argwhere(e != 0)] == [(0, 1), (1, 2), (4, 0)]


def test_place_of_the_first_channels_is_two_runs_whatever_the_size() -> None:
    assert Lift.place(4096, range(4096), 8192).runs == (Run(4096, 0), Run(4096, None, back=None))


def test_place_of_nothing_is_all_new() -> None:
    assert Lift.place(0, (), 7) == Lift(0, (Run(7, None, back=None),))
    assert Lift.place(0, (), 7) == Lift.rows(0, [None] * 7)


def test_rows_reads_the_first_of_the_copies() -> None:
    assert Lift.rows(2, [0, 1, 0, 1, None]).runs == (Run(2, 0), Run(2, 0, back=None), Run(1, None, back=None))


@pytest.mark.parametrize("size", [0, 1, 5])
def test_identity(size: int) -> None:
    lift = Lift.identity(size)
    assert lift.is_identity and (lift.old, lift.new) == (size, size)
    assert not Lift.place(size, range(size), size + 1).is_identity
    assert Lift.place(size, range(size), size) == lift


def test_a_factor_or_another_order_is_no_identity() -> None:
    assert not Lift.identity(2).times(Factor.of(2)).is_identity
    assert not Lift.rows(2, [1, 0]).is_identity


def test_freed_changes_new_channels_only() -> None:
    lift = Lift.place(2, [0, 2], 4)
    assert closed_and_free(lift.freed(True)) == [None, True, None, True]
    assert closed_and_free(lift.freed(True).freed(False)) == closed_and_free(lift)


def test_the_mean_of_an_outer_axis_is_refused() -> None:
    mean = Lift(2, (Run(2, 0), Run(1, 0, back=None, mean=2)))
    assert product(mean, Lift.identity(1)).runs == mean.runs
    with pytest.raises(NotImplementedError, match="mean of an outer axis"):
        product(mean, Lift.identity(2))


# --- whole copies, and what reads them -------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 7))
def test_copies_are_all_channels_over_and_over(old: int, times: int) -> None:
    lift = Lift.copies(old, times)
    e, r = dense(lift)
    assert (e == np.vstack([eye(old)] * times)).all()
    assert (r == np.hstack([eye(old), *[zeros(old, old)] * (times - 1)])).all()  # the first is read


@given(st.integers(1, 4), st.integers(1, 7), FACTORS, FACTORS)
def test_shared_is_the_factor_over_what_arrives(old: int, times: int, written: Factor, wanted: Factor) -> None:
    lift = Lift.copies(old, times).times(written)
    split = shared(lift, HALVES, wanted)
    assert [run.share for run in split.runs] == [(k, times) if times > 1 else None for k in range(times)]
    # With the shares s_k of an entry w: sum of (wanted / written) s_k w, times what arrives, is wanted times w.
    assert {run.factor * written for run in split.runs} == {wanted}
    assert all(run.back is not None and run.back * run.factor == ONE for run in split.runs)
    assert (split.old, split.new) == (old, old * times)


def test_copies_of_some_channels_share_what_reads_those() -> None:
    parts = shared(Lift(3, (Run(3, 0), Run(2, 1, back=None), Run(1, 2, back=None))))
    assert [(run.old, run.count, run.share) for run in parts.runs] == [
        (0, 1, None),
        (1, 1, (0, 2)),
        (2, 1, (0, 3)),
        (1, 1, (1, 2)),
        (2, 1, (1, 3)),
        (2, 1, (2, 3)),
    ]


def test_shared_copies_need_not_stand_in_whole_blocks() -> None:
    lift = Lift(4, (Run(2, 0), Run(2, 2), Run(2, 2, back=None), Run(2, 0, back=None)))
    assert [run.share for run in shared(lift).runs] == [(0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    "lift",
    [
        Lift.place(2, range(2), 3),
        Lift(2, (Run(2, 0), Run(2, 0, back=None, mean=2))),
    ],
)
def test_only_copies_are_shared(lift: Lift) -> None:
    with pytest.raises(ValueError, match="only copies"):
        shared(lift)


@given(st.integers(1, 4), st.integers(2, 7), FACTORS)
def test_json_round_trip_of_shares(old: int, times: int, factor: Factor) -> None:
    lift = shared(Lift.copies(old, times), HALVES, factor)
    again = Lift.from_json(old, json.loads(json.dumps(lift.to_json())))
    assert again == lift
    assert [run.share for run in again.runs] == [(k, times) for k in range(times)]


def test_json_of_a_share_writes_every_default_before_it() -> None:
    assert shared(Lift.copies(3, 2)).to_json() == [
        [3, 0, "1", "1", 0, False, [0, 2]],
        [3, 0, "1", "1", 0, False, [1, 2]],
    ]


def test_a_product_carries_shares_of_one_of_its_axes() -> None:
    parts, plain = shared(Lift.copies(2, 2)), Lift.place(2, range(2), 3)
    inner = product(plain, parts)
    assert [run.share for run in inner.runs if not run.new] == [(0, 2), (1, 2)] * 2
    outer = product(parts, plain)
    assert [run.share for run in outer.runs if not run.new] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert product(parts, Lift.identity(3)).runs == shared(Lift.copies(6, 2)).runs
    with pytest.raises(NotImplementedError, match="copies of two axes"):
        product(parts, parts)


def test_neighbours_with_other_shares_stay_apart() -> None:
    assert concat([shared(Lift.copies(1, 2)), Lift.identity(1)]).runs == (
        Run(1, 0, share=(0, 2)),
        Run(1, 0, share=(1, 2)),
        Run(1, 1),
    )
