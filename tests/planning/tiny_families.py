"""Hand-written families of a few small tensors, grown in float64, and the matrices that their lifts stand for.

What is checked here is the planner against the equations that define growth (W' = E W for what writes an axis,
W' E = W for what reads it), with E written out entry by entry from the receipt's rows.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from growformer.algebra import WILD, Atom, Attention, Dim, Family, Field, NamePattern, Norm, Size, TensorPattern, lookup
from growformer.methods import METHODS
from growformer.planning import Plan, apply, make_plan
from growformer.planning.sizes import size_of
from growformer.proof.bar import BAR

PAPER = METHODS["paper"]
WILD_SIZE = 3
EPS = 0.03


def field_of(axis: str) -> str:
    """The config field of an axis in the families made here."""
    return f"{axis}_size"


def family(
    axes: Sequence[str] | Mapping[str, Size],
    tensors: Mapping[str, str],
    norms: Mapping[str, Norm] | None = None,
    attention: Attention | tuple[Attention, ...] = (),
    **facts: Any,
) -> Family:
    """A family whose axis `a` is sized by the config field `a_size`, but for those given otherwise.

    It has an axis of layers, with or without tensors in them.
    """
    sized = axes if isinstance(axes, Mapping) else {axis: Field(field_of(axis)) for axis in axes}
    if "layers" not in facts:
        sized = {**sized, "layer": Field(field_of("layer"))}
    facts["neutral"] = ("eps", *facts.get("neutral", ()))
    return Family("tiny", ("tiny",), ("TinyForCausalLM",), dict(sized), dict(tensors), norms or {}, attention, **facts)


def tensor_shape(
    family: Family, name: NamePattern, pattern: TensorPattern, config: Mapping[str, Any]
) -> tuple[int, ...]:
    """The shape that a pattern means under a config."""

    def size(atom: Atom) -> int:
        if atom.axis == WILD:
            return WILD_SIZE
        return atom.axis if isinstance(atom.axis, int) else size_of(family.axes[atom.axis], config)

    held = (dim for dim in pattern.dims if not (dim.atom and dim.atom.index and dim.atom.axis in name.axes))
    return tuple(dim.size(size) for dim in held)


def random_source(family: Family, config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a model, random."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, pattern in family.patterns:
        shape = tensor_shape(family, name, pattern, config)
        for values in itertools.product(*(range(size_of(family.axes[axis], config)) for axis in name.axes)):
            disk = name.format(dict(zip(name.axes, values, strict=True)))
            out[disk] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return out


@dataclass(frozen=True)
class Grown:
    """A source, what it became, and the plan between them."""

    family: Family
    plan: Plan
    source: dict[str, Tensor]
    target: dict[str, Tensor]

    @property
    def old(self) -> Mapping[str, Any]:
        return self.plan.source_config

    @property
    def new(self) -> Mapping[str, Any]:
        return self.plan.target_config

    def lift(self, axis: str) -> Tensor:
        """E of an axis [new, old], without its scale."""
        entry = self.plan.axes[axis]
        return matrix(entry["old"], entry["lift"])

    def scale(self, axis: str) -> float:
        return math.sqrt(Fraction(self.plan.axes[axis]["scale"]))


def grow(
    family: Family,
    config: Mapping[str, Any],
    request: Mapping[str, int],
    *,
    without: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> Grown:
    """Grow a random model of a family; `without`: tensors that the checkpoint does not have."""
    config = {"eps": EPS, "layer_size": 2, **config}
    family = family.of(config)
    source = {k: v for k, v in random_source(family, config, seed).items() if k not in without}
    plan = plan_of(family, config, source, request, seed=seed, **options)
    return Grown(family, plan, source, apply(plan, source))


def plan_of(
    family: Family, config: Mapping[str, Any], source: Mapping[str, Tensor], request: Mapping[str, int], **options: Any
) -> Plan:
    shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
    return make_plan(family, PAPER, config, config, config, shapes, request, **options)


def matrix(old: int, rows: Sequence[Sequence[Any]]) -> Tensor:
    """E [new, old] from a lift as a receipt has it: rows [count, old, E², R², mean, ...], trailing defaults dropped."""
    lines = []
    for row in rows:
        count, start = row[0], row[1]
        factor = math.sqrt(Fraction(row[2])) if len(row) > 2 else 1.0
        mean = row[4] if len(row) > 4 else 0
        for i in range(count):
            line = torch.zeros(old, dtype=torch.float64)
            if start is not None and mean:
                line[start : start + mean] = factor / mean
            elif start is not None:
                line[start + i] = factor
            lines.append(line)
    return torch.stack(lines)


def dense(dim: Dim, of: Mapping[str, Tensor]) -> Tensor:
    """E of a dim from those of its axes: Kronecker products and block diagonals."""
    if dim.atom is not None:
        axis = dim.atom.axis
        return torch.eye(axis, dtype=torch.float64) if isinstance(axis, int) else of[axis]
    parts = [dense(part, of) for part in dim.parts]
    if dim.kind == "concat":
        out = torch.zeros(sum(len(p) for p in parts), sum(p.shape[1] for p in parts), dtype=torch.float64)
        row = column = 0
        for part in parts:
            out[row : row + len(part), column : column + part.shape[1]] = part
            row, column = row + len(part), column + part.shape[1]
        return out
    out = parts[0]
    for part in parts[1:]:
        out = torch.kron(out, part)
    return out


def norm(x: Tensor, kind: str, eps: float, gain: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    """A norm over the last dim."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain + shift


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of float64."""
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= BAR * max(float(a.abs().max()), float(b.abs().max())))


def at(config: Mapping[str, Any], axis: str) -> int:
    return int(lookup(config, field_of(axis)))
