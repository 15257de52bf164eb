"""The stages of a run, planned from shapes before the first step: what each growth makes, and what its steps cost."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from growformer.algebra import Family
from growformer.errors import RequestError
from growformer.optim.fade import require_fade
from growformer.planning import Plan
from growformer.training.fade import SCALES
from growformer.training.flops import lift_flops, size_of_model
from growformer.training.gradmax import require_units
from growformer.training.recipe import Budget, RecipeFile
from growformer.training.schedule import LIFT_STEPS, Entry, Growth, spell_out
from growformer.training.triggers import Now, Size, fires

if TYPE_CHECKING:
    import transformers

MOST_STEPS = 2_000_000
"""Steps of a budget in FLOPs that are gone through beforehand to see how much text they take."""


class Growing(Protocol):
    """What the layer above gives a run: `growformer.plan`, `growformer.grow`, the family of a config.json."""

    def plan(self, model: Any, /, **request: Any) -> Plan: ...

    def grow(self, model: Any, optimizers: Any, /, **request: Any) -> Any: ...

    def family(self, config: dict[str, Any], /) -> Family: ...


@dataclass(frozen=True)
class Stage:
    """One model of a run.

    Attributes:
        growth: what leads to it; None for the first.
        config: what its config.json holds.
        size: of it.
        changes: whether the growth makes another function of the model.
        lifted: whether its lift is learned.
        asks: FLOPs, for each token of its probes, of asking a loss what is to be new; 0: it does not.
        searches: FLOPs, for each token of its probes, of the new model's losses in a line search; 0: there is none.
    """

    growth: Growth | None
    config: Mapping[str, Any]
    size: Size
    changes: bool = False
    lifted: bool = False
    asks: float = 0.0
    searches: float = 0.0

    @property
    def probes(self) -> int:
        """How many batches the growth asks a loss on."""
        if self.growth is None or not (self.asks or self.searches):
            return 0
        return self.growth.entry.lift_steps if self.lifted else self.growth.entry.probe_batches

    def probe_flops(self, tokens: int) -> float:
        """What asking costs in one process.

        Args:
            tokens: of a step.
        """
        return self.probes * tokens * (self.asks + self.searches)


def plan_stages(file: RecipeFile, config: Mapping[str, Any], growing: Growing) -> list[Stage]:
    """Plan every growth of a recipe, one on top of the other.

    Raises:
        RequestError: a growth has no exact answer, comes after the budget's end, or makes no sense; the message begins
            with its line in the recipe.
    """
    length = file.recipe.sequence_length
    stages = [Stage(None, config, size_of_model(config, length))]
    try:
        growths = spell_out(file.recipe.grow, sizes_of(config))
    except RequestError as error:
        raise RequestError(_placed(file, str(error))) from error
    for growth in growths:
        _require_within(file, growth)
        try:
            request = request_of(growth, file.recipe.seed)
            request.pop("allow_change", None)  # a plan is made of any method, and judged below
            made = growing.plan(bare_model(stages[-1].config), **request)
            say = ("a run leaves nothing behind that cannot learn", "allow_change: true goes on all the same")
            made.require_allowed(dead=False, change=growth.entry.allow_change, say=say)
            _require_fade(made, growth.entry)
            _require_asked(made, growth.entry)
            _require_provable(made, growth.entry)
            size = size_of_model(made.target_config, length)
            asks = _asks(made, stages[-1].size, size, file.recipe.batch_tokens) if made.learned else 0.0
            forward = size.flops_per_token / 3  # of a step's, which goes back too
            searches = len(SCALES) * forward if growth.entry.searched else 0.0
        except RequestError as error:
            raise RequestError(_placed(file, f"{growth.where}: {error}")) from error
        stages.append(Stage(growth, made.target_config, size, bool(made.changes), made.lifted, asks, searches))
    return stages


def _asks(made: Plan, before: Size, after: Size, tokens: int) -> float:
    """FLOPs for each token of a batch on which a growth asks a loss what is to be new."""
    if made.lifted:
        return after.flops_per_token + lift_flops(made) / tokens
    return before.flops_per_token + require_units(made)


def _require_fade(made: Plan, entry: Entry) -> None:
    if entry.searched and not made.behind:
        raise RequestError(f"fade: line-search: {made.method} has nothing that fades in; msg and gated do")
    require_fade(made, entry.fade_steps, "fade: K in the recipe, or fade: line-search")


def _require_asked(made: Plan, entry: Entry) -> None:
    """Refuse numbers for a loss that the method does not ask."""
    if entry.probe_batches != 1 and (made.lifted or not (made.learned or entry.searched)):
        raise RequestError(
            f"probe_batches: {entry.probe_batches}: {made.method} asks no loss on them; gradmax does, and "
            f"fade: line-search with msg and gated"
        )
    if entry.lift_steps != LIFT_STEPS and not made.lifted:
        raise RequestError(f"lift_steps: {entry.lift_steps}: {made.method} learns no lift; ligo does")


def _require_provable(made: Plan, entry: Entry) -> None:
    if made.changes and entry.prove:
        raise RequestError(
            f"prove: true: {made.method} makes another function of the model, so there is nothing to prove; the log "
            f"says what is held out before and after"
        )


def request_of(growth: Growth, seed: int) -> dict[str, Any]:
    """A growth as keywords of `growformer.plan`."""
    entry = growth.entry
    return {
        **growth.to,
        "method": entry.method,
        "seed": seed if entry.seed is None else entry.seed,
        **({"layers_at": entry.layers_at} if entry.layers_at is not None else {}),
        **({"same": "planned"} if entry.control else {}),
    }


def bare_model(config: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """A model of a config, without memory."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, trust_remote_code=False)  # type: ignore[no-any-return]


def steps_of(budget: Budget, stages: Sequence[Stage], tokens: int) -> int | None:
    """How many steps a budget is; None where that depends on the loss.

    Args:
        budget: of the run.
        stages: its models.
        tokens: of a step.
    """
    if budget.kind != "flops":
        return math.ceil(budget.amount / (tokens if budget.kind == "tokens" else 1))
    if any(s.growth is not None and s.growth.at.remembers for s in stages):
        return None
    step, flops, at = 0, 0.0, 0
    while flops < budget.amount:
        step, flops = step + 1, flops + tokens * stages[at].size.flops_per_token
        if step > MOST_STEPS:
            return None
        while at + 1 < len(stages):
            seen = Now(step, step * tokens, flops, flops / budget.amount, 0.0, stages[at].size, stages[at + 1].size)
            growth = stages[at + 1].growth
            assert growth is not None
            if not fires(growth.at, seen, {})[0]:
                break
            at += 1
            flops += stages[at].probe_flops(tokens)
    return step


def sizes_of(config: Mapping[str, Any]) -> dict[str, int | None]:
    """Fields of a config that are whole numbers or open, under every name that the config class has for them."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    names = [*config, *type(made).attribute_map]
    found = {name: getattr(made, name, None) for name in names}
    return {name: x for name, x in found.items() if x is None or (isinstance(x, int) and not isinstance(x, bool))}


def _require_within(file: RecipeFile, growth: Growth) -> None:
    """Refuse a growth that would come after the budget's end, where both are known."""
    budget, at = file.recipe.budget, growth.at
    per_step = file.recipe.batch_tokens
    ends = {
        "steps": {"step": budget.amount, "tokens": budget.amount * per_step},
        "tokens": {"step": math.ceil(budget.amount / per_step), "tokens": budget.amount},
        "flops": {"flops": budget.amount},
    }[budget.kind]
    if at.kind in ends and getattr(at, at.kind) >= ends[at.kind]:
        raise RequestError(
            _placed(
                file,
                f"{growth.where}.at.{at.kind}: {getattr(at, at.kind):g} is not before the budget's end "
                f"({budget.kind}: {budget.amount:g}), so this growth would never come",
            )
        )


def _placed(file: RecipeFile, message: str) -> str:
    """A message that begins with a place in `grow`, with the file and the line before it."""
    found = re.match(r"grow\[(\d+)\]((?:\.\w+)*)", message)
    if found is None:
        return f"{file.path}: {message}"
    key = ("grow", int(found[1]), *found[2].split(".")[1:])
    return file.where(*key) + message[found.end() :]
