"""Factors: square roots of fractions, kept as such so that they compose exactly and are rounded once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True, order=False)
class Factor:
    """The positive number sqrt(`square`).

    Every factor that growing a Transformer needs is of this kind: sqrt(k'/k) on keys (arXiv 2308.06103, eq. 19),
    sqrt(h/h') on gains (eq. 24), 1/2 on split readers.
    """

    square: Fraction = Fraction(1)

    @classmethod
    def sqrt(cls, numerator: int, denominator: int = 1) -> Factor:
        """The factor sqrt(numerator / denominator)."""
        return cls(Fraction(numerator, denominator))

    @classmethod
    def of(cls, numerator: int, denominator: int = 1) -> Factor:
        """The factor numerator / denominator."""
        return cls(Fraction(numerator, denominator) ** 2)

    @classmethod
    def parse(cls, text: str) -> Factor:
        """The factor whose square is written in `text`, as `str(factor.square)` writes it."""
        return cls(Fraction(text))

    def __mul__(self, other: Factor) -> Factor:
        return Factor(self.square * other.square)

    def __truediv__(self, other: Factor) -> Factor:
        return Factor(self.square / other.square)

    @property
    def inverse(self) -> Factor:
        return Factor(1 / self.square)

    @property
    def exponent(self) -> int | None:
        """k where the factor is 2**k, so that multiplying by it changes no significand bit; None elsewhere."""
        p, q = self.square.numerator, self.square.denominator
        k = (p.bit_length() - 1) if q == 1 else -(q.bit_length() - 1)
        return k // 2 if k % 2 == 0 and self.square == Fraction(2) ** k else None

    def __float__(self) -> float:
        """The nearest float64 (the integer root is taken with 128 bits to spare, then rounded once)."""
        p, q = self.square.numerator, self.square.denominator
        root = math.isqrt(p * q)
        if root * root == p * q:
            return float(Fraction(root, q))
        return float(Fraction(math.isqrt((p * q) << 256), q << 128))

    def __str__(self) -> str:
        p, q = math.isqrt(self.square.numerator), math.isqrt(self.square.denominator)
        exact = Fraction(p, q)
        return str(exact) if exact * exact == self.square else f"sqrt({self.square})"


ONE = Factor()
