"""Growth of a sharded model: built anew without memory, sharded as before, and filled one parameter at a time."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from growformer.checkpoint.layout import layout_of
from growformer.checkpoint.skeleton import skeleton, stock_skeleton, stock_type
from growformer.distributed.agree import agree
from growformer.distributed.shards import place, put, release, same_place, whole
from growformer.distributed.states import ShardedStates
from growformer.distributed.supported import require_supported, unwrapped
from growformer.errors import RequestError, SourceError
from growformer.optim.carry import Carry
from growformer.optim.tables import Pace
from growformer.planning import Plan

if TYPE_CHECKING:
    import transformers

Sharder = Callable[[Any], Any]
"""Shards a model: what the user did to the small one (`parallelize_module`, `fully_shard`, `compile`). It gets a model
without memory, and returns it, a wrapper of it, or None for the model itself."""


def grow_sharded(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    planned: Callable[[transformers.PreTrainedModel], Plan],
    shard: Sharder,
    pace: Pace | None = None,
) -> Any:
    """Grow a sharded model, with its optimizer. Called by every rank at once.

    The grown model is a new object. The old one is used up: each of its shards is given back as soon as nothing needs
    it, so that a rank holds its shards of both and the whole of one parameter, old and grown. The optimizer, its
    groups and its schedulers are the same objects; parameters and state in them are the grown model's.

    All that can be refused is refused before anything is touched, on every rank.

    Args:
        model: a model of transformers whose parameters are DTensors, between two steps.
        optimizer: over its parameters, or several that share them; of classes with a state rule. None: the model
            alone.
        planned: makes the plan from the small model without memory.
        shard: what was done to the small model, to be done to the grown one.
        pace: how new and old blocks learn afterwards.

    Returns:
        What `shard` returned.

    Raises:
        RequestError: the model or the optimizer is none that can grow so, ranks disagree, or `shard` does something
            else to the grown model.
        SourceError: a parameter cannot grow in memory.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RequestError(
            "shard=... is for a run of torch.distributed, and there is none: launch it with torchrun, and call "
            "torch.distributed.init_process_group()"
        )
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    growth, error = None, None
    try:
        growth = _Growth(model, optimizers, planned, pace or Pace())
    except Exception as problem:  # whatever it is, the other ranks must hear of it
        error = problem
    agree({} if growth is None else growth.facts(), error)
    assert growth is not None
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # after eight growths, what is compiled would silently be run uncompiled
    grown = growth.rebuild(shard)
    with torch.no_grad():
        growth.move()
    return grown


class _Growth:
    """A growth in progress.

    Attributes:
        carry: the growth, parameter by parameter.
        before, after: the tensors of the small and of the grown model, by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        planned: Callable[[transformers.PreTrainedModel], Plan],
        pace: Pace,
    ) -> None:
        self.model = require_supported(model, optimizers)
        for module in self.model.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.reshard()  # after a forward without backward the root's parameters are whole
        old = stock_skeleton(self.model)
        self.plan = planned(old)
        self.pace = pace
        self.bare = skeleton(self.model, self.plan.target_config)
        self.carry = Carry(self.plan, layout_of(old), layout_of(self.bare))
        self.before = _held(self.model, self.carry.old.tied)
        self.after: dict[str, torch.Tensor] = {}
        self.continued: dict[str, str] = {}
        for name in self.carry.names:
            source = self.carry.source(name)
            if source is not None and self.carry.continues(name):
                self.continued[name] = source
        self._require_whole()
        self._require_at_rest()
        self.states = [ShardedStates(each, self.carry, self.continued, self.before, pace) for each in optimizers]

    def _require_whole(self) -> None:
        twice = [old for old, count in Counter(self.continued.values()).items() if count > 1]
        if twice:
            raise SourceError(f"{min(twice)} would go on in several parameters; grow the saved checkpoint instead")
        lost = {name for name, _ in self.model.named_parameters()} - set(self.continued.values())
        bare = {name for name, _ in self.bare.named_parameters()} - set(self.carry.names)
        if lost or bare:
            raise SourceError(
                f"{min([*lost, *bare])} is a parameter of the model, but no tensor of the plan; it cannot grow in "
                f"memory"
            )

    def _require_at_rest(self) -> None:
        for name, tensor in self.before.items():
            if tensor.grad is not None:
                raise RequestError(
                    f"{name} has a gradient, which would not fit the grown parameter: grow between steps, after "
                    f"optimizer.step() and optimizer.zero_grad(set_to_none=True)"
                )
            if tensor.is_meta:
                raise RequestError(f"{name} is on the meta device; load the model before it grows")
            if isinstance(tensor, DTensor) and tensor.device_mesh.device_type != tensor.device.type:
                raise RequestError(
                    f"{name} lies on {tensor.device.type}, and its mesh is of {tensor.device_mesh.device_type}: models "
                    f"offloaded to the CPU cannot grow in memory; save, grow the checkpoint, and load it"
                )

    def facts(self) -> dict[str, str]:
        """What all ranks must agree on."""
        plan = self.plan
        return {
            "request": str(dict(plan.request)),
            "method": plan.method,
            "seed": str(plan.seed),
            "new layers' places": str({axis: list(old) for axis, old in plan.layers.items()}),
            "pace": str(self.pace),
            "optimizer": " ".join(states.facts() for states in self.states),
            "plan": hashlib.sha256(plan.dumps().encode()).hexdigest(),
        }

    def rebuild(self, shard: Sharder) -> Any:
        """The grown model, sharded, with memory but without values."""
        self.bare.train(self.model.training)
        named = dict(self.bare.named_parameters())
        for name in self.carry.names:
            if name in named:
                named[name].requires_grad_(self.before[self.carry.like(name) or ""].requires_grad)
        grown, error = None, None
        try:
            result = shard(self.bare)
            grown = self.bare if result is None else result
            self._require_alike(unwrapped(grown))
        except Exception as problem:
            error = problem
        agree({f"sharding of {name}": place(x) for name, x in self.after.items()}, error)
        inner = unwrapped(grown)
        if any(x.is_meta for x in self.after.values()):
            # Buffers have been computed; memory for the parameters would put others, without values, in their places.
            buffers = {name: x for name, x in inner.named_buffers() if not x.is_meta}
            inner.to_empty(device=self.model.device)
            for name, buffer in inner.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            self.after = _held(inner, self.carry.new.tied)
        if hasattr(self.model, "generation_config"):
            inner.generation_config = self.model.generation_config
        inner.growformer_plan = self.plan
        for states in self.states:
            states.build_tables(self.after)
        return grown

    def _require_alike(self, grown: Any) -> None:
        """Refuse what `shard` made of the grown model, if the small one is something else."""
        if grown is not self.bare:
            raise RequestError(
                f"shard(model) returned another model ({type(grown).__name__}); it is to shard the one it is given, "
                f"and to return that or nothing"
            )
        self.after = {name: x for name, x in _held(grown, self.carry.new.tied).items() if name in self.carry.new.shapes}
        for name, shape in self.carry.new.shapes.items():
            if name not in self.after or tuple(self.after[name].shape) != shape:
                raise RequestError(f"shard(model) has changed {name}, which was {list(shape)}")
        for name in self.carry.names:
            like = self.before[self.carry.like(name) or ""]
            if like.dtype != self.after[name].dtype:
                raise RequestError(
                    f"{name} is {self.after[name].dtype} in the grown model, and {like.dtype} in the small one; "
                    f"shard(model) is to give it the same dtype"
                )
            if isinstance(like, DTensor) != isinstance(self.after[name], DTensor):
                raise RequestError(
                    f"shard(model) leaves {name} as {place(self.after[name])}; in the small model it is {place(like)}"
                )
        if _recomputes(self.model) and not _recomputes(grown):
            raise RequestError(
                "the small model recomputes activations, and the grown one does not: call "
                "model.gradient_checkpointing_enable() in shard(model)"
            )

    def move(self) -> None:
        """Fill the grown model and the optimizer's state, giving the old shards back on the way."""
        last = {old: name for name in self.carry.names for old in self.carry.reads(name)}
        fetched: dict[str, torch.Tensor] = {}

        def fetch(name: str) -> torch.Tensor:
            if name not in fetched:
                fetched[name] = whole(self.before[name])
            return fetched[name]

        applier = self.carry.applier(fetch)
        for name in self.carry.names:
            after, source = self.after[name], self.continued.get(name)
            if source is not None and self.carry.unchanged(name) and same_place(self.before[source], after):
                _local(after).copy_(_local(self.before[source]))
            else:
                made = torch.empty(self.carry.new.shapes[name], dtype=after.dtype, device=after.device)
                self.carry.weight(name, applier, made)
                put(after, made)
                del made
            fetched.clear()
            for states in self.states:
                states.move(name, after)
            for old in self.carry.reads(name):
                if last[old] == name:
                    release(self.before[old])
        for states in self.states:
            states.commit(self.after)


def _held(model: torch.nn.Module, tied: Any) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by name.

    Raises:
        RequestError: two that are tied in the stock model are not the same tensor.
    """
    held: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    for name, first in tied.items():
        if held.get(name) is not held.get(first):
            raise RequestError(
                f"{name} and {first} are one tensor in a stock {stock_type(model).__name__} of this config, and two in "
                f"the sharded one: shard the modules that hold it alike, or call model.tie_weights() after that"
            )
    return held


def _recomputes(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
