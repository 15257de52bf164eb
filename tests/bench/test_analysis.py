"""What results say, on curves whose answers are worked out by hand."""

import math

import numpy as np
import pytest

from growformer.bench.analysis import (
    fit_curve,
    interval,
    log_ratio,
    noise,
    saving,
    t_quantile,
    token_credit,
)

COSTS = (1e12, 2e12, 4e12)


def law(flops: float, floor: float = 0.5) -> float:
    """L(C) = floor + 40 C^-0.1."""
    return floor + 40 * flops**-0.1


def test_a_power_law_is_found_again() -> None:
    curve = fit_curve(COSTS, [law(c) for c in COSTS], floor=0.5)
    assert curve is not None
    assert curve.a == pytest.approx(0.1) and math.exp(curve.log_a) == pytest.approx(40)
    assert curve.loss(3e12) == pytest.approx(law(3e12))
    assert curve.flops(law(3e12)) == pytest.approx(3e12)
    assert curve.covers(law(3e12)) and not curve.covers(law(5e12)) and not curve.covers(law(5e11))


def test_a_wrong_floor_gives_another_answer_away_from_the_points() -> None:
    curve = fit_curve(COSTS, [law(c) for c in COSTS], floor=0.0)
    assert curve is not None and curve.flops(law(1e14)) != pytest.approx(1e14, rel=0.01)


@pytest.mark.parametrize("losses", [(2.0, 2.0, 2.0), (1.9, 2.0, 2.1)])
def test_a_curve_that_does_not_fall_has_no_cost(losses: tuple[float, ...]) -> None:
    curve = fit_curve(COSTS, losses)
    assert curve is not None and curve.flops(1.5) is None and log_ratio(curve, 1.5, 1e12) is None


def test_what_cannot_be_fitted() -> None:
    assert fit_curve((1e12, 1e12), (2.0, 1.9)) is None
    assert fit_curve(COSTS, (2.0, 1.5, 1.0), floor=1.0) is None
    curve = fit_curve(COSTS, [law(c) for c in COSTS], floor=0.5)
    assert curve is not None and curve.flops(0.5) is None and curve.flops(0.4) is None


@pytest.mark.parametrize("share", [0.3, 0.0, -0.25])
def test_a_known_saving_is_recovered(share: float) -> None:
    """An arm that took 1e12 and has the loss of scratch at 1e12 / (1 - share); with 0 it is scratch itself."""
    curve = fit_curve(COSTS, [law(c) for c in COSTS], floor=0.5)
    assert curve is not None
    ratio = log_ratio(curve, law(1e12 / (1 - share)), 1e12)
    assert ratio is not None and saving(ratio) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 0.6, 0.0])
def test_token_credit(kappa: float) -> None:
    """D1 = 3e6 at 1e6 FLOPs a token, D2 = 2e6 at 4e6: scratch needs 2e6 + kappa 3e6 tokens of the final size."""
    before, after, cheap, dear = 3e6, 2e6, 1e6, 4e6
    curve = fit_curve(COSTS, [law(c) for c in COSTS], floor=0.5)
    assert curve is not None
    equal = (after + kappa * before) * dear
    found = token_credit(curve, law(equal), dear, before, after)
    assert found == pytest.approx(kappa, abs=1e-9)
    # f (kappa - 1/g) is the saving, with f = D1 / D_eff and g = 4.
    ratio = log_ratio(curve, law(equal), before * cheap + after * dear)
    assert ratio is not None
    assert saving(ratio) == pytest.approx(before / (after + kappa * before) * (kappa - 1 / 4), abs=1e-9)
    assert token_credit(curve, law(equal), dear, 0, after) is None


def test_students_t() -> None:
    """Table values."""
    for freedom, value in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)):
        assert t_quantile(0.975, freedom) == pytest.approx(value, rel=1e-5)
    assert t_quantile(0.95, 5) == pytest.approx(2.01505, rel=1e-5)
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)


def test_the_interval_of_three_seeds() -> None:
    """Mean 2, s = 1, n = 3: 2 +- 4.30265 / sqrt(3)."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.count == 3 and found.low is not None and found.high is not None
    assert found.high - 2 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found.low == pytest.approx(4 - found.high)
    mapped = found.map(math.exp)
    assert (mapped.mean, mapped.low, mapped.high) == (math.exp(2), math.exp(found.low), math.exp(found.high))
    alone = interval([1.0])
    assert (alone.mean, alone.low, alone.high) == (1.0, None, None)
    with pytest.raises(ValueError, match="no value"):
        interval([])


def test_the_bootstrap_stays_within_the_values_and_is_repeatable() -> None:
    values = [0.1, 0.2, 0.25, 0.4]
    found = interval(values, kind="bootstrap", draws=2000)
    assert found == interval(values, kind="bootstrap", draws=2000)
    assert found.low is not None and found.high is not None
    assert 0.1 <= found.low < found.mean < found.high <= 0.4


@pytest.mark.parametrize("kind", ["t", "bootstrap"])
def test_intervals_hold_the_truth_as_often_as_they_say(kind: str) -> None:
    """Of 400 draws of 8 seeds around 1, 95 % intervals hold 1 in most; those of a mean that is off hold it in few."""
    generator = np.random.default_rng(1)
    held = wrong = 0
    for _ in range(400):
        found = interval(generator.normal(1, 0.1, 8).tolist(), kind=kind, draws=300)  # type: ignore[arg-type]
        assert found.low is not None and found.high is not None
        held += found.low <= 1 <= found.high
        wrong += found.low <= 1.2 <= found.high
    assert held / 400 > (0.92 if kind == "t" else 0.85)
    assert wrong / 400 < 0.1


def test_noise_pools_arms() -> None:
    """Arms with s^2 = 1 (two values) and s^2 = 4 (three): sqrt((1 + 2 * 4) / 3)."""
    assert noise([[0.0, math.sqrt(2)], [8.0, 10.0, 12.0], [5.0]]) == pytest.approx(math.sqrt(3))
    assert noise([[1.0], []]) is None
