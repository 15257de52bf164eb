"""Training: loops, schedules, growth in a live run, the Hugging Face Trainer's callback, a search on the loss."""

from importlib import import_module
from typing import TYPE_CHECKING

# Loaded when first used: a recipe is read without torch.
_HOMES = {
    "GrowthCallback": "growformer.training.trainer",
    "Searched": "growformer.training.fade",
    "line_search": "growformer.training.fade",
}

__all__ = ["GrowthCallback", "Searched", "line_search"]

if TYPE_CHECKING:
    from growformer.training.fade import Searched, line_search
    from growformer.training.trainer import GrowthCallback


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'growformer.training' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
