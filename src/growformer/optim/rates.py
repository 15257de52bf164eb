"""Block rates: every block of a grown parameter learns at the rate of its own age, and at a rate that may be chosen.

One table for all that makes a block differ from its tensor: the age of new entries (a new block's first update is
exactly a fresh optimizer's), their warm-up, new entries that fade in, old entries held still, and rates under which a
block multiplied by s goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from growformer.errors import RequestError, SourceError
from growformer.optim.rules import StateRule, rule_of
from growformer.optim.updates import UPDATES, settled

FORMAT = 1
"""Version of `BlockRates.state_dict`."""

MOST = 255
"""Different blocks of one parameter."""

_ATTRIBUTE = "_growformer_rates"


@dataclass(frozen=True)
class BlockRate:
    """How the entries of one block learn, against what their optimizer does with their tensor.

    Attributes:
        born: steps that the tensor had taken when the block began.
        rate: multiplies the learning rate.
        decay: multiplies the decay of weights.
        eps: multiplies Adam's eps.
        warmup: steps of the block's own over which its learning rate rises linearly from 0.
        closed: it began as zeros, which weight decay must not hold there while the block warms up.
        still: it is held as it is.
        fade: steps of the block's own over which it fades in (see `growformer.optim.fade`).
        offset: of what fades in: what the model adds to its stored numbers.
    """

    born: int = 0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0
    warmup: int = 0
    closed: bool = False
    still: bool = False
    fade: int = 0
    offset: int = 0

    def faded(self, age: int) -> float:
        """How much of its target a block is after the `age`-th of its own steps."""
        return min(1.0, age / self.fade) if self.fade else 1.0

    def shielded(self, age: int) -> bool:
        """Whether weight decay spares the block at the `age`-th of its own steps."""
        return self.closed and age <= self.warmup

    def warm(self, age: int) -> float:
        """How much of its learning rate a block has at the `age`-th of its own steps."""
        return min(1.0, age / self.warmup) if self.warmup else 1.0


@dataclass
class Table:
    """The blocks of one parameter.

    Attributes:
        blocks: what they are; never more than 255.
        index: uint8, of the parameter's shape (of the local shard's, where it is sharded): each entry's block. None:
            all of the parameter is the first block.
        taken: steps it has taken since the table was made, for optimizers that do not count them.
        target: what the block that fades in will be, [entry], up to its first step.
    """

    blocks: tuple[BlockRate, ...]
    index: torch.Tensor | None = None
    taken: int = 0
    target: torch.Tensor | None = None

    def saved(self) -> dict[str, Any]:
        """As plain data and tensors."""
        said = {"blocks": [asdict(block) for block in self.blocks], "index": self.index, "taken": self.taken}
        return said if self.target is None else {**said, "target": self.target}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Table:
        """The inverse of `saved`."""
        blocks = tuple(BlockRate(**block) for block in saved["blocks"])
        return cls(blocks, saved["index"], saved["taken"], saved.get("target"))


@dataclass
class _Pending:
    """One block in the middle of a step: its entries (None: all), and what they and their gradients were."""

    block: BlockRate
    at: torch.Tensor | None
    before: torch.Tensor
    gradient: torch.Tensor | None


class BlockRates:
    """The rates of an optimizer's parameters, applied in the hooks of its step. Made by `rates_of`.

    Scaling gradients would do nothing under Adam, which divides the scale out again. So the optimizer takes its step,
    and the updates of blocks whose rate is not 1 are made anew from its state. All others keep the optimizer's bits.

    Attributes:
        tables: by parameter; what is not there learns as its optimizer has it.
        names: of parameters, for `state_dict`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.rule: StateRule = rule_of(optimizer)
        self.tables: dict[torch.Tensor, Table] = {}
        self.names: dict[torch.Tensor, str] = {}
        self._pending: list[tuple[torch.Tensor, Mapping[str, Any], int, list[_Pending]]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def name(self, named: Iterable[tuple[str, torch.Tensor]]) -> BlockRates:
        """Say what the parameters are called."""
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        self.names |= {p: name for name, p in named if p in held}
        return self

    def warm(self, parameters: Iterable[torch.Tensor], steps: int) -> None:
        """Let whole parameters that have taken no step yet warm up, each from its own first step on."""
        for parameter in parameters:
            self.tables[parameter] = Table((BlockRate(warmup=steps),))

    def thaw(self) -> None:
        """Let blocks that were held still (`freeze_old`) learn again."""
        for table in self.tables.values():
            table.blocks = tuple(replace(block, still=False) for block in table.blocks)

    def steps(self, parameter: torch.Tensor) -> int:
        """Steps that a parameter has taken."""
        if not self.rule.counts:
            return self.tables[parameter].taken if parameter in self.tables else 0
        return int(self.optimizer.state.get(parameter, {}).get(self.rule.counts[0], 0))

    def births(self, parameter: torch.Tensor) -> torch.Tensor:
        """When each entry began: the steps its tensor had taken then, int64, of the parameter's shape."""
        table = self.tables.get(parameter, Table((BlockRate(),)))
        if table.index is None:
            return torch.full(parameter.shape, table.blocks[0].born, device=parameter.device)
        return torch.tensor([block.born for block in table.blocks], device=table.index.device)[table.index.long()]

    def _before(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._pending = []
        if not self.tables:
            return
        closure = any(x is not None and x is not optimizer for x in (*args, *kwargs.values()))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                table = self.tables.get(parameter)
                if table is None or not parameter.requires_grad:
                    continue
                steps = self.steps(parameter)
                blocks = []
                for number, block in enumerate(table.blocks):
                    if self._plain(block, group, steps + 1, parameter.dtype):
                        continue
                    at = None if table.index is None else table.index == number
                    blocks.append(self._hold(parameter, group, block, at, steps + 1 - block.born, closure))
                self._pending.append((parameter, group, steps, blocks))

    def _hold(
        self,
        parameter: torch.Tensor,
        group: Mapping[str, Any],
        block: BlockRate,
        at: torch.Tensor | None,
        age: int,
        closure: bool,
    ) -> _Pending:
        """Keep what a block is before the step; where weight decay is a part of the gradient, give it its own."""
        before = _chosen(local(parameter), at).clone()
        change = self._coupled(block, group, age)
        if change == 0 or block.still:
            return _Pending(block, at, before, None)
        if closure or getattr(self.optimizer, "grad_scale", None) is not None:
            raise RequestError(
                f"{type(self.optimizer).__name__} adds weight decay to the gradient, and some blocks have a decay of "
                f"their own: call step() without a closure, and unscale gradients before it"
            )
        if parameter.grad is None:
            return _Pending(block, at, before, None)
        whole = local(parameter.grad)
        gradient = _chosen(whole, at).clone()
        _put(whole, at, gradient + change * before)
        return _Pending(block, at, before, gradient)

    def _coupled(self, block: BlockRate, group: Mapping[str, Any], age: int) -> float:
        """What times the weight must be added to the gradient, for the block to have its own decay."""
        if self.rule.decay_of(group) != "coupled":
            return 0.0
        sign = -1 if group.get("maximize") else 1
        return sign * float(group.get("weight_decay", 0)) * ((0.0 if block.shielded(age) else block.decay) - 1)

    def _after(self, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for parameter, group, steps, blocks in self._pending:
            table = self.tables[parameter]
            taken = parameter.grad is not None
            table.taken += taken
            if self.rule.counts:
                taken = self.steps(parameter) > steps
            for held in blocks:
                if taken:
                    self._redo(parameter, group, steps + 1, held, table.target)
                if held.gradient is not None and parameter.grad is not None:
                    _put(local(parameter.grad), held.at, held.gradient)
            table.target = None if taken else table.target
            self._settle(parameter, group, steps + taken)
        self._pending = []

    @torch.no_grad()
    def _redo(
        self,
        parameter: torch.Tensor,
        group: Mapping[str, Any],
        steps: int,
        held: _Pending,
        target: torch.Tensor | None,
    ) -> None:
        """Give a block the update that is its own."""
        block, at = held.block, held.at
        age = steps - block.born
        whole = local(parameter)
        if block.still:
            _put(whole, at, held.before)
            return
        before = _wide(held.before)
        lr, kept = float(group["lr"] or 0), before
        if self.rule.decay_of(group) == "decoupled":
            decay = 0.0 if block.shielded(age) else block.decay * block.warm(age)
            full = lr * float(group.get("weight_decay", 0))
            kept, plainly = before * (1 - full * decay), before * (1 - full)
        else:
            plainly = before
        rate = block.rate * block.warm(age) * block.faded(age - 1)
        if self.rule.update:
            step = UPDATES[self.rule.update](self._reader(parameter, group, held), group, age, block.eps)
            after = kept - step.mul_(lr * rate)
        else:
            after = kept + (_wide(_chosen(whole, at)) - plainly) * rate
        if age <= block.fade:
            if age > 1:
                after = (after + block.offset).mul_(age / (age - 1)).sub_(block.offset)
            elif target is not None:
                after = _wide(target).mul(block.faded(1)).sub_(block.offset).reshape(before.shape)
        _put(whole, at, after.to(whole.dtype))

    def _reader(self, parameter: torch.Tensor, group: Mapping[str, Any], held: _Pending) -> Any:
        def read(key: str) -> torch.Tensor:
            if key != "gradient":
                return _wide(_chosen(local(self.optimizer.state[parameter][key]), held.at))
            assert parameter.grad is not None
            gradient = _wide(_chosen(local(parameter.grad), held.at))
            if group.get("maximize"):
                gradient = -gradient
            if self.rule.decay_of(group) == "coupled":
                gradient = gradient + float(group["weight_decay"]) * _wide(held.before)
            return gradient

        return read

    def _plain(self, block: BlockRate, group: Mapping[str, Any], steps: int, dtype: torch.dtype) -> bool:
        """Whether the optimizer's own update is the block's at the step that makes its tensor's count `steps`."""
        age = steps - block.born
        own = block.still or age <= block.fade or (block.rate, block.decay, block.eps) != (1.0, 1.0, 1.0)
        return not own and age >= block.warmup and settled(self.rule.update, group, age, steps, dtype)

    def _settle(self, parameter: torch.Tensor, group: Mapping[str, Any], steps: int) -> None:
        """Drop the table of a parameter all of whose blocks now learn as their tensor does."""
        blocks = self.tables[parameter].blocks
        if all(self._plain(block, group, steps + 1, parameter.dtype) for block in blocks):
            del self.tables[parameter]

    def state_dict(self) -> dict[str, Any]:
        """Everything, by the parameters' names; plain data and tensors, for `torch.save`.

        Raises:
            SourceError: a parameter has no name.
        """
        unnamed = sum(parameter not in self.names for parameter in self.tables)
        if unnamed:
            raise SourceError(f"{unnamed} parameters have rates, but no name; say rates.name(model.named_parameters())")
        return {
            "format": FORMAT,
            "parameters": {self.names[parameter]: table.saved() for parameter, table in self.tables.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for an optimizer of parameters with the same names (see `name`).

        Raises:
            SourceError: another format, a name that no parameter has, or another shape.
        """
        if state.get("format") != FORMAT:
            raise SourceError(f"the rates have format {state.get('format')!r}; this version reads format {FORMAT}")
        known = {name: parameter for parameter, name in self.names.items()}
        tables = {}
        for name, saved in state["parameters"].items():
            if name not in known:
                raise SourceError(
                    f"there are rates of {name}, and the optimizer has no parameter of that name; "
                    f"rates_of(optimizer, model) says how parameters are called"
                )
            parameter, table = known[name], Table.of(saved)
            if table.index is not None:
                if table.index.shape != local(parameter).shape:
                    raise SourceError(
                        f"{name}: the rates are of shape {list(table.index.shape)}, it has {list(parameter.shape)}"
                    )
                table.index = table.index.to(parameter.device)
            if table.target is not None:
                table.target = table.target.to(parameter.device)
            tables[parameter] = table
        self.tables = tables


def rates_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None) -> BlockRates:
    """An optimizer's block rates; made at the first call, and always the same afterwards.

    Args:
        optimizer: of a class that has a state rule.
        model: says what its parameters are called, which saving and loading need (`gf.grow` has said so).

    Raises:
        RequestError: the optimizer's class has no rule.
    """
    optimizer = inner_optimizer(optimizer)
    rates = getattr(optimizer, _ATTRIBUTE, None)
    if rates is None:
        rates = BlockRates(optimizer)
        setattr(optimizer, _ATTRIBUTE, rates)
    return rates if model is None else rates.name(model.named_parameters())


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within wrappers that keep it under `optimizer` (accelerate's, and so the Trainer's)."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values on this machine: the shard, where it is sharded."""
    found = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def _chosen(tensor: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    return tensor if at is None else tensor[at]


def _put(tensor: torch.Tensor, at: torch.Tensor | None, values: torch.Tensor) -> None:
    if at is None:
        tensor.copy_(values)
    else:
        tensor[at] = values


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
