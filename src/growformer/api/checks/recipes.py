"""What keeps the function when an axis grows, in a few words, read off the plan."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from growformer.algebra import OUTSIDE, Family, Lift, lookup
from growformer.planning import Plan
from growformer.planning.rotary import ropes


def recipe_of(family: Family, plan: Plan, axis: str, full: tuple[Any, Any]) -> str:
    """The recipe of one axis in a plan.

    Args:
        family: as the source's config has it.
        plan: of a growth in which the axis grows.
        axis: its name.
        full: the source's and the target's config, defaults filled in.
    """
    told = plan.axes[axis]
    lift = Lift.from_json(told["old"], told["lift"])
    if axis in family.layers:
        if "kept" in told:
            return "the last norm's gain and shift move to the new layer, which writes zeros"
        added = any(norm.output == "added" for norm in family.norms.values())
        return "new layers closed at the norms on their branches" if added else "new layers write zeros"
    if axis in OUTSIDE:
        return "appended"
    olds = [run.old for run in lift.runs if run.old is not None and not run.mean]
    copied = sum(run.count for run in lift.runs if run.old is not None and not run.mean) > lift.old
    if family.experts is not None and axis == family.experts.axis:
        return "copies of all experts, as many more chosen"
    attention = family.attention_of(axis)
    if attention is not None and axis in (attention.heads, attention.kv_heads, attention.group):
        if attention.alibi is not None:
            return "old heads where their slopes are; output zero"
        if copied and olds:
            return "copies" + (" and new ones" if any(run.new for run in lift.runs) else "")
        across = family.norm_across(axis) is not None
        return "queries and keys zero under their norm" if across else "free, output zero"
    parts = []
    if attention is not None and axis in attention.key:
        normed = family.norm_over(axis) is not None or family.norm_across(axis) is not None
        if normed:
            parts.append("copies, closed at the keys' gain" if copied else "zeros under their norm")
        else:
            parts.append("keys zero")
        rotary = attention.rotary
        if rotary is not None and rotary.axis == axis:
            parts.append(_rotary(rotary.whole, full))
        if attention.scaled:
            parts.append("old keys times a root")
        return "; ".join(part for part in parts if part)
    norm = family.norm_over(axis)
    if norm is None and axis not in family.copied:
        return "free in, zero out" if told["closed"] == "readers" else "zero in, free out"
    if any(run.mean for run in lift.runs):
        parts.append("the mean carried")
    else:
        parts.append("copies, their readers share" if copied else "zeros")
    eps = [n.eps for n in family.norms.values() if axis in n.axes and isinstance(n.eps, str)]
    if any(lookup(full[0], name) != lookup(full[1], name) for name in eps):
        parts.append("eps rescaled")
    if Fraction(told["scale"]) != 1:
        parts.append("stream rescaled")
    return "; ".join(parts)


def _rotary(whole: bool, full: tuple[Any, Any]) -> str:
    if not whole:
        return "new channels not turned"
    thetas = [[rope.get("rope_theta") for rope in ropes(config).values()] for config in full]
    return "theta to the power n'/n" if thetas[0] != thetas[1] else ""
