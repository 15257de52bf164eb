"""The claims of a grown adapter: from the tensors of the two and, where it follows its base, from the two bases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from growformer.optim.dual import box
from growformer.planning import Plan, TensorPlan
from growformer.planning.adapters import Pair, pairs_of
from growformer.planning.apply import apply, pull_back
from growformer.planning.follow import Sides, weight_of
from growformer.proof.bar import BAR
from growformer.proof.claims import Claim, Proof

if TYPE_CHECKING:
    from growformer.proof.inputs import Inputs

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """An adapter: what adapter_config.json and adapter_model.safetensors hold."""

    config: Mapping[str, Any]
    tensors: Tensors

    def pairs(self) -> dict[str, Pair]:
        """Its modules; see `pairs_of`."""
        return pairs_of(self.config, {name: tuple(x.shape) for name, x in self.tensors.items()})

    def delta(self, pair: Pair) -> torch.Tensor:
        """What it adds to a module's weight [output, input], in float64."""
        b, a = self.tensors[pair.b].double(), self.tensors[pair.a].double()
        return (b @ a) * pair.scale


def prove_rank(old: Adapter, new: Adapter) -> Proof:
    """Whether an adapter of a larger rank is the same adapter, from the two alone.

    *structure*: every old entry is there bit for bit; B's new columns are zero and A's new rows are not; nothing but
    rank and alpha differs in the configs. *algebra*: s B A in float64, module by module.
    """
    wrong = [*_config_differs(old.config, new.config), *_not_kept(old, new)]
    counts = {"modules": len(old.pairs()), "tensors": len(new.tensors)}
    found = f"{counts['tensors']} tensors of {counts['modules']} modules"
    structure = Claim("structure", not wrong, wrong[0] if wrong else found, "all", detail="; ".join(wrong[:3]))
    if wrong:
        return Proof((structure,), {"structure": counts})
    after = new.pairs()
    differences = {m: _apart(old.delta(pair), new.delta(after[m])) for m, pair in old.pairs().items()}
    module = max(differences, key=lambda m: differences[m])
    worst = differences[module]
    algebra = Claim("algebra", worst <= BAR, f"{worst:.1e}", f"{BAR:g}", detail=f"{module}: s B A moved by {worst:.1e}")
    return Proof((structure, algebra), {"structure": counts, "algebra": worst})


def _config_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    may = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    names = [name for name in {**old, **new} if name not in may and old.get(name) != new.get(name)]
    return [f"{name} is {new.get(name)!r:.80} in adapter_config.json, and was {old.get(name)!r:.80}" for name in names]


def _not_kept(old: Adapter, new: Adapter) -> list[str]:
    """What is wrong with the tensors, one sentence each."""
    if old.tensors.keys() != new.tensors.keys():
        return [f"{min(old.tensors.keys() ^ new.tensors.keys())} is in one of the two only"]
    wrong = []
    ranks = {name: pair.rank for pair in old.pairs().values() for name in (pair.a, pair.b)}
    firsts = {pair.a for pair in old.pairs().values()}
    for name, before in old.tensors.items():
        after = new.tensors[name]
        rank = ranks.get(name)
        kept, fresh = after, None
        if rank is not None:
            dim = 0 if name in firsts else 1
            kept, fresh = after.narrow(dim, 0, rank), after.narrow(dim, rank, after.shape[dim] - rank)
        if kept.dtype != before.dtype or not torch.equal(kept, before):
            wrong.append(f"{name}: its old entries are not the source's")
        elif fresh is not None and fresh.numel() and name in firsts and not bool(fresh.ne(0).any(1).all()):
            wrong.append(f"{name}: a new row is zero, as B's new columns are, and could never learn")
        elif fresh is not None and name not in firsts and bool(fresh.any()):
            wrong.append(f"{name}: a new column is not zero")
    return wrong


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a-b| / max|a|; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    largest, apart = float(a.abs().max()), float((a - b).abs().max())
    return apart / largest if largest else (0.0 if apart == 0 else float("inf"))


@dataclass(frozen=True)
class Bases:
    """The base before and after its growth.

    Attributes:
        plan: that has grown it.
        tensors: of the small base, on disk.
        sides: which dims of its weights are read and written.
        inputs: what the two are compared on.
    """

    plan: Plan
    tensors: Tensors
    sides: Sides
    inputs: Inputs


def prove_follow(plan: Plan, old: Adapter, new: Adapter, bases: Bases | None, why: str = "") -> Proof:
    """Whether an adapter does to the grown base what it did to the small one.

    *structure*: read back by the left inverses, the grown pairs are the source's, within one rounding where a factor
    rounds, and what is new in them is zero. *algebra*: small base with adapter against grown base with grown adapter,
    both grown in float64 from what is stored, and run in true float64.

    Args:
        plan: of the adapter.
        old, new: the two adapters.
        bases: None where they could not be run, and `why`.
    """
    structure, measured = _read_back(plan, old, new)
    if bases is None:
        return Proof((structure, Claim("algebra", None, "-", f"{BAR:g}", required=False, detail=why)), measured)
    worst = functional(plan, old, bases)
    measured["algebra"] = worst
    detail = f"with the adapter, the grown base's outputs differ from the small one's by {worst:.1e}"
    return Proof((structure, Claim("algebra", worst <= BAR, f"{worst:.1e}", f"{BAR:g}", detail=detail)), measured)


def _read_back(plan: Plan, old: Adapter, new: Adapter) -> tuple[Claim, dict[str, Any]]:
    counts = {"tensors": len(new.tensors), **plan.fidelity}
    there = {name: tuple(x.shape) for name, x in new.tensors.items()}
    planned = {tensor.name: tensor.shape for tensor in plan.tensors}
    if there != planned:
        odd = min(name for name in {**there, **planned} if there.get(name) != planned.get(name))
        said = f"{odd} is {list(there.get(odd, ())) or 'not there'}, and {list(planned.get(odd, ())) or 'not'} planned"
        return Claim("structure", False, said, "all", detail=said), {"structure": counts}
    filled = [t.name for t in plan.tensors if _new_is_filled(t, new.tensors[t.name])]
    if filled:
        said = f"{filled[0]}: an entry for a new channel is not zero"
        return Claim("structure", False, said, "all", detail=said), {"structure": counts}
    back = pull_back(plan, new.tensors)
    worst, where, bar = 0.0, "", BAR
    for name, before in old.tensors.items():
        # Each stored entry was rounded once.
        allowed = BAR if all(t.fidelity != "rounded" for t in plan.tensors if t.source == name) else _eps(before)
        apart = _apart(before.double(), back.get(name, torch.zeros(())))
        if apart / allowed >= worst / bar:
            worst, where, bar = apart, name, allowed
    found = f"{counts['tensors']} tensors, read back to {worst:.1e}"
    measured = {"structure": counts, "read_back": worst}
    return Claim("structure", worst <= bar, found, f"{bar:.1e}", detail=f"{where}: {found}"), measured


def _new_is_filled(tensor: TensorPlan, values: torch.Tensor) -> bool:
    """Whether an entry is not zero that the plan closes."""
    boxes = (box(block) for block in tensor.blocks() if block.source is None and not block.free)
    return any(bool(values[there].any()) for there in boxes)


def _eps(tensor: torch.Tensor) -> float:
    return max(BAR, torch.finfo(tensor.dtype).eps)


def functional(plan: Plan, old: Adapter, bases: Bases) -> float:
    """The relative difference of outputs in true float64: small base and adapter, grown base and grown adapter."""
    from growformer.proof.difference import compare_outputs, worst
    from growformer.proof.float64 import build64_from
    from growformer.proof.functional import outputs64
    from growformer.proof.outputs import closed_tokens, grown_axes

    grown = grown_adapter(plan, old, bases.tensors, torch.float64)
    made = apply(bases.plan, bases.tensors, torch.float64)
    small = merged(old, bases.tensors, bases.sides)
    large = merged(grown, made, bases.sides)
    a = outputs64(lambda: build64_from(bases.plan.source_config, small), bases.inputs)
    b = outputs64(lambda: build64_from(bases.plan.target_config, large), bases.inputs)
    axes = bases.plan.axes
    return worst(compare_outputs(a, b, grown_axes(axes), closed_tokens(axes))).relative


def grown_adapter(plan: Plan, old: Adapter, base: Tensors, dtype: torch.dtype | None = None) -> Adapter:
    """An adapter grown by its plan; `base`: the small base's tensors, for means that are weighed by one of them."""
    return Adapter(plan.target_config, apply(plan, {**base, **old.tensors}, dtype))


def merged(adapter: Adapter, base: Tensors, sides: Sides) -> dict[str, torch.Tensor]:
    """A base's tensors in float64 with the adapter's s B A added to its weights.

    Raises:
        SourceError: the base has no weight of an adapted module.
    """
    out = {name: x.double() if x.is_floating_point() else x for name, x in base.items()}
    for module, pair in adapter.pairs().items():
        name = weight_of(module, out)
        delta = adapter.delta(pair)
        out[name] = out[name] + (delta if sides(name) == (1, 0) else delta.T)
    return out


__all__ = ["Adapter", "Bases", "functional", "grown_adapter", "merged", "prove_follow", "prove_rank"]
