"""Growths of stock families as a certificate is shown them: tensors by the shapes that transformers gives them."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from certified import Growth

from growformer.algebra import Family
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.methods import METHODS
from growformer.planning import apply, make_plan
from growformer.planning.choices import Choices


def family_called(name: str) -> Family:
    """A family by its name, whether or not it is served yet."""
    module = importlib.import_module(f"growformer.families.{name}")
    return next(v for v in vars(module).values() if isinstance(v, Family) and v.name == name)


def grow_stock(
    name: str,
    fields: dict[str, Any],
    request: dict[str, int],
    layers_at: Any = None,
    dtype: torch.dtype = torch.float32,
    choices: Choices | None = None,
) -> Growth:
    """Grow a tiny model of a stock family.

    Args:
        name: the family's.
        fields: config fields besides those of its sample.
        request: what to grow.
        layers_at: where new layers go.
        dtype: of all tensors.
        choices: the recipes of the request.
    """
    family = family_called(name)
    raw = {"model_type": family.model_types[0], "architectures": [family.architectures[0]], **family.sample, **fields}
    full, defaults = full_config(raw)
    raw, full = copy.deepcopy(raw), {**full, "architectures": raw["architectures"]}
    family = family.of(full)
    generator = torch.Generator().manual_seed(7)
    source = {}
    stored = stock_tensors(raw)
    bare = not any(key.startswith(family.prefix) for key in stored)
    for key, shape in stored.items():
        if family.tied is not None and key == family.tied.head and full.get(family.tied.field):
            continue
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        gain = any(
            atom.stand == "gain"
            for atom in family.find(family.full_name(key, family.prefix if bare else ""))[1].atoms()
        )
        source[key] = (1 + 0.3 * x if gain else 0.3 * x).to(dtype)
    shapes = {key: tuple(x.shape) for key, x in source.items()}
    plan = make_plan(
        family, METHODS["paper"], raw, full, defaults, shapes, request, layers_at=layers_at, choices=choices
    )
    told = copy.deepcopy(plan.to_json())
    target = copy.deepcopy(dict(plan.target_config))
    return Growth(family, told["axes"], told["layers"], source, apply(plan, source), raw, target, full)
