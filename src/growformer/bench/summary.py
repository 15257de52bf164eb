"""Results put together: the line of each arm, from result files and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growformer.bench.analysis import Curve, Interval, fit_curve, interval, log_ratio, noise, saving, token_credit
from growformer.bench.results import added_arms, suite_of
from growformer.bench.suite import Analysis, runs_of
from growformer.errors import SourceError

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """An arm.

    Attributes:
        name, about: of it.
        arm: as the suite says it.
        rate: its chosen learning rate; None: trials are missing, or none ended.
        edge: whether that is the lowest or the highest of those tried, so that a better one may lie beyond.
        runs: names of the results at that rate, by seed.
        trials: names of all results on the tuning seed, by rate.
        loss: bits per byte of held-out text (`test`).
        result: of one of the runs: sizes, steps, tokens.
        seconds: mean training time of a run.
        difference: loss minus that of the final size from scratch at the suite's budget, paired by seed.
        over_small: loss minus that of its own first model, never grown, at the suite's budget, paired by seed.
        saved_over_small: share of FLOPs saved at equal loss against the curve of that model; None: the suite has it at
            one budget only.
        beyond_small: whether some loss lies outside of those that this curve was fitted to.
        saved: share of FLOPs saved at equal loss against the scratch curve; None: it is not there, or not reached.
        beyond: whether some loss lies outside of those that the curve was fitted to.
        claimed: `saved` with the saving of the same growth before the first step taken off.
        credit: kappa.
        break_even: 1/g, which kappa must exceed: what a token before the last growth cost, in tokens after it.
        verdict: what the intervals of `saved` and `claimed` say.
        control: whether all runs equal those of `same_as`, bit for bit; None: nothing to compare.
        all_flops: of every run of the arm, trials included.
    """

    name: str
    about: str
    arm: Mapping[str, Any]
    rate: float | None
    edge: bool
    runs: Mapping[int, str]
    trials: Mapping[float, str]
    loss: Interval | None
    result: Result | None
    seconds: float | None
    difference: Interval | None
    over_small: Interval | None
    saved_over_small: Interval | None
    beyond_small: bool
    saved: Interval | None
    beyond: bool
    claimed: Interval | None
    credit: Interval | None
    break_even: float | None
    verdict: str
    control: bool | None
    all_flops: float

    @property
    def least(self) -> Interval | None:
        """The lesser of `saved` and `claimed`."""
        return min((x for x in (self.saved, self.claimed) if x), key=lambda x: x.mean, default=None)

    @property
    def kind(self) -> str:
        """What sort of arm it is: scratch, still, grown, start (grown before the first step) or control."""
        if self.arm["same_as"] is not None:
            return "control"
        if _claims(self.arm):
            return "grown"
        if self.arm["grow"]:
            return "start"
        return "still" if self.arm["model"] is not None or self.arm["start"] else "scratch"


@dataclass(frozen=True)
class Summary:
    """A suite's results.

    Attributes:
        suite: as its file says it.
        lines: of the arms.
        curves: the scratch curve of each seed.
        misfit: the largest share of FLOPs by which an arm of the scratch curve lies off it: what the curve's shape
            alone may make of a saving.
        noise: standard deviation of a run's loss over seeds, bits per byte; None: unknown.
        least: the arm with the least loss among those that never grow, at the suite's budget.
        worth: loss of the best smaller model that never grows, minus that of the final size from scratch, at the
            suite's budget, paired by seed: the final size is worth having where it is above 0.
        smaller: the name of that arm.
        added: arms that the suite got after its first run.
        missing: how many runs are known to be wanted and have no result.
    """

    suite: Mapping[str, Any]
    lines: Sequence[Line]
    curves: Mapping[int, Curve]
    misfit: float | None
    noise: float | None
    least: str | None
    worth: Interval | None
    smaller: str | None
    added: Sequence[str]
    missing: int


def best_rate(trials: Sequence[Result]) -> float | None:
    """The rate with the least loss on `valid`, the lower one of equals; None: no trial has ended."""
    ended = [(r["bits_per_byte"]["valid"], r["rate"]) for r in trials if r["bits_per_byte"] is not None]
    return float(min(ended)[1]) if ended else None


def summarize(results: Mapping[str, Result]) -> Summary:
    """The lines of all arms.

    Args:
        results: by name, all of one suite.

    Raises:
        SourceError: there are none.
    """
    if not results:
        raise SourceError("there are no results to put together")
    suite = suite_of(results)
    found = _Found(suite, results)
    lines = [found.line(arm) for arm in suite["arms"]]
    still = [line for line in lines if _still(line.arm) and line.arm["budget"] == 1]
    least = next(iter(by_loss(still)), None)
    smaller = next(iter(by_loss([line for line in still if line.arm["start"] and line.arm["model"] is None])), None)
    spread = noise([[found.loss(name) for name in line.runs.values()] for line in lines])
    off = [abs(line.saved.mean) for line in lines if line.name in found.analysis.curve and line.saved]
    return Summary(
        suite, lines, found.curves, max(off, default=None), spread,
        least=least.name if least else None,
        worth=smaller.difference if smaller else None,
        smaller=smaller.name if smaller else None,
        added=added_arms(results),
        missing=found.missing(lines),
    )  # fmt: skip


def _still(arm: Mapping[str, Any]) -> bool:
    """Whether nothing in an arm grows."""
    return not arm["grow"] and arm["factorised"] is None


def by_loss(lines: Sequence[Line]) -> list[Line]:
    """Those that have a loss, the least first."""
    found = [(line.loss.mean, at) for at, line in enumerate(lines) if line.loss]
    return [lines[at] for _, at in sorted(found)]


class _Found:
    """Looks up what lines are made of."""

    def __init__(self, suite: Mapping[str, Any], results: Mapping[str, Result]) -> None:
        self.suite, self.results = suite, results
        self.analysis = Analysis.model_validate(suite["analysis"])
        arms = {arm["name"]: arm for arm in suite["arms"]}
        self.rates = {name: self._rate(arms[arm["same_as"] or name]) for name, arm in arms.items()}
        self.chosen = {name: self._runs(name, rate) for name, rate in self.rates.items()}
        made = {seed: self._curve(seed, self.analysis.curve) for seed in suite["seeds"]}
        self.curves = {seed: curve for seed, curve in made.items() if curve is not None}
        budgets = {arm["name"]: arm["budget"] for arm in suite["arms"]}
        self.scratch = next((name for name in self.analysis.curve if budgets[name] == 1), None)

    def loss(self, name: str) -> float:
        return float(self.results[name]["bits_per_byte"]["test"])

    def line(self, arm: Mapping[str, Any]) -> Line:
        name, runs = arm["name"], self.chosen[arm["name"]]
        trials = {r["rate"]: n for n, r in self._tried(name).items()}
        tried = self._rates(arm)
        rate = self.rates[name]
        some = self.results[next(iter(runs.values()))] if runs else None
        ratios, small = self._ratios(name), self._still_curves(arm)
        saved, claimed = _mapped(self._interval(ratios)), _mapped(self._claimed(arm, ratios))
        credit = self._interval(self._credits(name)) if arm["model"] is None else None
        return Line(
            name=name,
            about=arm["about"],
            arm=arm,
            rate=rate,
            edge=rate is not None and len(tried) > 2 and rate in (min(tried), max(tried)),
            runs=runs,
            trials=trials,
            loss=self._interval({seed: self.loss(n) for seed, n in runs.items()}),
            result=some,
            seconds=sum(self.results[n]["seconds"] for n in runs.values()) / len(runs) if runs else None,
            difference=self._difference(name, self.scratch),
            over_small=self._difference(name, self._small(arm)),
            saved_over_small=_mapped(self._interval(self._ratios(name, small))),
            beyond_small=any(not curve.covers(self.loss(runs[s])) for s, curve in small.items() if s in runs),
            saved=saved,
            beyond=any(not self.curves[seed].covers(self.loss(runs[seed])) for seed in ratios),
            claimed=claimed,
            credit=credit,
            break_even=_break_even(some) if credit is not None and some else None,
            verdict=_verdict([saved, claimed], self.analysis.margin) if _claims(arm) else "",
            control=self._same(arm),
            all_flops=sum(r["flops"]["total"] for r in self.results.values() if r["arm"] == name),
        )

    def missing(self, lines: Sequence[Line]) -> int:
        count = 0
        for line in lines:
            tried, control = self._rates(line.arm), line.arm["same_as"] is not None
            if tried and len(line.trials) == len(tried) and line.rate is None:
                continue  # no rate trains it at all
            wanted = runs_of(tried, self.suite["seeds"], self.suite["tune_seed"], line.rate, control=control)
            done = {(r["rate"], r["seed"]) for r in self._of(line.name)}
            count += sum(run not in done for run in wanted)
        return count

    def _rates(self, arm: Mapping[str, Any]) -> list[float]:
        """Those that an arm tries; a control tries none."""
        if arm["same_as"] is not None:
            return []
        return list(self.suite["rates"] if arm["rates"] is None else arm["rates"])

    def _rate(self, arm: Mapping[str, Any]) -> float | None:
        """The one that an arm has chosen; None while some are to be tried."""
        trials = list(self._tried(arm["name"]).values())
        missing = set(self._rates(arm)) - {r["rate"] for r in trials}
        return None if missing else best_rate(trials)

    def _of(self, arm: str) -> list[Result]:
        return [r for r in self.results.values() if r["arm"] == arm]

    def _tried(self, arm: str) -> dict[str, Result]:
        tuned = self.suite["tune_seed"]
        return {n: r for n, r in self.results.items() if r["arm"] == arm and r["seed"] == tuned}

    def _runs(self, arm: str, rate: float | None) -> dict[int, str]:
        seeds = self.suite["seeds"]
        named = {
            r["seed"]: name
            for name, r in self.results.items()
            if r["arm"] == arm and r["rate"] == rate and r["bits_per_byte"] is not None and r["seed"] in seeds
        }
        return {seed: named[seed] for seed in seeds if seed in named}

    def _curve(self, seed: int, arms: Sequence[str]) -> Curve | None:
        names = [self.chosen[arm].get(seed) for arm in arms]
        there = [name for name in names if name is not None]
        if len(there) < len(names):
            return None
        costs = [float(self.results[name]["flops"]["total"]) for name in there]
        return fit_curve(costs, [self.loss(name) for name in there], self.analysis.floor)

    def _ratios(self, arm: str, curves: Mapping[int, Curve] | None = None) -> dict[int, float]:
        """ln of FLOPs at equal loss over FLOPs taken, by seed; against scratch, unless other curves are given."""
        return self._by_seed(
            arm,
            lambda curve, name, r: log_ratio(curve, self.loss(name), r["flops"]["total"]),
            self.curves if curves is None else curves,
        )

    def _still_arms(self, arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Arms of the model that this one grows from, which never grow."""
        if not _claims(arm) or not arm["grow"]:
            return []
        return [
            other
            for other in self.suite["arms"]
            if _still(other) and (other["model"], other["start"]) == (arm["model"], arm["start"])
        ]

    def _small(self, arm: Mapping[str, Any]) -> str | None:
        return next((other["name"] for other in self._still_arms(arm) if other["budget"] == 1), None)

    def _still_curves(self, arm: Mapping[str, Any]) -> dict[int, Curve]:
        """The curves of the model that an arm grows from, by seed; empty where the suite has it at one budget only."""
        names = [other["name"] for other in self._still_arms(arm)]
        made = {seed: self._curve(seed, names) for seed in self.suite["seeds"]} if len(names) > 1 else {}
        return {seed: curve for seed, curve in made.items() if curve is not None}

    def _credits(self, arm: str) -> dict[int, float]:
        """kappa, by seed: of arms that grow after their first step to the final size."""
        final = self._final_flops()
        if final is None:
            return {}

        def credit(curve: Curve, name: str, r: Result) -> float | None:
            before = r["tokens_before_last_growth"]
            if not before or r["flops_per_token"][-1] != final or r["flops_per_token"][-2] == final:
                return None
            return token_credit(curve, self.loss(name), final, before, r["tokens"] - before)

        return self._by_seed(arm, credit, self.curves)

    def _by_seed(
        self, arm: str, value: Callable[[Curve, str, Result], float | None], curves: Mapping[int, Curve]
    ) -> dict[int, float]:
        out = {}
        for seed, name in self.chosen[arm].items():
            if seed in curves:
                found = value(curves[seed], name, self.results[name])
                if found is not None:
                    out[seed] = found
        return out

    def _final_flops(self) -> float | None:
        names = [name for arm in self.analysis.curve for name in self.chosen[arm].values()]
        return float(self.results[names[0]]["flops_per_token"][-1]) if names else None

    def _claimed(self, arm: Mapping[str, Any], ratios: Mapping[int, float]) -> Interval | None:
        """The saving that is claimed, as a log ratio: that over growth at step 0, where the suite names such an arm."""
        if not _claims(arm):
            return None
        if arm["step_zero"] is None:
            return self._interval(ratios)
        zero = self._ratios(arm["step_zero"])
        return self._interval({seed: ratio - zero[seed] for seed, ratio in ratios.items() if seed in zero})

    def _difference(self, arm: str, other: str | None) -> Interval | None:
        if other is None or arm == other:
            return None
        base, runs = self.chosen[other], self.chosen[arm]
        return self._interval({s: self.loss(n) - self.loss(base[s]) for s, n in runs.items() if s in base})

    def _same(self, arm: Mapping[str, Any]) -> bool | None:
        if arm["same_as"] is None:
            return None
        one, other = (
            {(r["rate"], r["seed"]): r["bits_per_byte"]["weights"] for r in self._of(name) if r["bits_per_byte"]}
            for name in (arm["name"], arm["same_as"])
        )
        both = one.keys() & other.keys()
        return all(one[key] == other[key] for key in both) if both else None

    def _interval(self, values: Mapping[int, float]) -> Interval | None:
        if not values:
            return None
        how = self.analysis
        return interval(list(values.values()), how.confidence, how.interval, how.draws)


def _claims(arm: Mapping[str, Any]) -> bool:
    """Whether an arm is to save something: it grows after its first step, in size or in rank, and is no control."""
    grows = arm["factorised"] is not None or (bool(arm["grow"]) and arm["grow"][0]["at"] > 0)
    return grows and arm["same_as"] is None


def _mapped(ratio: Interval | None) -> Interval | None:
    return None if ratio is None else ratio.map(saving)


def _break_even(result: Result) -> float:
    """What a token before the last growth cost, growths included, in tokens after it."""
    before, final = result["tokens_before_last_growth"], result["flops_per_token"][-1]
    return float((result["flops"]["total"] / final - (result["tokens"] - before)) / before)


def _verdict(savings: Sequence[Interval | None], margin: float) -> str:
    """What a saving against scratch and one beyond step 0 say together.

    Both must be there: an initialisation can be so bad that growth in mid-run saves beyond it, and loses to scratch.
    """
    bounds = [(x.low, x.high) for x in savings if x is not None and x.low is not None and x.high is not None]
    if any(high < 0 for _, high in bounds):
        return "costs"
    if len(bounds) < len(savings):
        return "not measured"
    return "saves" if all(low > margin for low, _ in bounds) else "undecided"


__all__ = ["Line", "Summary", "best_rate", "by_loss", "summarize"]
