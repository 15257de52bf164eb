"""Factors: square roots of fractions that compose exactly and are rounded once."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import ONE, Factor

FRACTIONS = st.fractions(min_value=Fraction(1, 10**6), max_value=10**6).filter(lambda f: f > 0)
FACTORS = FRACTIONS.map(Factor)


@given(FACTORS, FACTORS, FACTORS)
def test_factors_form_a_group(a: Factor, b: Factor, c: Factor) -> None:
    assert (a * b) * c == a * (b * c)
    assert a * ONE == a
    assert a * a.inverse == ONE
    assert a / b == a * b.inverse
    assert (a * b).inverse == b.inverse * a.inverse


def test_a_chain_of_growths_composes_to_the_one_at_once() -> None:
    sizes = [64, 65, 67, 71, 96, 97, 130]
    chain = ONE
    for old, new in itertools.pairwise(sizes):
        chain *= Factor.sqrt(new, old)
    assert chain == Factor.sqrt(130, 64)
    assert float(chain) == float(Factor.sqrt(130, 64))


def test_float64_would_not_have_composed() -> None:
    # What the fractions are for: the same chain in float64 drifts.
    ends = [(a, b, c) for a in range(3, 12) for b in range(a + 1, 14) for c in range(b + 1, 16)]
    assert any(math.sqrt(b / a) * math.sqrt(c / b) != math.sqrt(c / a) for a, b, c in ends)
    assert all(Factor.sqrt(b, a) * Factor.sqrt(c, b) == Factor.sqrt(c, a) for a, b, c in ends)


def beats_its_neighbours(value: float, square: Fraction) -> bool:
    """Whether no float64 is nearer to sqrt(square) than `value`: the root lies between the two midpoints around it."""
    above = (Fraction(value) + Fraction(math.nextafter(value, math.inf))) / 2
    below = (Fraction(value) + Fraction(math.nextafter(value, 0.0))) / 2
    return below**2 <= square <= above**2


@given(FACTORS)
def test_float_is_the_nearest_float64(factor: Factor) -> None:
    value = float(factor)
    assert beats_its_neighbours(value, factor.square)
    assert not beats_its_neighbours(math.nextafter(value, math.inf), factor.square)
    assert not beats_its_neighbours(math.nextafter(value, 0.0), factor.square)


def test_the_root_of_a_rounded_fraction_is_not_the_nearest() -> None:
    # Why `float` goes through whole numbers: dividing first rounds twice.
    pairs = [(p, q) for p in range(1, 60) for q in range(1, 60)]
    assert any(math.sqrt(p / q) != float(Factor.sqrt(p, q)) for p, q in pairs)


@pytest.mark.parametrize(("numerator", "denominator", "exact"), [(9, 4, 1.5), (1, 4, 0.5), (25, 1, 5.0), (1, 9, 1 / 3)])
def test_float_of_a_square_is_exact(numerator: int, denominator: int, exact: float) -> None:
    assert float(Factor.sqrt(numerator, denominator)) == exact


@given(st.integers(-40, 40))
def test_exponent_of_a_power_of_two(k: int) -> None:
    assert Factor(Fraction(4) ** k).exponent == k
    assert Factor(Fraction(4) ** k * 2).exponent is None
    assert float(Factor(Fraction(4) ** k)) == math.ldexp(1.0, k)


@pytest.mark.parametrize("square", ["2", "1/2", "9", "9/4", "4/9", "3/4", "5/16", "12"])
def test_exponent_of_anything_else_is_none(square: str) -> None:
    assert Factor.parse(square).exponent is None


@given(FACTORS)
def test_parse_reads_what_str_of_the_square_writes(factor: Factor) -> None:
    assert Factor.parse(str(factor.square)) == factor


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (ONE, "1"),
        (Factor.of(1, 2), "1/2"),
        (Factor.sqrt(3, 2), "sqrt(3/2)"),
        (Factor.sqrt(16), "4"),
        (Factor.of(2), "2"),
    ],
)
def test_text_for_people(factor: Factor, text: str) -> None:
    assert str(factor) == text
