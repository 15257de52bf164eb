"""The course of an arm: how many steps its budget buys, when it grows, and what it shares with others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from growformer.bench.suite import Arm, Event, Products, Suite
from growformer.errors import RequestError
from growformer.training.recipe import RecipeFile, parse_recipe
from growformer.training.stages import Growing, Stage, bare_model, plan_stages
from growformer.training.triggers import Size

_TRIAL = 1_000_000
"""Steps of the recipe from which sizes are planned, before the true number is known."""


@dataclass(frozen=True)
class Course:
    """An arm, in steps.

    Attributes:
        arm: it.
        steps: all of them.
        grows: the step after which each growth comes; 0: before the first.
        sizes: of its models, in order.
        flops: of all steps, and of what growths ask a loss.
        budget: FLOPs that it was to take; `flops` is the nearest that whole steps allow.
        trunk: steps that it shares with other arms of the same start; 0: none.
    """

    arm: Arm
    steps: int
    grows: tuple[int, ...]
    sizes: tuple[Size, ...]
    flops: float
    budget: float
    trunk: int = 0

    @property
    def start(self) -> str:
        """What arms that share a trunk have in common."""
        other = {} if self.arm.model is None else {"model": self.arm.model}
        return json.dumps({**self.arm.start, **other}, sort_keys=True)


def courses_of(suite: Suite, data: Path, growing: Growing) -> dict[str, Course]:
    """The courses of all arms, by name.

    Args:
        suite: it.
        data: the folder of the text.
        growing: how growths are planned.

    Raises:
        RequestError: a growth has no exact answer, or comes before the warm-up has ended; the message names the arm.
    """
    final = _sizes(suite, data, Arm(name="final"), growing)[0][-1]
    amount = suite.budget.flops or (suite.budget.tokens or 0) * final.flops_per_token
    out = {arm.name: _course(suite, arm, *_sizes(suite, data, arm, growing), amount * arm.budget) for arm in suite.arms}
    for start in {course.start for course in out.values()}:
        alike = [c for c in out.values() if c.start == start and 0 not in c.grows and c.arm.factorised is None]
        if len(alike) < 2:
            continue
        for course in alike:
            out[course.arm.name] = _with_trunk(suite, course)
    return out


def trunk_points(courses: Mapping[str, Course], start: str) -> list[int]:
    """Where a start's trunk is left, in order: each part is trained from the end of the one before."""
    return sorted({c.trunk for c in courses.values() if c.start == start and c.trunk})


def recipe_of(suite: Suite, data: Path, course: Course, rate: float, seed: int, source: Path | None) -> dict[str, Any]:
    """The recipe of an arm's run, for `growformer train`.

    Args:
        suite: it.
        data: the folder of the text.
        course: of the arm.
        rate: the learning rate.
        seed: of the run.
        source: a model that has grown before the first step, where the arm has one.
    """
    grows = course.grows if course.arm.factorised is None else ()
    pairs = [(event, at) for event, at in zip(course.arm.grow, grows, strict=True) if at]
    model = {"from": str(source)} if source is not None else first_of(suite, course.arm)
    return _recipe(suite, data, model, rate, seed) | {
        "budget": {"steps": course.steps},
        "learning_rate": {"shape": "wsd", "warmup": suite.warmup_steps / course.steps, "decay": suite.decay},
        "grow": [entry_of(suite, course.arm, event, at) for event, at in pairs],
        **_factorised(course),
    }


def first_of(suite: Suite, arm: Arm) -> dict[str, Any]:
    """The first model of an arm."""
    return {**suite.model_of(arm), **arm.start}


def _factorised(course: Course) -> dict[str, Any]:
    """What a recipe says of products."""
    asked = course.arm.factorised
    if asked is None:
        return {}
    *steps, dense = course.grows
    grow = [{"step": step, "rank": growth.rank} for step, growth in zip(steps, asked.grow, strict=True)]
    return {"factorised": {"rank": asked.rank, "grow": grow, "dense": dense, "warmup": asked.warmup}}


def trunk_recipe(suite: Suite, data: Path, arm: Arm, rate: float, seed: int, to: int) -> dict[str, Any]:
    """The recipe of a trunk up to some step: the learning rate rises, and stays."""
    return _recipe(suite, data, first_of(suite, arm), rate, seed) | {
        "budget": {"steps": to},
        "learning_rate": {"shape": "constant", "warmup": suite.warmup_steps / to},
    }


def entry_of(suite: Suite, arm: Arm, event: Event, step: int) -> dict[str, Any]:
    """A growth as an entry of a recipe."""
    options = event.model_dump(exclude={"at", "to"}, exclude_defaults=True)
    return {"at": {"step": step}, "to": target_of(suite, arm, event), "prove": event.prove, **options}


def target_of(suite: Suite, arm: Arm, event: Event) -> dict[str, int]:
    """The sizes that a growth leads to."""
    if event.to is not None:
        return dict(event.to)
    return dict(arm.start) if event.control else {name: int(suite.model_of(arm)[name]) for name in arm.start}


def written(recipe: Mapping[str, Any]) -> str:
    """A recipe as a file holds it."""
    return yaml.safe_dump(dict(recipe), sort_keys=False)


def _recipe(suite: Suite, data: Path, model: Mapping[str, Any], rate: float, seed: int) -> dict[str, Any]:
    return {
        "model": dict(model),
        "data": {"train": str(data / suite.data.train), "valid": str(data / suite.data.valid)},
        "sequence_length": suite.sequence_length,
        "batch_tokens": suite.batch_tokens,
        "seed": seed,
        "optimizer": {**suite.optimizer.model_dump(exclude_none=True), "lr": rate},
        "clip_norm": suite.clip_norm,
        "precision": suite.precision,
        "device": suite.device,
        "prove": False,
        "evaluate": {"every": suite.evaluate_every, "tokens": suite.evaluate_tokens},
        "checkpoint": {"every": suite.checkpoint_every, "keep": 1},
        "report": False,
    }


def _sizes(suite: Suite, data: Path, arm: Arm, growing: Growing) -> tuple[list[Size], float]:
    """Of an arm's models, in order, and the FLOPs of what its growths ask a loss."""
    from growformer.training.first import first_config

    base = Course(arm, _TRIAL, tuple(max(1, round(at * _TRIAL)) for at in arm.shares), (), 0.0, 0.0)
    recipe = recipe_of(suite, data, base, suite.rates[0], 0, None)
    file: RecipeFile = parse_recipe(written(recipe), Path(f"arm {arm.name}"))
    try:
        stages = plan_stages(file, first_config(file, None), growing)
        if 0 in arm.shares and stages[1].probes:
            raise RequestError(
                f"arm {arm.name}: grow[0]: {arm.grow[0].method} asks a loss of a run, and there is none before the "
                "first step"
            )
        if arm.factorised is None:
            return [stage.size for stage in stages], sum(stage.probe_flops(suite.batch_tokens) for stage in stages)
        return _sizes_of_products(arm.factorised, stages[0]), 0.0
    except RequestError as error:
        raise RequestError(re.sub(r", line \d+", "", str(error))) from error  # of a recipe that nobody has written


def _sizes_of_products(asked: Products, dense: Stage) -> list[Size]:
    """Of a model of products, by rank, and of the dense one."""
    from growformer.training.factorised import fewer, sparable

    model, out = bare_model(dense.config), []
    for rank in (asked.rank, *(growth.rank for growth in asked.grow)):
        less = sum(fewer(rank, *shape) for shape in sparable(model, rank).values())
        out.append(Size(dense.size.parameters - less, dense.size.flops_per_token - 6 * less))
    return [*out, dense.size]


def _course(suite: Suite, arm: Arm, sizes: Sequence[Size], asked: float, budget: float) -> Course:
    shares = [0.0, *arm.shares, 1.0]
    mean = sum((b - a) * s.flops_per_token for a, b, s in zip(shares, shares[1:], sizes, strict=False))
    about = max(1, round((budget - asked) / (mean * suite.batch_tokens)))
    made = [_in_steps(suite, arm, sizes, asked, budget, steps) for steps in range(max(1, about - 2), about + 3)]
    best = min(made, key=lambda course: abs(course.flops - budget))
    inside = [step for step in best.grows if step]
    if best.steps <= suite.warmup_steps or any(step <= suite.warmup_steps + 1 for step in inside):
        raise RequestError(
            f"arm {arm.name}: has {best.steps} steps and grows after {inside or 'none'} of them; the warm-up takes "
            f"{suite.warmup_steps}, and must end before: a larger budget, a later growth or a shorter warm-up will do"
        )
    if len(set(best.grows)) < len(best.grows):
        raise RequestError(f"arm {arm.name}: two of its growths come after one step ({best.grows}); set them apart")
    return best


def _in_steps(suite: Suite, arm: Arm, sizes: Sequence[Size], asked: float, budget: float, steps: int) -> Course:
    """The course of so many steps."""
    falls = math.floor((1 - suite.decay) * steps)
    grows = tuple(min(falls, max(1, round(at * steps))) if at else 0 for at in arm.shares)
    ends = [*grows, steps]
    begins = [0, *grows]
    spent = [(b - a) * s.flops_per_token for a, b, s in zip(begins, ends, sizes, strict=True)]
    return Course(arm, steps, grows, tuple(sizes), sum(spent) * suite.batch_tokens + asked, budget)


def _with_trunk(suite: Suite, course: Course) -> Course:
    """Leave the trunk a step before the growth, which a run looks for after each step; or where the rate falls."""
    at = course.grows[0] - 1 if course.grows else math.floor((1 - suite.decay) * course.steps)
    trunk = at if at > suite.warmup_steps else 0
    return Course(course.arm, course.steps, course.grows, course.sizes, course.flops, course.budget, trunk)


__all__ = ["Course", "courses_of", "recipe_of", "trunk_points", "trunk_recipe"]
