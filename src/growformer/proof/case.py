"""The growth that is to be proved: its plan, its two folders, their configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra import Family, TensorPattern
from growformer.checkpoint import TensorFiles
from growformer.planning import Plan
from growformer.proof.origin import Origin

if TYPE_CHECKING:
    from growformer.proof.certificate import FileTensors
    from growformer.proof.eps import Passing
    from growformer.proof.equations import Tensors


@dataclass(frozen=True)
class Case:
    """One growth to prove.

    Attributes:
        family: the model family; the target's, where the source is of another.
        plan: as made, or as the receipt holds it.
        source, target: the two folders.
        source_full: the source's config with the class's defaults filled in.
        target_config: what the target's config.json holds.
        origin: how the source became one of the target's family, where its own is another.
        dense: the source's family there.
    """

    family: Family
    plan: Plan
    source: Path
    target: Path
    source_full: Mapping[str, Any]
    target_config: Mapping[str, Any]
    origin: Origin | None = None
    dense: Family | None = None

    @property
    def source_family(self) -> Family:
        """The family that the source's own names and config belong to."""
        return self.dense or self.family

    @cached_property
    def grown(self) -> Family:
        """The family as the target's config has it: which layers are of which kind is otherwise than in the source."""
        from growformer.checkpoint.stock import full_config

        return self.family.of(full_config(self.target_config)[0])

    @cached_property
    def prefix(self) -> str:
        """What patterns have before names that a bare backbone's checkpoint leaves out."""
        with TensorFiles.open(self.source) as files:
            bare = self.family.prefix and not any(name.startswith(self.family.prefix) for name in files)
        return self.family.prefix if bare else ""

    @cached_property
    def passings(self) -> list[Passing]:
        """The norms whose eps is all that stands between the two functions; none where the growth is exact."""
        from growformer.proof.eps import passings

        return passings(self.family, self.plan.layers, self.plan.axes, self.source_full)

    def told(self, source: Tensors, target: Tensors) -> dict[str, Any]:
        """All that a certificate is told, and nothing of the plan's blocks: lifts, layers, the two folders, configs."""
        return {
            "family": self.family,
            "axes": self.plan.axes,
            "layers": self.plan.layers,
            "source": source,
            "target": target,
            "source_config": self.plan.source_config,
            "target_config": self.target_config,
            "source_full": self.source_full,
            "origin": self.origin,
        }

    def pattern(self, name: str) -> TensorPattern:
        """The pattern of a tensor on disk."""
        head = self.family.tied is not None and name == self.family.tied.head
        return self.family.find(name if head else self.prefix + name)[1]

    @contextmanager
    def open(self) -> Iterator[tuple[FileTensors, FileTensors]]:
        """The tensors of the source and of the target."""
        from growformer.proof.certificate import FileTensors

        with TensorFiles.open(self.source) as source, TensorFiles.open(self.target) as target:
            yield FileTensors(source), FileTensors(target)


def stored_bytes(folder: Path) -> int:
    """What the tensors of a folder take as they are stored."""
    with TensorFiles.open(folder) as files:
        return sum(info.stop - info.start for info in files.values())


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of a folder's tensors, as the format names them."""
    with TensorFiles.open(folder) as files:
        return {info.dtype for info in files.values()}
