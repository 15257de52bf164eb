"""Lines of arms, from results that are made up so that the answers are known."""

from typing import Any

import pytest

from growformer.bench.suite import Suite
from growformer.bench.summary import Summary, best_rate, summarize
from growformer.errors import SourceError
from tests.bench.bench_kit import smoke

BUDGET, CHEAP, DEAR = 1e9, 1e5, 2e5
SAVED = {
    "scratch": 0.0,
    "scratch-half": 0.0,
    "small": 0.05,
    "grown": 0.3,
    "grown-at-0": 0.1,
    "nothing": 0.05,
    "asked": 0.1,
    "rank": 0.2,
    "tokens": -0.1,
}
"""What each arm saves over scratch."""

LUCK = {0: 1.0, 1: 1.08}
"""What each seed multiplies every loss by: far more than any difference between arms, and the same for all of them."""


def law(flops: float) -> float:
    return 20 * flops**-0.1


def made(saved: dict[str, float] = SAVED, changes: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Results of the smoke suite at a rate of 0.01 on two seeds; 0.003 is worse on the first."""
    suite = Suite.model_validate({**smoke(), **(changes or {})}).model_dump(mode="json") | {"hash": "h"}
    out = {}
    for arm in suite["arms"]:
        name, grown = arm["name"], bool(arm["grow"]) and arm["grow"][0]["at"] > 0
        cost, alike = BUDGET * arm["budget"], arm["same_as"] or name
        before = 0.5 * BUDGET if grown else 0.0
        for rate, seed in ((0.003, 0), (0.01, 0), (0.01, 1)):
            loss = law(cost / (1 - saved[name])) * LUCK[seed] * (1.2 if rate == 0.003 else 1.0)
            out[f"{name}--lr{rate:g}--seed{seed}"] = {
                "format": 1,
                "suite": suite,
                "arm": name,
                "rate": rate,
                "seed": seed,
                "bits_per_byte": {"valid": loss, "test": loss, "weights": f"{alike}{rate}{seed}"},
                "failure": None,
                "steps": 10,
                "tokens": before / CHEAP + (cost - before) / DEAR,
                "tokens_before_last_growth": before / CHEAP,
                "flops": {"total": cost, "budget": cost, "before_last_growth": before},
                "parameters": [9, 15] if arm["grow"] else [15],
                "flops_per_token": [CHEAP, CHEAP if name == "nothing" else DEAR] if grown else [DEAR],
                "seconds": 2.0,
                "evaluations": [[0, 0, 0.0, 8.0], [5, 5, cost / 2, loss * 1.2], [10, 10, cost, loss]],
                "growths": [{"step": 5, "flops": before, "bits_per_byte": [3.5, 3.75]}] if grown else [],
                "versions": {"torch": "2"},
                "source": "s",
            }  # fmt: skip
    return out


def line(summary: Summary, name: str) -> Any:
    return next(line for line in summary.lines if line.name == name)


def test_a_known_saving_is_recovered_and_that_of_step_0_taken_off() -> None:
    """Scratch would take 1 / 0.7 as much; grown before the first step it takes 1 / 0.9: 1 - 0.7 / 0.9 is claimed."""
    summary = summarize(made())
    grown = line(summary, "grown")
    assert grown.saved.mean == pytest.approx(0.3) and grown.saved.low == pytest.approx(0.3)
    assert grown.claimed.mean == pytest.approx(1 - 0.7 / 0.9) and grown.verdict == "saves"
    assert line(summary, "grown-at-0").saved.mean == pytest.approx(0.1)
    assert line(summary, "grown-at-0").claimed is None and line(summary, "grown-at-0").verdict == ""
    assert grown.beyond and not line(summary, "scratch").beyond
    assert summary.missing == 0 and summary.least == "small"
    assert grown.seconds == 2.0 and grown.all_flops == 3 * BUDGET


def test_how_far_the_curve_is_from_its_own_arms() -> None:
    """Two budgets bear a line; a third one off it shows."""
    assert summarize(made()).misfit == pytest.approx(0, abs=1e-9)
    data = smoke()
    data["arms"].insert(0, {"name": "scratch-more", "budget": 2.0})
    data["analysis"]["curve"].append("scratch-more")
    changes = {"arms": data["arms"], "analysis": data["analysis"]}
    assert summarize(made({**SAVED, "scratch-more": 0.0}, changes)).misfit == pytest.approx(0, abs=1e-9)
    found = summarize(made({**SAVED, "scratch-more": 0.2}, changes)).misfit
    assert found is not None and 0.05 < found < 0.2


def test_where_nothing_is_saved_nothing_is_claimed() -> None:
    summary = summarize(made({**SAVED, "grown": 0.0, "grown-at-0": 0.0}))
    assert line(summary, "grown").saved.mean == pytest.approx(0.0, abs=1e-12)
    assert line(summary, "grown").verdict == "undecided"
    assert line(summary, "grown").difference.mean == pytest.approx(0.0, abs=1e-12)


def test_a_saving_that_is_all_of_step_0_is_none() -> None:
    summary = summarize(made({**SAVED, "grown": 0.2, "grown-at-0": 0.2}))
    assert line(summary, "grown").saved.mean == pytest.approx(0.2)
    assert line(summary, "grown").claimed.mean == pytest.approx(0.0, abs=1e-12)
    assert line(summary, "grown").verdict == "undecided"


def test_a_bad_initialisation_makes_no_saving() -> None:
    """Beyond step 0 it saves a lot, and against scratch it loses: copies that nothing tells apart do so."""
    grown = line(summarize(made({**SAVED, "grown": -0.5, "grown-at-0": -1.5})), "grown")
    assert grown.claimed.mean == pytest.approx(1 - 1.5 / 2.5) and grown.saved.mean == pytest.approx(-0.5)
    assert grown.verdict == "costs" and grown.least == grown.saved


def test_both_savings_must_stand() -> None:
    savings = {"grown": 0.1, "grown-at-0": -0.5}
    analysis = {**smoke()["analysis"], "margin": 0.15}
    assert line(summarize(made({**SAVED, **savings})), "grown").verdict == "saves"
    assert line(summarize(made({**SAVED, **savings}, {"analysis": analysis})), "grown").verdict == "undecided"


def test_growth_that_costs() -> None:
    assert line(summarize(made({**SAVED, "grown": -0.2})), "grown").verdict == "costs"


def test_the_margin_is_that_of_the_suite() -> None:
    analysis = {**smoke()["analysis"], "margin": 0.25}
    assert line(summarize(made(changes={"analysis": analysis})), "grown").verdict == "undecided"


def test_token_credit_of_a_line() -> None:
    """D1 = 5000, D2 = 2500 tokens; scratch would need 1e9 / 0.7 / 2e5 = 7142.9: kappa = 4642.9 / 5000, above 1/2."""
    grown = line(summarize(made()), "grown")
    assert grown.credit.mean == pytest.approx((BUDGET / 0.7 / DEAR - 2500) / 5000)
    assert grown.break_even == pytest.approx(0.5)
    assert line(summarize(made()), "nothing").credit is None


def test_where_credit_pays_after_growths_of_different_cost() -> None:
    """Two growths, of which the first asks a loss: f (kappa - 1/g) is what is saved all the same."""
    results = made()
    for result in results.values():
        if result["arm"] == "grown":  # 2000 tokens at 1e5, 3000 at 1.5e5, a loss asked for 1e7; the rest at 2e5
            result["flops_per_token"] = [CHEAP, 1.5e5, DEAR]
            result["tokens_before_last_growth"] = 5000.0
            result["tokens"] = 5000.0 + (BUDGET - 2000 * CHEAP - 3000 * 1.5e5 - 1e7) / DEAR
    grown = line(summarize(results), "grown")
    assert grown.break_even == pytest.approx((2000 * CHEAP + 3000 * 1.5e5 + 1e7) / 5000 / DEAR)
    share = 5000 / (BUDGET / 0.7 / DEAR)
    assert share * (grown.credit.mean - grown.break_even) == pytest.approx(grown.saved.mean)


def test_what_is_saved_against_not_growing() -> None:
    """The small model at two budgets has a curve of its own: 5 % cheaper than scratch, where growth is 30 %."""
    data = smoke()
    small = next(arm for arm in data["arms"] if arm["name"] == "small")
    data["arms"].append({**small, "name": "small-half", "budget": 0.5})
    results = made({**SAVED, "small-half": 0.05}, {"arms": data["arms"]})
    grown = line(summarize(results), "grown")
    assert grown.saved_over_small.mean == pytest.approx(1 - 0.7 / 0.95)
    losses = {seed: law(BUDGET / 0.7) * luck - law(BUDGET / 0.95) * luck for seed, luck in LUCK.items()}
    assert grown.over_small.mean == pytest.approx(sum(losses.values()) / 2) and grown.over_small.mean < 0
    assert grown.beyond_small and not line(summarize(results), "nothing").beyond_small
    one = line(summarize(made()), "grown")  # the small model at one budget: a difference, and no curve
    assert one.saved_over_small is None and one.over_small.mean == pytest.approx(grown.over_small.mean)
    assert line(summarize(results), "small").over_small is None
    assert line(summarize(results), "tokens").over_small is None  # another model's small one


def test_whether_the_final_size_is_worth_having() -> None:
    summary = summarize(made())
    assert summary.smaller == "small" and summary.worth is not None and summary.worth.mean < 0
    summary = summarize(made({**SAVED, "small": -0.2, "nothing": -0.2}))
    assert summary.smaller == "small" and summary.worth is not None and summary.worth.mean > 0


def test_the_control_is_compared_bit_for_bit() -> None:
    results = made()
    assert line(summarize(results), "nothing").control is True
    results["nothing--lr0.01--seed1"]["bits_per_byte"]["weights"] = "other"
    assert line(summarize(results), "nothing").control is False
    assert line(summarize(results), "grown").control is None


def test_the_rate_is_chosen_on_valid_and_the_lower_of_equals() -> None:
    results = made()
    trials = [results["scratch--lr0.003--seed0"], results["scratch--lr0.01--seed0"]]
    assert best_rate(trials) == 0.01
    trials[0]["bits_per_byte"]["test"] = 0.1  # nobody looks at it
    assert best_rate(trials) == 0.01
    trials[0]["bits_per_byte"]["valid"] = trials[1]["bits_per_byte"]["valid"]
    assert best_rate(trials) == 0.003
    assert best_rate([{**trials[1], "bits_per_byte": None}]) is None


def test_a_rate_at_the_end_of_the_grid_is_told() -> None:
    results = made()
    assert not line(summarize(results), "grown").edge  # of two, each is an end
    results = made(changes={"rates": [0.003, 0.005, 0.01]})
    assert line(summarize(results), "grown").rate is None  # one is not tried yet
    results["grown--lr0.005--seed0"] = {**results["grown--lr0.003--seed0"], "rate": 0.005}
    assert line(summarize(results), "grown").edge


def test_a_trial_that_diverged_is_no_candidate() -> None:
    results = made()
    results["grown--lr0.003--seed0"] |= {"bits_per_byte": None, "failure": "step 3: the loss is nan"}
    assert line(summarize(results), "grown").rate == 0.01


def test_what_is_missing_is_counted_and_nothing_made_up() -> None:
    results = made()
    del results["scratch-half--lr0.01--seed1"], results["grown--lr0.01--seed1"]
    summary = summarize(results)
    assert summary.missing == 2 and list(summary.curves) == [0]
    assert line(summary, "grown").saved.low is None and line(summary, "grown").verdict == "not measured"
    with pytest.raises(SourceError, match="no results"):
        summarize({})
    # Of two learning rates one is not tried yet: whatever is there is no result of the arm.
    results = made()
    for name in ("grown--lr0.01--seed0", "grown--lr0.01--seed1"):
        del results[name]
    grown = line(summarize(results), "grown")
    assert grown.rate is None and grown.runs == {} and grown.loss is None and len(grown.trials) == 1
    assert summarize(results).missing == 2


def test_noise_is_that_of_seeds() -> None:
    summary = summarize(made())
    assert summary.noise is not None and summary.noise == pytest.approx(0.08 * law(BUDGET) / 2**0.5, rel=0.1)
