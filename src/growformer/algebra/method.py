"""The Method type: which side of each axis a way of growing closes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Side = Literal["writers", "readers"]
"""The side of an axis whose new entries are zero, so that what the other side does cannot be seen."""


@dataclass(frozen=True)
class Method:
    """A way of growing, as data.

    Attributes:
        name: the word a user types.
        source: the paper.
        preserving: whether the grown model computes the same function.
        closed: for each axis, the side that is closed. Axes that a norm reads can only be closed at their writers.
    """

    name: str
    source: str
    preserving: bool
    closed: Mapping[str, Side]
