"""The state beside one parameter, carried through a growth by its optimizer's rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from growformer.errors import RequestError
from growformer.optim.carry import Carry, without_past
from growformer.optim.rules import StateRule


def check_state(rule: StateRule, optimizer: object, name: str, state: Mapping[str, Any]) -> None:
    """Refuse state that the rule does not speak of.

    Raises:
        RequestError: naming the parameter and the key.
    """
    odd = sorted(set(map(str, state)) - rule.keys)
    if odd:
        kind = type(optimizer).__name__
        raise RequestError(
            f"{kind} keeps {odd[0]!r} beside {name}, of which its rule says nothing; declare it: "
            f"growformer.optim.declare({kind}, StateRule(moments={{..., {odd[0]!r}: power of the gradient}}))"
        )


def grown_state(
    rule: StateRule, carry: Carry, name: str, state: Mapping[str, Any], group: Mapping[str, Any]
) -> dict[str, Any]:
    """The state beside a grown parameter that continues an old one.

    Args:
        rule: of the optimizer.
        carry: the growth.
        name: the grown parameter's.
        state: beside the old parameter; of full tensors.
        group: the parameter's group.

    Returns:
        The new state; all its tensors are new.

    Raises:
        RequestError: a tensor of `state` has not the shape that the rule gives it.
    """
    out: dict[str, Any] = {}
    old_shape = carry.old.shapes[carry.source(name) or ""]
    factors = {key: pair for pair in rule.factored for key in pair}
    for key, value in state.items():
        if value is None or key in rule.counts:
            out[key] = value.clone() if isinstance(value, torch.Tensor) else value
        elif key in factors:
            if key == factors[key][0]:
                out |= _factored(carry, name, factors[key], state, old_shape)
        else:
            start = float(group[rule.start[key]]) if key in rule.start else 0.0
            _require_shape(name, key, value, old_shape)
            out[key] = carry.moment(name, lambda _, value=value: value, rule.moments[key], start)  # type: ignore[misc]
    return {key: out[key] for key in state}


def first_state(rule: StateRule, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state beside a parameter that is new as a whole: none, or what an eager optimizer makes at once."""
    if not rule.eager:
        return {}
    out: dict[str, Any] = {key: torch.tensor(0.0) for key in rule.counts}
    for key in rule.moments:
        start = float(group[rule.start[key]]) if key in rule.start else 0.0
        out[key] = torch.full_like(parameter.detach(), start)
    return out


def _require_shape(name: str, key: str, value: Any, shape: tuple[int, ...]) -> None:
    found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    if found != shape:
        raise RequestError(f"{key!r} beside {name} is {found}, not of the parameter's shape {shape}, as its rule says")


def _factored(
    carry: Carry, name: str, pair: tuple[str, str], state: Mapping[str, Any], shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Means over rows and columns of the second moment that two vectors stand for, carried as a whole tensor.

    The two vectors mean v[i, j] = rows[i] columns[j] / mean(rows) (Shazeer & Stern, arXiv 1804.04235, Algorithm 2). The
    grown means are taken over old entries only, so that the old entries' estimates stay exact; rows and columns that
    are new as a whole start at the mean of the others, for at 0 their first updates would be unbounded.
    """
    rows, columns = state[pair[0]], state[pair[1]]
    kept = rows.dim() == len(shape)  # torch keeps the averaged dim with size 1, transformers drops it
    tall = rows if kept else rows.unsqueeze(-1)
    wide = columns if kept else columns.unsqueeze(-2)
    if torch.broadcast_shapes(tall.shape, wide.shape) != shape:
        raise RequestError(f"{pair[0]!r} beside {name} is {tuple(rows.shape)}, which are no means over rows of {shape}")
    whole = tall * wide / tall.mean(-2, keepdim=True).clamp_min(torch.finfo(tall.dtype).tiny)
    grown = carry.moment(name, lambda _: whole, 2)
    old = (~without_past(carry.plan, carry.new, name)).to(grown.device)
    out = {}
    for key, dim in ((pair[0], -1), (pair[1], -2)):
        count = old.sum(dim, keepdim=True)
        mean = grown.sum(dim, keepdim=True) / count.clamp_min(1)
        seen = count > 0
        others = (mean * seen).sum(-3 - dim, keepdim=True) / seen.sum(-3 - dim, keepdim=True).clamp_min(1)
        mean = torch.where(seen, mean, others)
        out[key] = mean if kept else mean.squeeze(dim)
    return out
