"""When, what and how to grow: each rule by itself, on runs made by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from growformer.errors import RequestError
from growformer.training.learning_rate import LearningRate, part_of_peak
from growformer.training.recipe import Budget
from growformer.training.schedule import Entry, between, spell_out
from growformer.training.stages import Stage, steps_of
from growformer.training.triggers import At, Law, Now, Size, expected_slope, fires

SMALL, LARGE = Size(1000, 6000.0), Size(4000, 24000.0)


def first_step(at: At, losses: list[float], tokens: int = 10, budget: float = 1000) -> int | None:
    """The step after which a rule fires; what it remembers goes through JSON, as in a checkpoint."""
    import json

    memory: Any = {}
    for step, loss in enumerate(losses, 1):
        now = Now(step, step * tokens, step * tokens * 6000.0, step / budget, loss, SMALL, LARGE)
        found, memory = fires(at, now, json.loads(json.dumps(memory)))
        if found:
            return step
    return None


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        ({"step": 7}, 7),
        ({"tokens": 61}, 7),
        ({"tokens": 60}, 6),
        ({"flops": 6000.0 * 70}, 7),
        ({"share": 0.007}, 7),
        ({"tokens_per_parameter": 0.065}, 7),
    ],
)
def test_counting_rules(rule: dict[str, Any], step: int) -> None:
    assert first_step(At(**rule), [1.0] * 20) == step
    assert first_step(At(**rule), [1.0] * (step - 1)) is None


def test_compute_optimal_looks_at_the_present_model() -> None:
    at = At(tokens_per_parameter=20)
    for size, tokens in ((SMALL, 20_000), (LARGE, 80_000)):
        for seen, found in ((tokens - 1, False), (tokens, True)):
            assert fires(at, Now(1, seen, 0, 0, 1.0, size, LARGE), {})[0] is found


def test_plateau() -> None:
    at = At(plateau={"window": 3, "improvement": 0.1, "patience": 2})
    falling = [10 * 0.8 ** (step // 3) for step in range(30)]
    assert first_step(at, falling) is None
    # Windows 4 and 5 are the first that are not better than the third by a tenth.
    assert first_step(at, falling[:9] + [falling[8]] * 9) == 15
    # One good window between bad ones starts the count again.
    assert first_step(at, [4.0] * 3 + [4.0] * 3 + [3.0] * 3 + [3.0] * 3) is None
    # Noise within windows does not count.
    noisy = [loss * (1.3 if step % 3 == 0 else 0.85) for step, loss in enumerate(falling)]
    assert first_step(at, noisy) is None


LAW = Law(E=1.0, A=2.0, B=30.0, a=0.3, b=0.4)


def loss_at(size: Size, tokens: float) -> float:
    return LAW.E + LAW.A * size.parameters**-LAW.a + LAW.B * tokens**-LAW.b


def test_expected_slope_is_the_law_s_own() -> None:
    for tokens in (100.0, 3000.0):
        step = tokens * 1e-5
        fall = loss_at(LARGE, tokens) - loss_at(LARGE, tokens + step)
        assert expected_slope(LAW, LARGE, loss_at(LARGE, tokens)) == pytest.approx(
            fall / (step * LARGE.flops_per_token), rel=1e-4
        )
    assert expected_slope(LAW, LARGE, LAW.E + LAW.A * LARGE.parameters**-LAW.a) is None


def test_slope_crossing_is_where_the_slopes_are_equal() -> None:
    at = At(slope={"window": 3, "law": LAW.model_dump()})
    tokens, steps = 200, 4000
    losses = [loss_at(SMALL, step * tokens) for step in range(1, steps)]
    found = first_step(at, losses, tokens)
    assert found is not None

    def lead(step: int) -> float:
        """The small model's slope over the larger's at the same loss."""
        mine = expected_slope(LAW, SMALL, losses[step - 1])
        other = expected_slope(LAW, LARGE, losses[step - 1])
        assert mine is not None and other is not None
        return mine / other

    assert lead(found - 3) > 1 > lead(found + 1)
    # Where size makes no difference to the loss, four times the cost is never worth it.
    same = LAW.model_copy(update={"A": 1e-9})
    losses = [same.E + same.B * (step * tokens) ** -same.b for step in range(1, steps)]
    assert first_step(At(slope={"window": 3, "law": same.model_dump()}), losses, tokens) is None


def test_slope_per_decade() -> None:
    # A loss of 3 - 0.5 log10(C) falls by half a nat in each decade, wherever it is looked at.
    losses = [3 - 0.5 * math.log10(step * 60000.0) for step in range(1, 30)]
    assert first_step(At(slope={"window": 5, "per_decade": 0.51}), losses) == 5
    assert first_step(At(slope={"window": 5, "per_decade": 0.49}), losses) is None


@pytest.mark.parametrize("rule", [{}, {"step": 1, "tokens": 2}, {"share": 1.0}, {"step": 0}, {"slope": {"window": 5}}])
def test_rules_that_are_none(rule: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        At(**rule)


@given(
    st.integers(1, 500),
    st.integers(0, 500),
    st.integers(1, 8),
    st.sampled_from(["linear", "geometric"]),
    st.integers(1, 64),
)
def test_sizes_between(first: int, more: int, count: int, how: str, multiple: int) -> None:
    last = first + more
    sizes = between(first, last, count, how, multiple)
    assert len(sizes) == count and sizes[-1] == last
    assert [first, *sizes] == sorted([first, *sizes])
    assert all(size % multiple == 0 or size in (first, last) for size in sizes)


def test_sequences_are_even() -> None:
    assert between(2, 10, 4, "linear") == [4, 6, 8, 10]
    assert between(2, 32, 4, "geometric") == [4, 8, 16, 32]
    assert between(64, 256, 3, "geometric", 32) == [96, 160, 256]


SIZES: dict[str, int | None] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "n_inner": None}


def spelled(*entries: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    found = spell_out([Entry(**entry) for entry in entries], SIZES)
    return [(growth.at.said(), dict(growth.to)) for growth in found]


def test_entries_are_spelled_out() -> None:
    depth_and_width = {
        "at": {"share": [0.2, 0.4, 0.6]},
        "to": {"hidden_size": 256, "num_hidden_layers": 8},
        "sequence": "linear",
        "multiple_of": {"hidden_size": 64},
    }
    assert spelled({"at": {"step": 5}, "to": {"intermediate_size": 256}}, depth_and_width) == [
        ("step: 5", {"intermediate_size": 256}),
        ("share: 0.2", {"hidden_size": 128, "num_hidden_layers": 4}),
        ("share: 0.4", {"hidden_size": 192, "num_hidden_layers": 6}),
        ("share: 0.6", {"hidden_size": 256, "num_hidden_layers": 8}),
    ]
    custom = {"at": {"plateau": {}}, "to": {"hidden_size": [96, 96, 192], "num_hidden_layers": [2, 3, 3]}}
    assert spelled(custom) == [
        ("plateau", {"hidden_size": 96}),
        ("plateau", {"num_hidden_layers": 3}),
        ("plateau", {"hidden_size": 192}),
    ]
    again = {"at": {"tokens_per_parameter": 20}, "to": {"num_hidden_layers": 8}, "sequence": "geometric", "stages": 2}
    assert spelled(again) == [
        ("tokens_per_parameter: 20", {"num_hidden_layers": 4}),
        ("tokens_per_parameter: 20", {"num_hidden_layers": 8}),
    ]
    assert spelled({"at": {"step": 3}, "to": {"n_inner": 300}}) == [("step: 3", {"n_inner": 300})]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"at": {"step": 1}, "to": {"hiden_size": 96}}, r"grow\[1\]\.to\.hiden_size: the model's config has no size"),
        ({"at": {"step": 9}, "to": {"hidden_size": 32}}, r"grow\[1\]\.to\.hidden_size: 32 is smaller than the 64"),
        ({"at": {"step": 9}, "to": {"hidden_size": 64}}, r"grow\[1\]: one of its growths changes no size"),
        ({"at": {"step": 5}, "to": {"hidden_size": 96}}, r"grow\[1\]\.at\.step: 5 is not after the growth before it"),
        ({"at": {"step": [6, 7]}, "to": {"hidden_size": 96}}, r"2 growths and one size; add sequence: linear or geom"),
        (
            {"at": {"step": [6, 7]}, "to": {"hidden_size": [80, 96, 128]}},
            r"different numbers of growths \(to\.hid",
        ),
        ({"at": {"step": 6}, "to": {"hidden_size": 96}, "sequence": "linear"}, r"sequence: needs several growths; say"),
        ({"at": {"step": [8, 7]}, "to": {"hidden_size": [80, 96]}}, r"grow\[1\]\.at\.step: 7 is not after"),
        (
            {"at": {"step": [6, 7]}, "to": {"n_inner": 300}, "sequence": "linear"},
            r"n_inner: the first model's config le",
        ),
    ],
)
def test_entries_that_make_no_sense(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        spelled({"at": {"step": 5}, "to": {"intermediate_size": 256}}, entry)


def parts(schedule: LearningRate, steps: int) -> list[float]:
    return [part_of_peak(schedule, i / steps, (i + 1) / steps) for i in range(steps)]


def test_wsd() -> None:
    found = parts(LearningRate(warmup=0.3, decay=0.4), 10)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert parts(LearningRate(warmup=0, decay=0.5, floor=0.2), 4) == pytest.approx([1, 1, 1, 0.6])
    assert parts(LearningRate(warmup=0, decay=0), 3) == [1, 1, 1]


def test_other_shapes() -> None:
    assert parts(LearningRate(shape="constant", warmup=0.5), 4) == pytest.approx([0.5, 1, 1, 1])
    assert parts(LearningRate(shape="linear", warmup=0), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert parts(LearningRate(shape="cosine", warmup=0, floor=0.5), 2) == pytest.approx([1, 0.75])


@given(
    st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.integers(1, 50),
)
def test_no_step_is_taken_at_a_rate_of_zero(shape: Any, warmup: float, decay: float, floor: float, steps: int) -> None:
    more = {"decay": decay} if shape == "wsd" else {}
    found = parts(LearningRate(shape=shape, warmup=warmup, floor=floor, **more), steps)
    assert all(0 < part <= 1 + 1e-12 for part in found)


def test_steps_of_a_budget() -> None:
    growth = spell_out([Entry(at={"step": 10}, to={"hidden_size": 96})], SIZES)[0]
    stages = [Stage(None, {}, SMALL), Stage(growth, {}, LARGE)]
    assert steps_of(Budget(steps=7), stages, 10) == 7
    assert steps_of(Budget(tokens=71), stages, 10) == 8
    # Ten steps of 60,000 FLOPs, then steps of four times as many.
    assert steps_of(Budget(flops=60_000 * 18), stages, 10) == 12
    # A batch on which the growth asks the old model's loss, and tries the new one, takes as much as five small steps.
    asking = [stages[0], Stage(growth, {}, LARGE, asks=6000.0, searches=24000.0)]
    assert steps_of(Budget(flops=60_000 * 18), asking, 10) == 11
    growth = spell_out([Entry(at={"plateau": {}}, to={"hidden_size": 96})], SIZES)[0]
    assert steps_of(Budget(flops=1e9), [stages[0], Stage(growth, {}, LARGE)], 10) is None
