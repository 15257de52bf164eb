"""Right growths of stock families, and ways to break one rule of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from certified import Growth, failing
from stock import grow_stock

from growformer.algebra import assigned

Break = Callable[[Growth], object]
Case = tuple[str, dict[str, Any], dict[str, int], Break, tuple[str, ...]]
"""A family, config fields, a request, what is broken, and what the failure must say."""

ROOT2 = 2.0**0.5
L0 = "model.layers.0."
ATTN = L0 + "self_attn."


@cache
def _grown(name: str, how: str) -> Growth:
    fields, request, at = json.loads(how)
    return grow_stock(name, fields, request, at)


def grown(name: str, fields: dict[str, Any], request: dict[str, int], at: Any = None) -> Growth:
    """A right growth, to be broken; the same is made once."""
    return copy.deepcopy(_grown(name, json.dumps([fields, request, at])))


def times(name: str, factor: float) -> Break:
    return lambda growth: growth.times(name, factor)


def put(name: str, place: tuple[int, ...], value: float) -> Break:
    def broken(growth: Growth) -> None:
        growth.target[name][place] = value

    return broken


def told(axis: str, **other: Any) -> Break:
    return lambda growth: growth.axes[axis].update(other)


def layers(**other: list[int | None]) -> Break:
    def broken(growth: Growth) -> None:
        for axis in other:
            growth.axes.pop(axis)
        growth.layers = {**growth.layers, **other}

    return broken


def config(name: str, value: Any) -> Break:
    def broken(growth: Growth) -> None:
        growth.target_config = assigned(growth.target_config, name, value)

    return broken


def fact(**other: Any) -> Break:
    """Another fact, with the same tensors: what it demands then fails."""

    def broken(growth: Growth) -> None:
        growth.family = replace(growth.family, **other)

    return broken


def swap(name: str, a: int, b: int, dim: int = 0) -> Break:
    def broken(growth: Growth) -> None:
        x = growth.target[name].transpose(0, dim)
        x[[a, b]] = x[[b, a]]

    return broken


def norm(role: str, **other: Any) -> Break:
    def broken(growth: Growth) -> None:
        norms = growth.family.norms
        growth.family = replace(growth.family, norms={**norms, role: replace(norms[role], **other)})

    return broken


def check(case: Case, at: Any = None) -> None:
    """Assert that a growth passes, and that broken it fails and says why."""
    name, fields, request, broken, said = case
    growth = grown(name, fields, request, at)
    assert growth.certify().failures == []
    broken(growth)
    failing(growth, *said)
