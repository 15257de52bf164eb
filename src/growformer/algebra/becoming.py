"""The Becoming type: how a model of one family becomes one of another that computes the same, as one literal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from growformer.algebra.pattern import NamePattern


@dataclass(frozen=True)
class Becoming:
    """A dense family and a family with experts (Sparse Upcycling, arXiv 2212.05055).

    A dense model is a mixture of one expert whose weight is one. Under the names of the other family it grows as that
    family does, but for its experts: they become whole copies under a new router, exact where the weights of a token's
    experts add up to one (see `Experts.whole`).

    Attributes:
        source, target: the names of the two families.
        architectures: for each class of the source, the target's.
        tensors: for each tensor of the source that has another name in the target, that name; an index axis that only
            the new name holds is 0. All other names stay.
        new: names of target tensors that come from none, with the source tensor whose std they start with; "" starts
            with the config's initializer_range. They are closed where they write the stream, as a new layer is.
        fields: sizes of the target that start as another field of the source, or, where only `new` tensors have them,
            are as that field unless they are asked for.
        sets: config fields of the target, with the values that make it the mixture that is meant.
        requires: config fields of the source that the target has no place for, with the one value that needs none.
        idle: config fields of the source that touch nothing where `requires` holds, and are left out.
    """

    source: str
    target: str
    architectures: Mapping[str, str]
    tensors: Mapping[str, str]
    new: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, object] = field(default_factory=dict)
    requires: Mapping[str, object] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    def renamed(self, name: str) -> str:
        """The name that the target's family knows a source tensor by."""
        for old, new in self._names:
            index = old.match(name)
            if index is not None:
                return new.format({axis: index.get(axis, 0) for axis in new.axes})
        return name

    @cached_property
    def _names(self) -> tuple[tuple[NamePattern, NamePattern], ...]:
        return tuple((NamePattern(old), NamePattern(new)) for old, new in self.tensors.items())
