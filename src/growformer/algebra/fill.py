"""Fills: what a free entry starts as, and the draws that are the same bits everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from growformer.algebra.factor import ONE, Factor

PIECE = 1 << 16
"""Elements drawn from one counter of the generator; a piece is the smallest unit of work on a free block."""

STEP = 16
"""Elements drawn from one step of a counter."""


BARRED = -1e30
"""The bias of channels that no softmax or top-k is to choose: the softmax of it is zero in every dtype.

float16 holds no such number, and the lowest that it does hold (-65504) stands for it there.
"""


@dataclass(frozen=True, slots=True)
class Fill:
    """How the free entries of one target tensor are filled.

    Attributes:
        kind: "normal" (mean 0), "mean" (the mean of the old entries times their factor: gains), "constant" (`factor`
            itself: the gains of norms that only pass on what they read), or "identity" (of a tensor new as a whole,
            [writes, reads, ...]: 1 from each channel to itself, in the middle of every further dim, and 0 elsewhere).
        like: the source tensor whose entries set the std or the mean (of a constant: the dtype); None: `std` stands as
            given.
        std: a given std (of "mean": a given mean); None: that of `like`, measured in float64 when the plan runs.
        factor: what the mean is multiplied by: that of the old gains; or the constant.
    """

    kind: Literal["normal", "mean", "constant", "identity"]
    like: str | None = None
    std: float | None = None
    factor: Factor = ONE

    def to_json(self) -> dict[str, object]:
        """Plain data, defaults left out."""
        out: dict[str, object] = {"kind": self.kind}
        out |= {k: v for k, v in (("like", self.like), ("std", self.std)) if v is not None}
        return out if self.factor == ONE else {**out, "factor": str(self.factor.square)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fill:
        """The inverse of `to_json`."""
        return cls(data["kind"], data.get("like"), data.get("std"), Factor.parse(data.get("factor", "1")))


@lru_cache(maxsize=1)
def quantiles() -> NDArray[np.float32]:
    """The 2^16 values that a draw takes, each as likely as any other: the midpoint quantiles of the standard normal.

    Scaled to a variance of exactly one; the largest is 4.3. Looking one up costs a sixth of a normal draw, and the raw
    bits of a counter generator are the same in every version of numpy, which its normal draws need not be.
    """
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((2**15 + i + 0.5) / 2**16) for i in range(2**15)])
    table = np.concatenate([-upper[::-1], upper])
    return (table / math.sqrt(math.fsum(table * table) / len(table))).astype(np.float32)


def numbers(
    seed: int, name: str, shape: tuple[int, ...], start: int, stop: int, out: NDArray[np.uint16] | None = None
) -> NDArray[np.uint16]:
    """Which of the `quantiles` the flat entries [start, stop) of a target tensor draw.

    They depend on the seed, the tensor's name on disk, its target shape and the place of the entry, and on nothing
    else: not on threads, shards, or the order of work.

    Args:
        seed: of the draws.
        name: the tensor's.
        shape: the tensor's.
        start, stop: the first entry and the one after the last.
        out: where to put them, [stop - start]; None: into memory of their own.
    """
    key = _key(seed, name, shape)
    out = np.empty(stop - start, dtype=np.uint16) if out is None else out
    at = start
    while at < stop:
        # Word 3 of the counter numbers the piece, word 0 the 16 entries of one step within it.
        piece, skip = divmod(at, PIECE)
        end = min(stop, (piece + 1) * PIECE)
        counter = np.array([skip // STEP, 0, 0, piece], dtype=np.uint64)
        skip %= STEP
        raw = np.random.Philox(key=key, counter=counter).random_raw(-(-(skip + end - at) // 4))
        out[at - start : end - start] = raw.astype("<u8", copy=False).view("<u2")[skip : skip + end - at]
        at = end
    return out


def draw(seed: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> NDArray[np.float32]:
    """Standard normal draws (see `quantiles` and `numbers`) for the flat entries [start, stop) of a target tensor."""
    return quantiles().take(numbers(seed, name, shape, start, stop))


def shares(bits: NDArray[np.uint16], k: int, m: int) -> NDArray[np.float64]:
    """The part of each entry that the k-th of m copies has: two of them, drawn by the entry's bits, have half each.

    Parts of 0, 1/2 and 1 round nothing in any dtype, and differ from copy to copy, so that no two copies stay alike.
    """
    one, other = (bits & 255) * np.uint32(m) >> 8, (bits >> 8) * np.uint32(m) >> 8
    return np.asarray(((one == k).astype(np.float64) + (other == k)) / 2)


def _key(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.uint64]:
    label = f"{seed}\0{name}\0{','.join(map(str, shape))}".encode()
    return np.frombuffer(hashlib.sha256(label).digest()[:16], dtype="<u8").astype(np.uint64)
