"""Graft: a grown model's parameters, buffers, sizes and layers put into the live model, whose objects stay the same."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from growformer.checkpoint.layout import layout_of, shared_names
from growformer.checkpoint.skeleton import skeleton, stock_skeleton
from growformer.errors import RequestError, SourceError
from growformer.optim.carry import Carry
from growformer.optim.fade import Behind, behind
from growformer.planning import Plan
from growformer.training.changes import Changes
from growformer.training.likeness import SKIPPED, config_type, meant, same, same_tensor
from growformer.training.pairs import pair_modules
from growformer.training.rest import require_at_rest, require_swappable

if TYPE_CHECKING:
    import transformers


class Graft:
    """Everything that a model needs to grow in place, built beforehand; the model is not touched before `commit`.

    Args:
        model: the live model, unwrapped.
        plan: the growth.
        old: its skeleton (see `stock_skeleton`), where that is made already.
        figures: what another model's growth measured for its fills (`Applier.stds`), for the same new entries.

    Attributes:
        carry: the growth, parameter by parameter.
        before: the live model's tensors, by their names in memory.
        after: the objects that will hold the grown model's tensors: live ones where they continue.
        values: new tensors, by name; a tensor that stays as it is has none.
        applier: what made the new weights.

    Raises:
        RequestError, SourceError: the model is not as its class builds it, cannot grow in memory, or is in the middle
            of a step.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        plan: Plan,
        old: transformers.PreTrainedModel | None = None,
        figures: dict[str, float] | None = None,
    ) -> None:
        self.model = model
        self._old = old or stock_skeleton(model)
        self._new = skeleton(model, plan.target_config)
        self.carry = Carry(plan, layout_of(model), layout_of(self._new))
        self.before = shared_names(model)[0]
        self._bare = shared_names(self._new)[0]
        require_at_rest(self.before)
        self.applier = self.carry.applier(lambda name: self.before[name])
        self.applier.stds |= figures or {}
        self.values: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}
        for name in self.carry.names:
            self._build(name)
        self._require_whole()
        self._pairs = pair_modules(self._old, self._new, self._continued)
        likes = {name: like for name in self.carry.names if (like := self.carry.like(name)) is not None}
        self._likes = pair_modules(self._old, self._new, likes | self._continued, once=False)

    def _build(self, name: str) -> None:
        source = self.carry.source(name) if self.carry.continues(name) else None
        if source is not None and self.carry.unchanged(name):
            self.after[name] = self.before[source]
            return
        like = self.before[self.carry.like(name) or ""]
        made: torch.Tensor = torch.empty(self.carry.new.shapes[name], dtype=like.dtype, device=like.device)
        self.carry.weight(name, self.applier, made)
        if isinstance(self._bare[name], torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=like.requires_grad)
        self.values[name] = made
        self.after[name] = made if source is None else self.before[source]

    @cached_property
    def behind(self) -> dict[str, Behind]:
        """What fades in, by parameter name; asked for before `commit`, which lets the source go."""
        return behind(self.carry, lambda name: self.before[name], self.applier.stds)

    def made(self, disk: str) -> torch.Tensor:
        """A grown tensor, by its name on disk, as a view of the new parameter that holds it."""
        view = self.carry.new.views[disk]
        return view.of(self.values[view.name])

    @property
    def _continued(self) -> dict[str, str]:
        """For every new name of a tensor that continues an old one, the old one's first name."""
        return {name: self.carry.source(name) or "" for name in self.carry.names if self.carry.continues(name)}

    def _require_whole(self) -> None:
        lost = set(self.before) - set(self._continued.values())
        lost = {name for name in lost if isinstance(self.before[name], torch.nn.Parameter)}
        bare = [name for name, x in self._bare.items() if isinstance(x, torch.nn.Parameter) and name not in self.after]
        if lost or bare:
            name = min([*lost, *bare])
            raise SourceError(
                f"{name} is a parameter of the model, but no tensor of the plan; it cannot grow in memory"
            )

    def require_swappable(self) -> None:
        """Refuse parameters that something else holds on to.

        Raises:
            RequestError: naming the first, and what to do.
        """
        require_swappable(
            (name, live)
            for name in self.carry.names
            if name in self.values
            and (live := self.after[name]) is not self.values[name]
            and isinstance(live, torch.nn.Parameter)
        )

    def commit(self, changes: Changes) -> None:
        """Put everything in place; see `Changes` for what happens if it fails."""
        fresh = dict(self._new.named_modules(remove_duplicate=False))
        live = dict(self.model.named_modules(remove_duplicate=False))
        stock = dict(self._old.named_modules(remove_duplicate=False))
        pairs: list[tuple[Any, Any, Any]] = [
            (live[here], stock[here], fresh[path]) for path, here in self._pairs.items()
        ]
        partners: dict[int, Any] = {id(new): mine for mine, _, new in pairs}
        configs: list[tuple[Any, Any, Any]] = []
        for mine, old, new in pairs:
            _pair_configs(mine.__dict__, old.__dict__, new.__dict__, partners, configs)
        for path, module in fresh.items():
            if path not in self._pairs:  # before its neighbour, whose flags it takes, gets other sizes
                like = self._likes.get(path)
                self._settle(module, live.get(like or ""), stock.get(like or ""), partners)
        for mine, old, new in configs:
            _attributes(changes, mine.__dict__, old.__dict__, new.__dict__, partners)
        for mine, old, new in pairs:
            _attributes(changes, mine.__dict__, old.__dict__, new.__dict__, partners)
            self._buffers(changes, mine, old, new)
            _children(changes, mine, old, new, partners)
        for name, value in self.values.items():
            target = self.after[name]
            if target is not value and isinstance(target, torch.nn.Parameter):
                vars(value).update(vars(target))
                changes.swap(target, value)
        changes.put(vars(self.model), "growformer_plan", self.carry.plan)

    def _buffers(self, changes: Changes, mine: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> None:
        planned = {id(self._bare[name]): value for name, value in self.values.items()}
        for name, value in new._buffers.items():
            if id(value) in planned:
                changes.put(mine._buffers, name, planned[id(value)])
            elif not same_tensor(old._buffers.get(name), value):
                changes.put(mine._buffers, name, _as(value, mine._buffers.get(name)))

    def _settle(
        self,
        module: torch.nn.Module,
        like: torch.nn.Module | None,
        stock: torch.nn.Module | None,
        partners: dict[int, Any],
    ) -> None:
        """Make a new layer's module one of the live model's: its parameters, its configs, and its neighbour's flags."""
        held = {id(bare): self.after[name] for name, bare in self._bare.items() if name in self.after}
        for slot in (module._parameters, module._buffers):
            for name, value in slot.items():
                if id(value) in held:
                    slot[name] = held[id(value)]  # type: ignore[assignment]
        for key, value in list(vars(module).items()):
            if key not in SKIPPED:
                vars(module)[key] = meant(value, partners)
        if like is None or stock is None or type(like) is not type(module):
            return
        for key, value in vars(like).items():
            if key not in SKIPPED and not (key in vars(stock) and same(vars(stock)[key], value)):
                vars(module)[key] = value
        for name, value in module._buffers.items():
            if value is not None and id(value) not in {id(x) for x in self.after.values()}:
                module._buffers[name] = _as(value, like._buffers.get(name))
        module.training = like.training


def _as(value: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    if value is None or like is None:
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _pair_configs(
    mine: dict[str, Any], old: dict[str, Any], new: dict[str, Any], partners: dict[int, Any], found: list[Any]
) -> None:
    for key, value in new.items():
        kind = config_type()
        if not isinstance(value, kind) or id(value) in partners:
            continue
        if isinstance(mine.get(key), kind) and isinstance(old.get(key), kind):
            partners[id(value)] = mine[key]
            found.append((mine[key], old[key], value))
            _pair_configs(vars(mine[key]), vars(old[key]), vars(value), partners, found)


def _attributes(
    changes: Changes, mine: dict[str, Any], old: dict[str, Any], new: dict[str, Any], partners: dict[int, Any]
) -> None:
    """Take over what the new config made different from the old one; what a user has set stays."""
    for key in dict.fromkeys([*old, *new]):
        if key in SKIPPED or (key in old and key in new and same(old[key], new[key])):
            continue
        if key in new:
            changes.put(mine, key, meant(new[key], partners))
        else:
            changes.drop(mine, key)


def _children(
    changes: Changes, mine: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module, partners: dict[int, Any]
) -> None:
    """New modules between the old ones; what a user has added stays, behind them."""
    content = {name: partners.get(id(child), child) for name, child in new._modules.items()}
    added = {name: child for name, child in mine._modules.items() if name not in old._modules}
    clash = set(added) & set(content)
    if clash:
        raise RequestError(f"a module {min(clash)!r} was added where the grown model has one of its own")
    content |= added
    if list(content.items()) != list(mine._modules.items()):
        changes.refill(mine._modules, content)
