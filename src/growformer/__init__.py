"""Grow a Transformer without changing what it computes; then keep training it."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Names are loaded when first used: `growformer --help` should not wait for torch.
_HOMES = {
    "expand": "growformer.api",
    "expand_checkpoint": "growformer.api",
    "fuse": "growformer.api",
    "grow": "growformer.api",
    "new_parameters": "growformer.api",
    "plan": "growformer.api",
    "verify": "growformer.api",
    "compose": "growformer.planning.expansions",
    "MLPExpansion": "growformer.planning.expansions",
    "HeadAddition": "growformer.planning.expansions",
    "HeadsExpansion": "growformer.planning.expansions",
    "AttentionExpansion": "growformer.planning.expansions",
    "HiddenExpansion": "growformer.planning.expansions",
    "LayerAddition": "growformer.planning.expansions",
    "GrowformerError": "growformer.errors",
}

__all__ = [
    "AttentionExpansion",
    "GrowformerError",
    "HeadAddition",
    "HeadsExpansion",
    "HiddenExpansion",
    "LayerAddition",
    "MLPExpansion",
    "__version__",
    "compose",
    "expand",
    "expand_checkpoint",
    "fuse",
    "grow",
    "new_parameters",
    "plan",
    "verify",
]

if TYPE_CHECKING:
    from growformer.api import expand, expand_checkpoint, fuse, grow, new_parameters, plan, verify
    from growformer.errors import GrowformerError
    from growformer.planning.expansions import (
        AttentionExpansion,
        HeadAddition,
        HeadsExpansion,
        HiddenExpansion,
        LayerAddition,
        MLPExpansion,
        compose,
    )


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'growformer' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
