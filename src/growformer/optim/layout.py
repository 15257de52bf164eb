"""Where each tensor on disk lies in memory: plans speak of the one, optimizers and modules of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from growformer.errors import SourceError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class View:
    """A tensor on disk as a strided view of a tensor in memory (an expert's `w1` within all experts' `gate_up_proj`).

    Attributes:
        name: of the tensor in memory, as `state_dict` has it.
        shape: of the view, dims as on disk.
        stride: for each dim, in entries of the tensor in memory, which is contiguous.
        offset: its first entry there.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view within `whole`, a tensor of the shape in memory; writing to it writes to a contiguous `whole`."""
        import torch

        flat = whole.detach().contiguous()
        return torch.as_strided(flat, self.shape, self.stride, flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class Layout:
    """The layout of a model's tensors.

    Attributes:
        views: by name on disk.
        shapes: of the tensors in memory, by their first name; shared tensors count once.
        tied: further names of shared tensors, with the first.
    """

    views: Mapping[str, View]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def within(self) -> dict[str, list[str]]:
        """For each tensor in memory, the names of the tensors on disk that lie in it."""
        out: dict[str, list[str]] = {name: [] for name in self.shapes}
        for disk, view in self.views.items():
            out[view.name].append(disk)
        return out

    def require_whole(self) -> None:
        """Refuse a layout that does not cover every tensor in memory once.

        Raises:
            SourceError: naming the first that is not.
        """
        for name, shape in self.shapes.items():
            views = [self.views[disk] for disk in self.within[name]]
            places = {(view.offset, view.shape, view.stride) for view in views}
            held = sum(_size(view.shape) for view in views)
            if held != _size(shape) or len(places) != len(views):
                raise SourceError(
                    f"{name}: {held} of its {_size(shape)} entries are found on disk ({', '.join(self.within[name])}); "
                    f"grow the saved checkpoint instead (save_pretrained, then expand_checkpoint)"
                )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
