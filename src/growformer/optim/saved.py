"""A saved optimizer through a growth: the `state_dict` of one that is not there, carried by its parameters' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from growformer.errors import RequestError, SourceError
from growformer.optim.carry import Carry
from growformer.optim.rates import FORMAT, Table
from growformer.optim.rules import RULES, StateRule
from growformer.optim.state import check_state, first_state, grown_state
from growformer.optim.tables import Pace, grown_table

KEY = "growformer"
"""Under which the first group of an optimizer's state holds what growths have left behind. Loading a state keeps keys
of groups that it does not know, so it comes back through any code that saves and loads optimizers."""

BESIDE = {"params", "param_names", KEY, "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""Keys of groups that are no optimizer's: its parameters, and what learning-rate schedules leave there."""


@dataclass
class Companion:
    """What a run must know of its growths beside the weights and the moments.

    Attributes:
        first: sizes of the model that it began with, by the names of config.json.
        memory: what the next growth's rule remembers.
        shown: the last step whose loss a rule has been shown.
        thaw_at: step at which old entries learn again; None: nothing is held.
    """

    first: dict[str, int | None] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    shown: int = 0
    thaw_at: int | None = None

    def saved(self, rates: Mapping[str, Any]) -> dict[str, Any]:
        """As plain data, together with the block rates (`BlockRates.state_dict`)."""
        return {"format": FORMAT, "rates": dict(rates), **asdict(self)}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Companion:
        """The inverse of `saved`.

        Raises:
            SourceError: another version's.
        """
        if saved.get("format") != FORMAT:
            raise SourceError(
                f"what the optimizer's state says of growths has format {saved.get('format')!r}; this version reads "
                f"format {FORMAT}"
            )
        return cls(saved["first"], saved["memory"], saved["shown"], saved["thaw_at"])


def rule_of_saved(saved: Mapping[str, Any]) -> tuple[str, StateRule]:
    """The optimizer class whose state this is, by what it keeps beside a parameter and in its groups, and its rule.

    Raises:
        RequestError: none that is declared, or several whose states grow differently.
    """
    kept = {str(key) for state in saved["state"].values() for key in state}
    told = set(saved["param_groups"][0]) - BESIDE
    found = {name: rule for name, rule in RULES.items() if kept <= rule.keys and _hyperparameters(name) == told}
    # Adam and AdamW are told apart by nothing that is saved, and what they keep grows alike.
    ways = {(tuple(sorted(r.moments.items())), r.counts, r.factored, str(r.start), r.eager) for r in found.values()}
    if len(ways) != 1:
        raise RequestError(
            f"keeps {', '.join(sorted(kept)) or 'nothing'} beside each parameter, and {', '.join(sorted(told))} in its "
            f"groups: that is {' or '.join(found) if found else 'no declared optimizer'}; there are {', '.join(RULES)}"
        )
    return next(iter(found.items()))


def _hyperparameters(name: str) -> set[str] | None:
    """The fields of an optimizer class's groups; None: the class is not there."""
    import transformers

    package, _, cls = name.partition(".")
    made: Callable[..., torch.optim.Optimizer] | None
    made = getattr({"torch": torch.optim, "transformers": transformers}.get(package), cls, None)
    return None if made is None else set(made([torch.nn.Parameter(torch.zeros(1, 1))]).param_groups[0]) - BESIDE


def require_matching(saved: Mapping[str, Any], groups: Sequence[Sequence[str]], carry: Carry, rule: StateRule) -> None:
    """Refuse a state whose tensors are not those of these parameters.

    Args:
        saved: an optimizer's `state_dict`.
        groups: the names of the source's parameters, by group and in the optimizer's order.
        carry: the growth.
        rule: of the optimizer.

    Raises:
        RequestError: other counts, or a tensor of another shape.
    """
    counts, there = [len(names) for names in groups], [len(group["params"]) for group in saved["param_groups"]]
    if counts != there:
        raise RequestError(
            f"its groups hold {' and '.join(map(str, there))} parameters, and the Trainer's own for this model "
            f"{' and '.join(map(str, counts))} (are some frozen, or was the optimizer made by hand?)"
        )
    for name, number in zip(_flat(groups), _numbers(saved), strict=True):
        state = saved["state"].get(number, {})
        check_state(rule, saved, name, state)
        shape = carry.old.shapes[name]
        for key in rule.moments:
            found = state.get(key)
            if found is not None and tuple(found.shape) != shape:
                raise RequestError(
                    f"number {number} holds {key!r} of shape {list(found.shape)}, and the Trainer's own order has "
                    f"{name} there, which is {list(shape)}"
                )


def grown_optimizer(
    saved: Mapping[str, Any],
    rule: StateRule,
    carry: Carry,
    olds: Sequence[Sequence[str]],
    news: Sequence[Sequence[str]],
    first: Mapping[str, int | None],
    step: int,
    pace: Pace,
) -> dict[str, Any]:
    """The state that the optimizer would have if it had grown along.

    Args:
        saved: its `state_dict`, of the parameters `olds` (see `require_matching`).
        rule: of the optimizer.
        carry: the growth.
        olds, news: names of the source's and of the grown model's parameters, by group and in the optimizer's order.
        first: sizes of the source, for a state that knows of no growth before.
        step: of the run; what rules remember ends with a growth.
        pace: how blocks learn afterwards.

    Raises:
        RequestError: a parameter would change groups, or a state is not as the rule says.
    """
    numbers = dict(zip(_flat(olds), _numbers(saved), strict=True))
    home = {name: i for i, names in enumerate(olds) for name in names}
    before = saved["param_groups"][0].get(KEY)
    companion = Companion.of(before) if before else Companion(first=dict(first))
    companion.memory, companion.shown = {}, step
    tables = {name: Table.of(table) for name, table in before["rates"]["parameters"].items()} if before else {}
    states: dict[int, dict[str, Any]] = {}
    grown: dict[str, Table] = {}
    number = 0
    for i, names in enumerate(news):
        group = saved["param_groups"][i]
        for name in names:
            like = carry.like(name) or ""
            if home.get(like) != i:
                raise RequestError(f"{name} would be in another group of the optimizer than {like}, which it is like")
            source = carry.source(name) if carry.continues(name) else None
            state = saved["state"].get(numbers[source], {}) if source is not None else {}
            table = tables.get(source or "")
            if source is not None and carry.unchanged(name):
                made = dict(state)
            else:
                if source is None:
                    made = first_state(rule, _like(carry, name, saved["state"].get(numbers[like], {})), group)
                else:
                    made = grown_state(rule, carry, name, state, group)
                steps = int(state.get(rule.counts[0], 0)) if rule.counts else table.taken if table else 0
                table = grown_table(rule, carry, name, table, steps, group, pace, torch.device("cpu"))
            if made:
                states[number] = made
            if table is not None:
                grown[name] = table
            number += 1
    groups, at = [], 0
    for group, names in zip(saved["param_groups"], news, strict=True):
        groups.append({**group, "params": list(range(at, at + len(names)))})
        at += len(names)
    rates = {"format": FORMAT, "parameters": {name: table.saved() for name, table in grown.items()}}
    groups[0][KEY] = companion.saved(rates)
    return {**saved, "state": states, "param_groups": groups}


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [name for names in groups for name in names]


def _numbers(saved: Mapping[str, Any]) -> list[int]:
    return [number for group in saved["param_groups"] for number in group["params"]]


def _like(carry: Carry, name: str, state: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of a new parameter's shape, of the dtype that its neighbour's state has."""
    dtypes = [x.dtype for x in state.values() if isinstance(x, torch.Tensor) and x.dim()]
    return torch.empty(carry.new.shapes[name], dtype=dtypes[0] if dtypes else torch.float32)
