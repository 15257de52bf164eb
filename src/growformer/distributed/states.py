"""A sharded model's optimizer through a growth: its state, its block rates and its groups."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from growformer.distributed.shards import of_local, place, same_place, shard_like, whole
from growformer.errors import RequestError
from growformer.optim.carry import Carry
from growformer.optim.groups import joined, renamed
from growformer.optim.rates import Table, inner_optimizer, rates_of
from growformer.optim.rules import rule_of
from growformer.optim.state import check_state, first_state, grown_state
from growformer.optim.tables import Pace, grown_table


class ShardedStates:
    """The optimizer's part of a sharded growth; the optimizer is not touched before `move`.

    Args:
        optimizer: over the small model's parameters.
        carry: the growth.
        continued: for the name of a grown tensor that continues an old one, the old one's.
        before: the small model's tensors, by name.
        pace: how blocks learn afterwards.

    Raises:
        RequestError: the optimizer's class or a key of its state is not declared, it keeps a tensor that is not
            sharded as its parameter is, or it has none of the model's parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        carry: Carry,
        continued: Mapping[str, str],
        before: Mapping[str, torch.Tensor],
        pace: Pace,
    ) -> None:
        self.optimizer = inner_optimizer(optimizer)
        self.rule = rule_of(self.optimizer)
        self.rates = rates_of(self.optimizer)
        self.carry = carry
        self.continued = continued
        self.before = before
        self.pace = pace
        self._groups = {p: number for number, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self._tables: dict[str, Table] = {}
        self._states: dict[str, dict[str, Any]] = {}
        if not any(p in self._groups for p in before.values()):
            raise RequestError(
                f"{type(self.optimizer).__name__} has none of the model's parameters; make it after fully_shard, which "
                f"puts others in their place"
            )
        for name in carry.old.shapes:
            self._require_placed(name)

    def _require_placed(self, name: str) -> None:
        parameter = self.before[name]
        state = self.optimizer.state.get(parameter, {})
        check_state(self.rule, self.optimizer, name, state)
        for key, value in state.items():
            if key in self.rule.counts or value is None:
                continue
            if key not in self.rule.moments or not same_place(value, parameter):
                raise RequestError(
                    f"{key!r} beside {name} is {place(value)}, and the parameter {place(parameter)}: an optimizer of "
                    f"sharded parameters grows if its state is sharded alike"
                )

    def facts(self) -> str:
        """A hash of what all ranks must have alike: groups, and the steps and keys of each state."""
        said: list[Any] = [type(self.optimizer).__name__]
        for name in self.carry.old.shapes:
            parameter = self.before[name]
            table = self.rates.tables.get(parameter)
            keys = sorted(self.optimizer.state.get(parameter, {}))
            said.append((name, self._groups.get(parameter), self.rates.steps(parameter), keys, table and table.blocks))
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def build_tables(self, after: Mapping[str, torch.Tensor]) -> None:
        """The rates of the grown parameters: a collective call, which changes nothing yet.

        Raises:
            RequestError: see `grown_table`.
        """
        for name in self.carry.names:
            group = self._group(name)
            if group is None:
                continue
            source = self.before[self.continued[name]] if name in self.continued else None
            table = None if source is None else self.rates.tables.get(source)
            steps = 0 if source is None else self.rates.steps(source)
            unchanged = source is not None and self.carry.unchanged(name)
            if unchanged and not self.pace.freeze_old:
                if table is None:
                    continue
                if source is not None and same_place(source, after[name]):
                    self._tables[name] = table
                    continue
            if table is not None and table.index is not None and source is not None:
                table = Table(table.blocks, whole(of_local(table.index, source)), table.taken)
            device = after[name].device
            made = grown_table(self.rule, self.carry, name, table, steps, group, self.pace, device)
            if made.index is not None:
                placed = shard_like(made.index, after[name])
                made.index = placed.to_local() if isinstance(placed, DTensor) else placed
            self._tables[name] = made

    def _group(self, name: str) -> dict[str, Any] | None:
        number = self._groups.get(self.before[self.carry.like(name) or ""])
        return None if number is None else self.optimizer.param_groups[number]

    def move(self, name: str, after: torch.Tensor) -> None:
        """Carry the state beside one parameter, and let go of the old: a collective call."""
        group = self._group(name)
        if group is None:
            return
        if name not in self.continued:
            self._states[name] = first_state(self.rule, after, group)
            return
        source = self.before[self.continued[name]]
        state = dict(self.optimizer.state.pop(source, {}))
        if state and self.carry.unchanged(name) and same_place(source, after):
            self._states[name] = state
            return
        made: dict[str, Any] = {}
        for key in list(state):  # one at a time: two whole moments at once would take twice the room
            value = state.pop(key)
            full = whole(value) if key in self.rule.moments and value is not None else value
            grown = grown_state(self.rule, self.carry, name, {key: full}, group)[key]
            made[key] = shard_like(grown, after) if key in self.rule.moments and value is not None else grown
            del value, full, grown
        self._states[name] = made

    def commit(self, after: Mapping[str, torch.Tensor]) -> None:
        """Put everything in place; the optimizer, its groups and their lists stay the same objects."""
        known = {name: after[name] for name in self.carry.names if self._group(name) is not None}
        fresh = {self.before[old]: after[name] for name, old in self.continued.items() if name in known}
        rank = {p: i for i, p in enumerate(known.values())}
        names = {p: name for name, p in known.items()}
        olds = {self.before[old]: old for name, old in self.continued.items() if name in known}
        for number, group in enumerate(self.optimizer.param_groups):
            members = list(group["params"])
            joining = {
                p: fresh[like]
                for name, p in known.items()
                if name not in self.continued
                and self._groups[like := self.before[self.carry.like(name) or ""]] == number
            }
            grown = joined([fresh.get(p, p) for p in members], rank, joining)
            group["params"][:] = grown
            if group.get("param_names"):
                group["param_names"][:] = renamed(members, group["param_names"], olds, grown, names)
        self.optimizer.state.update({after[name]: state for name, state in self._states.items() if state})
        for old in fresh:
            self.rates.tables.pop(old, None)
            self.rates.names.pop(old, None)
        self.rates.tables |= {after[name]: table for name, table in self._tables.items()}
        self.rates.names |= names
