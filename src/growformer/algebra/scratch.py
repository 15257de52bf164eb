"""Memory that a thread uses again and again: the system hands out fresh pages at a fraction of the speed of a copy."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Scratch(threading.local):
    """Named arrays of any shape; each thread has its own.

    What an array holds is lost when its thread asks for that name again.
    """

    def __init__(self) -> None:
        self._parts: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array with nothing in particular in it."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        part = self._parts.pop(name, None)
        if part is None or part.nbytes < size:
            part = None  # the old one goes first
            part = np.empty(size, dtype=np.uint8)
        self._parts[name] = part
        return part[:size].view(dtype).reshape(shape)
