"""The block rates of one parameter, carried through a growth: new blocks get an age, old ones what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from growformer.algebra import ONE
from growformer.errors import RequestError
from growformer.optim.carry import Carry, Kind
from growformer.optim.fade import Behind
from growformer.optim.rates import MOST, BlockRate, Table
from growformer.optim.rules import StateRule


@dataclass(frozen=True)
class Pace:
    """How blocks learn after a growth.

    Attributes:
        warmup: steps over which the learning rate of new blocks rises linearly from 0.
        freeze_old: old entries are held as they are.
        keep_dynamics: old entries that were multiplied by s learn at a rate under which they move as before, times s.
        fade: steps over which what fades in does so; 0: it stays zero until it learns, or a line search sets it.
    """

    warmup: int = 0
    freeze_old: bool = False
    keep_dynamics: bool = False
    fade: int = 0


def grown_table(
    rule: StateRule,
    carry: Carry,
    name: str,
    table: Table | None,
    steps: int,
    group: Mapping[str, Any],
    pace: Pace,
    device: torch.device,
    behind: Behind | None = None,
) -> Table:
    """The table of a grown parameter.

    Args:
        rule: of the optimizer.
        carry: the growth.
        name: the grown parameter's.
        table: the old parameter's, of full tensors; None: it had none, or there was no such parameter.
        steps: steps the old parameter had taken.
        group: the parameter's group.
        pace: how blocks learn.
        device: of the index.
        behind: what fades in in it.

    Raises:
        RequestError: `keep_dynamics`, and no rate keeps them; more than 255 different blocks; or what is to fade in
            from an earlier growth has not begun, or would be held still on the way.
    """
    before = table or Table((BlockRate(),))
    if before.target is not None:
        raise RequestError(f"{name}: what the last growth made has not begun to fade in; take a step in between")
    if pace.freeze_old and any(steps - block.born < block.fade for block in before.blocks):
        raise RequestError(f"freeze_old: {name} has entries that still fade in, which freezing would stop on the way")
    kinds, meanings = carry.kinds(name)
    kinds = kinds.to(device)
    olds = torch.zeros_like(kinds)
    if before.index is not None:
        olds = carry.moment(name, lambda _: before.index, 0)  # type: ignore[arg-type, return-value]
    index = torch.zeros_like(kinds)
    found: dict[BlockRate, int] = {}
    for number, kind in enumerate(meanings):
        here = kinds == number
        if kind.new:
            born = BlockRate(steps, warmup=pace.warmup, closed=kind.closed)
            index[here] = found.setdefault(born, len(found))
            if behind is not None and kind.closed and pace.fade:
                fading = replace(born, fade=pace.fade, offset=behind.offset)
                index[here & behind.at.to(device)] = found.setdefault(fading, len(found))
            continue
        for old, block in enumerate(before.blocks):
            there = here & (olds == old)
            if bool(there.any()):
                after = _old(rule, name, block, kind, group, pace)
                index[there] = found.setdefault(after, len(found))
    target = behind.target.to(device) if behind is not None and pace.fade else None
    if len(found) > MOST:
        raise RequestError(
            f"{name}: {len(found)} blocks of different ages or rates are more than the {MOST} kept apart"
        )
    held = [number for number in range(len(found)) if bool((index == number).any())]
    if len(held) == 1:  # all of it fades in, say
        return Table((list(found)[held[0]],), None, before.taken, target)
    return Table(tuple(found), index, before.taken, target)


def _old(rule: StateRule, name: str, block: BlockRate, kind: Kind, group: Mapping[str, Any], pace: Pace) -> BlockRate:
    if pace.freeze_old:
        block = replace(block, still=True)
    if not pace.keep_dynamics:
        return block
    if kind.shared:
        raise RequestError(
            f"keep_dynamics: {name} is shared out among copies, and no rates make copies move as one did"
        )
    if kind.factor == kind.back == ONE:
        return block
    return _kept(rule, name, block, kind, group)


def _kept(rule: StateRule, name: str, block: BlockRate, kind: Kind, group: Mapping[str, Any]) -> BlockRate:
    """The rate under which a block multiplied by s moves as before, times s.

    Its gradient is b times the old one: 1/s, or of the parts s of a weight that copies share the whole, and of a copied
    writer its part. An update without unit (Adam's, but for eps) must be multiplied by s, one that is a gradient
    (SGD's) by s/b. Decay of the weight itself needs no change; decay in the gradient, which must be multiplied by b
    like the rest of it while the weight is multiplied by s, is multiplied by b/s.
    """
    if rule.dynamics is None:
        raise RequestError(
            f"keep_dynamics: {name} is multiplied by {kind.factor}, and no learning rate makes this optimizer's "
            f"updates follow; it is kept for AdamW, Adam and SGD"
        )
    if kind.offset and float(group.get("weight_decay", 0)) != 0:
        raise RequestError(
            f"keep_dynamics: {name} holds numbers to which the model adds {kind.offset}, and weight decay draws them "
            f"to 0, whatever they are multiplied by; give gains no weight decay"
        )
    s, b = float(kind.factor), float(kind.back)
    decay = block.decay if rule.decay_of(group) == "decoupled" else block.decay * b / s
    rate = s if rule.dynamics == 1 else s / b
    return replace(block, rate=block.rate * rate, decay=decay, eps=block.eps * b)
