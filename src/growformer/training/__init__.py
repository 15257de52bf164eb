"""Training: loops, schedules, growth in a live run, and the Hugging Face Trainer's callback."""

from importlib import import_module
from typing import TYPE_CHECKING

# Loaded when first used: a recipe is read without torch.
_HOMES = {"GrowthCallback": "growformer.training.trainer"}

__all__ = ["GrowthCallback"]

if TYPE_CHECKING:
    from growformer.training.trainer import GrowthCallback


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'growformer.training' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
