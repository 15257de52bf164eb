"""Spans say no more than looking at every entry does, and no less."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.proof.axes import NONE
from growformer.proof.certificate import DictTensors
from growformer.proof.equations import check_old
from growformer.proof.places import OPEN, REACHED, SHUT, Places
from growformer.proof.spans import Spans, holds, is_shut_or_open

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dim(parts: Sequence[tuple[int, int, int]], factors: Sequence[Factor] = (ONE,), which: Sequence[int] = ()) -> Places:
    """A dim from runs of (count, state, first old index); `which` factor each run carries."""
    source, state, factor = list[int](), list[int](), list[int]()
    for run, (count, what, first) in enumerate(parts):
        source += range(first, first + count) if what == REACHED else [NONE] * count
        state += [what] * count
        factor += [which[run] if which else 0] * count
    old = max(source) + 1
    taken = torch.tensor(source) >= 0
    return Places(
        old,
        torch.tensor(source),
        torch.tensor(state, dtype=torch.uint8),
        tuple(factors),
        torch.tensor(factor),
        torch.where(taken, taken.cumsum(0) - 1, NONE),
        torch.ones(len(source), dtype=torch.float64),
        taken.double(),
    )


HALF = Factor.of(1, 2)
ODD = Factor.sqrt(2, 3)
CASES = {
    "plain": [dim([(20, REACHED, 0), (5, SHUT, 0)]), dim([(30, REACHED, 0), (9, OPEN, 0)])],
    "interleaved": [
        dim([(16, REACHED, 0), (4, OPEN, 0), (16, REACHED, 16), (4, OPEN, 0)]),
        dim([(7, SHUT, 0), (40, REACHED, 0)]),
    ],
    "moved": [dim([(16, REACHED, 16), (16, REACHED, 0)]), dim([(3, OPEN, 0), (33, REACHED, 0)])],
    "factors": [
        dim([(16, REACHED, 0), (16, REACHED, 16), (3, SHUT, 0)], (ONE, HALF), (0, 1, 0)),
        dim([(17, REACHED, 0), (17, REACHED, 17), (4, OPEN, 0)], (HALF, ODD), (1, 0, 0)),
    ],
    "vector": [dim([(40, REACHED, 0), (9, SHUT, 0), (2, OPEN, 0)])],
    "three": [dim([(4, REACHED, 0), (1, OPEN, 0)]), dim([(18, REACHED, 0)]), dim([(18, REACHED, 0), (2, SHUT, 0)])],
}


def grown(places: Sequence[Places], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A source, what it grows to, and the state of every entry."""
    generator = torch.Generator().manual_seed(7)
    old = torch.randn([d.old for d in places], generator=generator).to(dtype)
    new = torch.randn([d.new for d in places], generator=generator).to(dtype)
    state = torch.zeros([d.new for d in places], dtype=torch.uint8)
    for k, d in enumerate(places):
        state = torch.maximum(state, d.state.reshape([-1 if i == k else 1 for i in range(len(places))]))
    for at in (state == REACHED).nonzero().tolist():
        factor = ONE
        for d, i in zip(places, at, strict=True):
            factor = factor * d.factors[int(d.factor[i])]
        value = old[tuple(int(d.source[i]) for d, i in zip(places, at, strict=True))]
        new[tuple(at)] = value if factor == ONE else (value.double() * float(factor)).to(dtype)
    new[state == SHUT] = 0
    return old, new, state


def check(places: Sequence[Places], old: Tensor, new: Tensor, spans: Spans | None) -> tuple[str | None, int, int]:
    found = check_old(places, DictTensors({"w": new}), "w", DictTensors({"v": old}), "v", spans=spans)
    return found.wrong, found.zero, found.free


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_spans_and_entries_agree(case: str, dtype: torch.dtype) -> None:
    places = CASES[case]
    spans = Spans.of(places)
    assert spans is not None
    old, new, state = grown(places, dtype)
    shut, opened = int((state == SHUT).sum()), int((state == OPEN).sum())
    assert holds(spans, slice(0, len(new)), new, lambda rows: old[rows]) == (shut, opened)
    assert check(places, old, new, spans) == check(places, old, new, None) == (None, shut, opened)
    rng, wrongs = random.Random(case), 0
    for _ in range(60):
        at = tuple(rng.randrange(n) for n in new.shape)
        kind = int(state[at])
        bad = new.clone()
        bad[at] = rng.choice((math.inf, math.nan, float(new[at]) * 2 + 1))
        wrong = kind != OPEN or not math.isfinite(float(bad[at]))
        wrongs += wrong
        assert (holds(spans, slice(0, len(new)), bad, lambda rows: old[rows]) is None) == wrong, at
        said = check(places, old, bad, spans)
        assert said == check(places, old, bad, None)
        assert (said[0] is not None) == wrong
    assert wrongs > 20


@pytest.mark.parametrize("case", CASES)
def test_any_rows(case: str) -> None:
    places = CASES[case]
    spans = Spans.of(places)
    assert spans is not None
    old, new, state = grown(places, torch.float32)
    for start in range(0, len(new), 3):
        for stop in (start + 1, len(new)):
            rows = slice(start, stop)
            cut = state[rows]
            wanted = int((cut == SHUT).sum()), int((cut == OPEN).sum())
            assert holds(spans, rows, new[rows], lambda rows: old[rows]) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_finite(dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    tiny = torch.tensor([0.0, torch.finfo(dtype).smallest_normal], dtype=dtype)
    large = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert is_shut_or_open(zeros, SHUT) and is_shut_or_open(zeros[:0], SHUT)
    assert not is_shut_or_open(tiny, SHUT) and not is_shut_or_open(-tiny, SHUT)
    assert is_shut_or_open(large, OPEN) and is_shut_or_open(tiny, OPEN)
    for odd in (math.inf, -math.inf, math.nan):
        assert not is_shut_or_open(torch.tensor([0.0, odd, 1.0], dtype=dtype), OPEN)
        assert not is_shut_or_open(torch.tensor([0.0, odd, 0.0], dtype=dtype), SHUT)
    # Every other entry of a larger tensor.
    wide = torch.stack([large, zeros], 1)
    assert is_shut_or_open(wide[:, 1], SHUT) and not is_shut_or_open(wide[:, 0], SHUT)


def test_short_spans_and_sums_are_left_to_the_entries() -> None:
    single = dim([(1, REACHED, 63 - i) for i in range(64)])
    assert Spans.of([single]) is None
    copies = Places(
        2,
        torch.tensor([0, 1, 0, 1]),
        torch.zeros(4, dtype=torch.uint8),
        (ONE,),
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([0, 1, 0, 1]),
        torch.ones(4, dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
    )
    assert copies.sums and Spans.of([copies]) is None
