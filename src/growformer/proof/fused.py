"""What can be said of two models fused into one: every block is one model's, all else is zero, and what it lost.

The blocks are found from the family's patterns and the two configs' sizes, not from the plan's lifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growformer.algebra import WILD, Atom, Dim, Factor, Family, NamePattern, TensorPattern
from growformer.planning.cover import stored_dims
from growformer.proof.claim_changed import token_cost
from growformer.proof.claims import Claim
from growformer.proof.difference import compare_outputs, worst

if TYPE_CHECKING:
    import torch

    from growformer.proof.outputs import Outputs

Read = Callable[[str], "torch.Tensor"]
"""Reads a tensor by its name on disk."""


@dataclass(frozen=True)
class Told:
    """What a check of the blocks is told of a fusion.

    Attributes:
        family: of both models.
        prefix: what patterns have before names that a bare backbone's checkpoint leaves out.
        sizes: for both models, the size of every axis.
        factors: by tensor, what its blocks are multiplied by; 1 where it is not named.
        averaged, alike: see `growformer.planning.fuse.Fusion`.
        sources: for both models, by tensor of the fused one, the tensor it comes from.
        wide: the axes that are added up.
    """

    family: Family
    prefix: str
    sizes: tuple[Mapping[str, int], Mapping[str, int]]
    factors: Mapping[str, Factor]
    averaged: Collection[str]
    alike: Collection[str]
    sources: tuple[Mapping[str, str], Mapping[str, str]]
    wide: Collection[str]


def blocks(told: Told, one: Read, other: Read, fused: Read) -> Claim:
    """Every entry of the fused model: one model's block, the other's, or zero.

    Args:
        told: the fusion.
        one, other, fused: read the three models' tensors.
    """
    failures: list[str] = []
    for name in told.sources[0]:
        said = _check(told, name, one(told.sources[0][name]), other(told.sources[1][name]), fused(name))
        failures += [f"{name}: {said}"] if said else []
    total = len(told.sources[0])
    more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
    detail = "; ".join(failures[:3]) + more
    own = total - len(told.averaged) - len(told.alike)
    found = f"{total} tensors: {own} with a block of each model's and zeros, {len(told.averaged)} averaged"
    found += f", {len(told.alike)} the same in both"
    return Claim("blocks", not failures, found if not failures else detail, f"{total} of {total}", detail=detail)


def _check(told: Told, name: str, a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> str:
    """What is wrong with a fused tensor; empty where nothing is."""
    import torch

    if name in told.averaged or name in told.alike:
        wanted = ((a.double() + b.double()) / 2).to(fused.dtype)
        if name in told.alike and not torch.equal(a, b):
            return "it serves both models, and is not the same in both"
        return "" if torch.equal(wanted, fused) else "is not the mean of both models'"
    whole = told.prefix + name
    found = told.family.find(name if _head(told.family, name) else whole)
    offset = max((told.family.offset(atom) for atom in found[1].atoms()), default=0)
    factor = float(told.factors.get(name, Factor.of(1)))
    rest = torch.ones(fused.shape, dtype=torch.bool)
    for which, source in enumerate((a, b)):
        places = _places(told, found[0], found[1], source.shape, which)
        if any(size != have for (_, size), have in zip(places, fused.shape, strict=True)):
            return f"is {list(fused.shape)}, and {[size for _, size in places]} is what both take"
        box = torch.meshgrid(*(at for at, _ in places), indexing="ij")
        wanted = (source.double() + offset) * factor - offset
        if not torch.equal(fused[box], wanted.to(fused.dtype)):
            return f"the block of the {'other' if which else 'one'} model is not {factor:g} times its own"
        rest[box] = False
    if bool((fused[rest] != -offset).any()):
        return "holds more than the two models' blocks"
    return ""


def _head(family: Family, name: str) -> bool:
    return any(pattern.match(name) is not None for pattern, _ in family.patterns)


def _places(
    told: Told, name: NamePattern, pattern: TensorPattern, shape: tuple[int, ...], which: int
) -> list[tuple[torch.Tensor, int]]:
    """For each dim of a tensor, where a model's channels stand in the fused one, and how many that has."""
    dims = stored_dims(name, pattern)
    return [_dim_places(told, dim, size, which) for dim, size in zip(dims, shape, strict=True)]


def _dim_places(told: Told, dim: Dim, stored: int, which: int) -> tuple[torch.Tensor, int]:
    import torch

    if dim.atom is not None:
        return _atom_places(told, dim.atom, stored, which)
    parts = [_dim_places(told, part, stored, which) for part in dim.parts]
    at, size = parts[0]
    for inner, count in parts[1:]:
        if dim.kind == "concat":
            at, size = torch.cat([at, inner + size]), size + count
        else:
            at, size = (at[:, None] * count + inner).flatten(), size * count
    return at, size


def _atom_places(told: Told, atom: Atom, stored: int, which: int) -> tuple[torch.Tensor, int]:
    import torch

    if not isinstance(atom.axis, str) or atom.axis == WILD:
        size = stored if atom.axis == WILD else int(atom.axis)
        return torch.arange(size), size
    sizes = [sizes[atom.axis] for sizes in told.sizes]
    if atom.axis not in told.wide:
        return torch.arange(sizes[0]), sizes[0]
    return torch.arange(sizes[which]) + (sizes[0] if which else 0), sum(sizes)


@dataclass(frozen=True)
class Measured:
    """How far a fused model is from both that are in it.

    Attributes:
        relative: max|f - m| / max|m| over the outputs: f the fused model's, m the mean of both models' (of outputs that
            are as wide as both together, one's beside the other's).
        apart: the same between the one model and the other; None where they are not as wide.
        costs: mean cross-entropy of the next token in nats, of: one, other, the mean of their logits, fused; None where
            there are none.
    """

    relative: float
    apart: float | None
    costs: tuple[float | None, ...]

    @property
    def text(self) -> str:
        """For people."""
        apart = "" if self.apart is None else f" (those are {self.apart:.1e} apart)"
        said = f"outputs {self.relative:.1e} from the mean of both models'{apart}"
        if None in self.costs:
            return said
        one, other, mean, fused = self.costs
        return f"{said}, a token costs {one:.4f} and {other:.4f} -> {fused:.4f} nats (by the mean of logits {mean:.4f})"

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is no finite number is null."""
        names = ("one", "other", "mean", "fused")
        costs = {f"cost_{name}": x for name, x in zip(names, self.costs, strict=True)}
        found = {"relative": self.relative, "apart": self.apart, **costs}
        return {name: x if x is not None and math.isfinite(x) else None for name, x in found.items()}


def measure(one: Outputs, other: Outputs, fused: Outputs, inputs: Mapping[str, torch.Tensor]) -> Measured:
    """Compare a fused model's outputs with both models'.

    Args:
        one, other, fused: their outputs by name, of the same inputs.
        inputs: by keyword.

    Raises:
        UncheckedError: an output is neither as wide as each model's nor as both together.
    """
    import torch

    alike = all(x.shape == other[name].shape for name, x in one.items())
    mean = {
        name: (x + other[name]) / 2
        if x.shape == other[name].shape == fused[name].shape
        else torch.cat([x, other[name]], dim=-1)
        for name, x in one.items()
    }
    costs = tuple(token_cost(found, inputs) for found in (one, other, mean, fused))
    apart = worst(compare_outputs(one, other)).relative if alike else None
    return Measured(worst(compare_outputs(mean, fused)).relative, apart, costs)
