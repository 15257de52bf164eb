"""Drafts of families from their own samples, made once for all tests of a process."""

from __future__ import annotations

import functools

from growformer.algebra import Family
from growformer.api.infer import config_of
from growformer.drafts import infer, shrink
from growformer.families import FAMILIES


@functools.cache
def drafted(name: str) -> Family:
    """The draft of a hand-written family's sample, or of a model type's shrunk defaults."""
    hand = FAMILIES.get(name)
    if hand is None:
        return infer(shrink(config_of(name))).family
    return infer({**hand.sample, "model_type": name, "architectures": [hand.architectures[0]]}).family
