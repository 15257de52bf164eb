"""Growth in a live run: a model, its optimizer, its block rates and its averages grow as one, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from growformer.errors import RequestError
from growformer.optim.carry import Carry
from growformer.optim.fade import Behind
from growformer.optim.groups import joined, renamed
from growformer.optim.rates import BlockRates, inner_optimizer, rates_of
from growformer.optim.rules import StateRule, rule_of
from growformer.optim.state import check_state, first_state, grown_state
from growformer.optim.tables import Pace, grown_table
from growformer.planning import Plan
from growformer.training.changes import Changes
from growformer.training.gradmax import Closure, fill_readers
from growformer.training.graft import Graft

if TYPE_CHECKING:
    import transformers


def grow_live(
    model: transformers.PreTrainedModel,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    plan: Plan,
    *,
    old: transformers.PreTrainedModel | None = None,
    pace: Pace | None = None,
    averages: Sequence[transformers.PreTrainedModel] = (),
    closure: Closure | None = None,
    values: transformers.PreTrainedModel | None = None,
) -> None:
    """Grow a model in place, with all that trains it.

    Everything new is built first. If anything fails, then or later, all is as it was.

    Args:
        model: a stock model, unwrapped.
        optimizer: over its parameters, or several that share them; of classes that have a state rule.
        plan: the growth.
        old: the model's skeleton, where it is made already.
        pace: how new and old blocks learn afterwards.
        averages: copies of the model that follow it; they get the same new entries.
        closure: the loss that the plan asks for.
        values: a grown model whose parameters' values the model takes: of a lift that was learned.

    Raises:
        RequestError, SourceError: see `Graft` and `Trained`.
    """
    graft = Graft(model, plan, old)
    grafts = [graft, *(Graft(average, plan, figures=graft.applier.stds) for average in averages)]
    if closure is not None:
        fill_readers(model, plan, graft.carry.old, [each.made for each in grafts], closure)
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    trained = [Trained(inner_optimizer(each), graft, pace or Pace()) for each in optimizers]
    fading = graft.behind
    fade = pace is not None and pace.fade > 0
    if fade:
        _require_trained(graft, trained)
    # What is compiled holds the old parameters, and would be silently run uncompiled after eight growths.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    for each in grafts:
        each.require_swappable()
    with Changes() as changes, torch.no_grad():
        for each in grafts:
            each.commit(changes)
        for one in trained:
            one.commit(changes)
        # A search needs what would fade in; a ramp has it in its tables.
        changes.put(vars(model), "growformer_behind", {} if fade else fading)
        if values is not None:
            for name, parameter in model.named_parameters():
                changes.fill(parameter, values.get_parameter(name))


def _require_trained(graft: Graft, trained: Sequence[Trained]) -> None:
    """Refuse to fade in what no optimizer steps."""
    for name in graft.behind:
        after = graft.after[name]
        if not after.requires_grad or not any(after in one.stepped for one in trained):
            raise RequestError(
                f"{name} would fade in over steps, and {'is frozen' if trained else 'there is no optimizer'}: fade=0 "
                f"leaves new entries zero, for growformer.training.line_search"
            )


class Grafted(Protocol):
    """What an optimizer's growth asks of its model's: see `Graft`."""

    carry: Carry
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]

    @property
    def behind(self) -> dict[str, Behind]: ...


class Trained:
    """The optimizer's part of a growth, built beforehand.

    Args:
        optimizer: unwrapped.
        graft: the model's part, built.
        pace: how blocks learn afterwards.

    Raises:
        RequestError: the optimizer's class or a key of its state is not declared, or `pace` asks what it cannot do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, graft: Grafted, pace: Pace) -> None:
        self.optimizer = optimizer
        self.rule: StateRule = rule_of(optimizer)
        self.rates: BlockRates = rates_of(optimizer)
        self.graft = graft
        self.pace = pace
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in graft.before.items():
            check_state(self.rule, optimizer, name, optimizer.state.get(parameter, {}))
        self._states: dict[torch.Tensor, dict[str, Any]] = {}
        self._tables: dict[torch.Tensor, Any] = {}
        self._joining: dict[torch.Tensor, str] = {}
        for name in graft.carry.names:
            self._build(name)

    def _build(self, name: str) -> None:
        carry, before, after = self.graft.carry, self.graft.before, self.graft.after[name]
        like = before[carry.like(name) or ""]
        group = self._groups.get(like)
        if group is None:
            return
        source = before[carry.source(name) or ""] if after is not self.graft.values.get(name) else None
        steps, table = 0, None
        if source is None:
            self._joining[after] = name
            self._states[after] = first_state(self.rule, after, group)
        else:
            steps, table = self.rates.steps(source), self.rates.tables.get(source)
            if name in self.graft.values and self.optimizer.state.get(source):
                self._states[after] = grown_state(self.rule, carry, name, self.optimizer.state[source], group)
        if name in self.graft.values or self.pace.freeze_old:
            behind = self.graft.behind.get(name)
            made = grown_table(self.rule, carry, name, table, steps, group, self.pace, after.device, behind)
            self._tables[after] = made

    @property
    def stepped(self) -> set[torch.Tensor]:
        """The optimizer's parameters, among them those of the grown model that continue old ones, and new ones."""
        return {*self._groups, *self._joining}

    def commit(self, changes: Changes) -> None:
        """Put everything in place."""
        for group in self.optimizer.param_groups:
            self._regroup(changes, group)
        for parameter, state in self._states.items():
            if state or parameter in self.optimizer.state:
                changes.put(self.optimizer.state, parameter, state)
        for parameter, table in self._tables.items():
            changes.put(self.rates.tables, parameter, table)
        names = {p: name for name, p in self.graft.after.items() if p in self.stepped}
        others = {p: name for p, name in self.rates.names.items() if p not in set(self.graft.after.values())}
        changes.refill(self.rates.names, others | names)

    def _regroup(self, changes: Changes, group: Mapping[str, Any]) -> None:
        carry, after, before = self.graft.carry, self.graft.after, self.graft.before
        names = {p: name for name, p in after.items()}
        likes = {p: before[carry.like(name) or ""] for p, name in self._joining.items()}
        members = list(group["params"])
        rank = {p: i for i, p in enumerate(after.values())}
        grown = joined(members, rank, {p: like for p, like in likes.items() if self._groups[like] is group})
        if len(grown) > len(members):
            changes.relist(group["params"], grown)
        if group.get("param_names"):
            olds = {p: name for name, p in before.items()}
            changes.relist(group["param_names"], renamed(members, group["param_names"], olds, grown, names))
