"""Named tensors, as proofs read them: by rows, from memory or from files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Tensors(Protocol):
    """Named tensors, read by rows."""

    @property
    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, rows: slice | None = None) -> Tensor: ...


class Slabs:
    """Tensors of one shape seen as one, stacked along a last dim, under the name of the first."""

    def __init__(self, tensors: Tensors, names: Sequence[str]) -> None:
        self._tensors, self.names = tensors, names

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(self._tensors.shape(one)) for one in self.names]
        return (*next((shape for shape in shapes if shape != shapes[0]), shapes[0]), len(self.names))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return torch.stack([self._tensors.read(one, rows) for one in self.names], -1)
