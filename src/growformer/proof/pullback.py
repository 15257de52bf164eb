"""The source as the grown file has it: R W' for writers, W' E for readers, factors divided out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import Family
from growformer.errors import ChangedError
from growformer.proof.certificate import LayerMap, Placed, Sides
from growformer.proof.equations import Slabs, Tensors, half_ulp, pull_back
from growformer.proof.origin import Origin

__all__ = ["PulledBack", "within_one_rounding"]


class PulledBack:
    """The source's tensors, pulled back in float64 from the target's when they are read, and not before.

    Takes what `certify` takes.

    Raises:
        ChangedError: receipt, names and configs do not belong together, so that nothing can be pulled back.
    """

    def __init__(
        self,
        family: Family,
        axes: Mapping[str, Mapping[str, Any]],
        layers: LayerMap | Sequence[int | None],
        source: Tensors,
        target: Tensors,
        source_config: Mapping[str, Any],
        target_config: Mapping[str, Any],
        *,
        source_full: Mapping[str, Any] | None = None,
        origin: Origin | None = None,
    ) -> None:
        told = (family, axes, layers, source, target, source_config, target_config)
        self._sides = Sides(*told, source_full, origin)
        tensors = {} if self._sides.failures else self._sides.check_names()
        if self._sides.failures:
            raise ChangedError("nothing can be pulled back:\n  " + "\n  ".join(self._sides.failures))
        self._splits: dict[str, Factor] = {}
        for layer in self._sides.pairs(tensors):
            self._splits |= {name: factor for name, (factor, _) in self._sides.check_qk(layer).items()}
        facts, experts = self._sides.facts, self._sides.family.experts
        split = experts.axis if experts is not None and facts is not None and facts.split > 1 else None
        self._slices: dict[str, list[Placed]] = {}
        self._of: dict[str, Placed] = {}
        for tensor in tensors.values():  # of copies, the first
            if tensor.source is not None:
                self._of.setdefault(tensor.source, tensor)
                if split in tensor.index:
                    self._slices.setdefault(tensor.source, []).append(tensor)

    @property
    def names(self) -> list[str]:
        return list(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._sides.source.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name in self._slices:  # each holds other channels of it, and nothing of the rest
            return torch.stack([self._read(tensor, rows) for tensor in self._slices[name]]).sum(0)
        return self._read(self._of[name], rows)

    def _read(self, tensor: Placed, rows: slice | None) -> Tensor:
        sides, offset = self._sides, self._sides.offset(tensor)
        places = sides.places(tensor, self._splits.get(tensor.name, ONE))
        if len(tensor.copies) < 2:
            return pull_back(places, sides.target, tensor.name, rows, offset)
        together = sides.stacked(tensor, places)
        return pull_back(together, Slabs(sides.target, tensor.copies), tensor.name, rows, offset).squeeze(-1)


def within_one_rounding(source: Tensor, pulled: Tensor, factor: Factor | None = None) -> Tensor:
    """Whether each pulled-back weight is the source's, or within the one rounding that its factor took.

    Args:
        source: the source's tensor, in its storage dtype.
        pulled: its pull-back, in float64.
        factor: what the stored weights are of the source's, where one is known; a power of two (or 1) rounds nothing.

    Returns:
        A bool tensor of the same shape.
    """
    wanted = source.double()
    if factor is not None and factor.exponent is not None:
        return pulled == wanted
    if factor is None:
        # Rounding moves a number by half an epsilon of itself at most, whatever the factor.
        info = torch.finfo(source.dtype)
        slack = wanted.abs().clamp(min=info.tiny) * (info.eps / 2)
    else:
        slack = half_ulp((wanted * float(factor)).to(source.dtype)) / float(factor)
    # The pull-back itself divides in float64, which moves its last bit.
    return (pulled - wanted).abs() <= slack + 2.0**-52 * wanted.abs()
