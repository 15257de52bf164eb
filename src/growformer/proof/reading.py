"""Named tensors, as proofs read them: by rows, from memory or from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from growformer.checkpoint import TensorFiles


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


class DictTensors:
    """Tensors in memory, as `certify` reads them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor if rows is None else tensor[rows]


class FileTensors:
    """The safetensors files of a folder, as `certify` reads them."""

    def __init__(self, files: TensorFiles) -> None:
        from growformer.checkpoint import RowReader

        self._files, self._rows = files, RowReader(files)

    @property
    def names(self) -> list[str]:
        return self._files.names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        # An empty read has the dtype, and the files' reader alone knows how the format names dtypes.
        return self._files.read(name, slice(0, 0) if self._files[name].shape else None).dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._files.read(name, rows)

    def view(self, name: str, rows: slice) -> Tensor:
        """Rows in memory that the thread's next view overwrites."""
        return self._rows.read(name, rows)
