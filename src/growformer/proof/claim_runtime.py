"""The claim *runtime*: what shows in the storage dtype is no more than its noise floor, measured on the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.checkpoint import TensorFiles
from growformer.errors import UncheckedError
from growformer.planning import apply, pull_back
from growformer.proof.bar import BAR
from growformer.proof.case import Case, stored_dtypes
from growformer.proof.claims import Claim
from growformer.proof.eps import EpsEffect

if TYPE_CHECKING:
    import torch

    from growformer.proof.floor import Layout
    from growformer.proof.functional import NoiseFloor
    from growformer.proof.inputs import Inputs
    from growformer.proof.outputs import Outputs


ROUTERS = 4
"""Times that what is new is drawn anew for the floor of a mixture of experts."""


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles.open(folder) as files:
        return {name: files.read(name) for name in files.names}


def noise_floor(case: Case, inputs: Inputs, measured: dict[str, Any]) -> dict[str, NoiseFloor]:
    """What the storage dtype does to each of the source's outputs, measured once a proof.

    Raises:
        UncheckedError: no axis of the source can be permuted without changing its function, so nothing is measured.
    """
    from growformer.proof.floor import in_order, orders, permuted
    from growformer.proof.functional import NoiseFloor, noise

    if "floor" in measured:
        return {name: NoiseFloor(**numbers) for name, numbers in measured["floor"].items()}
    source = {name: x for name, x in _read_all(case.source).items() if name not in case.plan.dropped}
    dtypes = {x.dtype for x in _read_all(case.target).values()}
    there = pull_back(case.plan, apply(case.plan, source, dtypes.pop() if len(dtypes) == 1 else None))
    rounded = {name: x.to(source[name].dtype) for name, x in there.items()}
    layout, groups = movable(case, source, inputs)
    measured["permuted"] = [axis for group in groups for axis in group]
    draws = orders(layout, groups)
    routing = routed(case, source, inputs) if case.origin is not None else {}

    def restore(base: Outputs, found: Outputs, draw: int) -> Outputs:
        return in_order(base, found, draws[draw])

    effect = EpsEffect(case.passings, case.family.prefix) if case.passings else None
    variants = permuted(layout, source, draws)
    floors = noise(case.source, inputs, variants, rounded, restore, None if effect is None else effect.attach)
    floors = {name: floor.with_routing(c) for name, floor in floors.items() for c in [routing.get(name, 0.0)]}
    measured["floor"] = {name: asdict(floor) for name, floor in floors.items()}
    return floors


def routed(case: Case, source: Mapping[str, torch.Tensor], inputs: Inputs) -> dict[str, float]:
    """What the storage dtype does to a mixture of experts when its router is drawn anew, by output.

    Made from the source by the plan, and tried in float64: variants that were another function would make the floor so
    high that every growth passed. None are left then.
    """
    from growformer.proof.float64 import build64_from
    from growformer.proof.functional import compare_outputs, outputs64, redrawn, worst
    from growformer.proof.inputs import as_batches
    from growformer.proof.outputs import grown_axes

    dtypes = {x.dtype for x in _read_all(case.target).values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    plans = [replace(case.plan, seed=case.plan.seed + i) for i in range(ROUTERS + 1)]
    wide = apply(plans[1], {name: x.double() for name, x in source.items()})
    found = outputs64(lambda: build64_from(case.target_config, wide), as_batches(inputs)[:1])
    same = worst(compare_outputs(_plain64(case, source, inputs), found, grown_axes(case.plan.axes)))
    if not same.relative <= BAR:
        return {}
    return redrawn(case.target, inputs, (apply(plan, source, dtype) for plan in plans))


def movable(case: Case, source: Mapping[str, torch.Tensor], inputs: Inputs) -> tuple[Layout, list[tuple[str, ...]]]:
    """The axes of the source whose order its function does not see: found from the patterns, and tried in float64.

    A pattern that is wrong, or a tensor that two axes share, would make the draws other functions and the floor so
    high that every growth passed.

    Returns:
        The layout of the source's tensors, and the groups of axes that passed.

    Raises:
        UncheckedError: none did.
    """
    from growformer.proof.floor import Layout

    shapes = {name: tuple(x.shape) for name, x in source.items()}
    layout = Layout(case.source_family, case.source_full, shapes, case.prefix)
    groups = layout.groups()
    base = _plain64(case, source, inputs)
    if not _same(case, layout, groups, source, base, inputs):
        groups = [group for group in groups if _same(case, layout, [group], source, base, inputs)]
    if not groups:
        raise UncheckedError(
            f"family {case.source_family.name}: no axis of {case.source} can be permuted without changing what it "
            "computes, so there is no noise floor to judge rounding by; the family's patterns do not fit the checkpoint"
        )
    return layout, groups


def _plain64(case: Case, tensors: Mapping[str, torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Outputs in true float64 for the first of several batches."""
    from growformer.proof.float64 import build64_from
    from growformer.proof.functional import outputs64
    from growformer.proof.inputs import as_batches

    return outputs64(lambda: build64_from(case.plan.source_config, tensors), as_batches(inputs)[:1])


def _same(
    case: Case,
    layout: Layout,
    groups: Sequence[Sequence[str]],
    source: Mapping[str, torch.Tensor],
    base: Outputs,
    inputs: Inputs,
) -> bool:
    """Whether the source with these axes permuted computes what it did."""
    from growformer.proof.floor import in_order, orders, permuted
    from growformer.proof.functional import compare_outputs, worst

    draws = orders(layout, groups, 1)
    (moved,) = permuted(layout, source, draws)
    found = in_order(base, _plain64(case, moved, inputs), draws[0])
    return worst(compare_outputs(base, found)).relative <= BAR


def runtime(case: Case, inputs: Inputs, measured: dict[str, Any]) -> Claim:
    """Both stock models in their storage dtype, against the noise floor."""
    from growformer.proof.functional import FLOOR_MULTIPLE, judged
    from growformer.proof.functional import runtime as compare_runtime
    from growformer.proof.outputs import closed_tokens, grown_axes, is_logits

    # Stock models compute rotary tables and norms in float32 whatever the storage, which no floor of float64 shows:
    # there the algebra is the judge, and what differs at run time is told.
    wide = stored_dtypes(case.target) == {"F64"}
    axes = case.plan.axes
    try:
        floors = noise_floor(case, inputs, measured)
        results = compare_runtime(case.source, case.target, inputs, floors, grown_axes(axes), closed_tokens(axes))
    except UncheckedError as error:
        return Claim("runtime", None, "-", required=not wide, detail=str(error))
    except RuntimeError as error:
        if not wide:
            raise
        # Classes that write float64's least number into a float32 mask run in float32 at most.
        why = f"stored in float64, on which its class does not run ({error}): judged by the algebra"
        return Claim("runtime", None, "-", required=False, detail=why)
    result = judged(results)
    d = result.difference
    measured["runtime"] = {
        "rms": d.rms,
        "max_abs": d.max_abs,
        "kl": d.kl,
        "top1_agree": d.top1_agree,
        "ratio": result.ratio,
        "outputs": {name: one.ratio for name, one in results.items()},
    }
    top = f", top-1 {d.top1_agree:.1%}" if is_logits(d.output) else ""
    of = f" of {d.output}" if len(results) > 1 else ""
    eps = f", the passed norms' {result.floor.c:.1e} in it" if case.passings else ""
    found = f"{result.ratio:.2f} x the noise floor{of} (rms {d.rms:.1e}{top}{eps})"
    if wide and not result.passed:
        why = "stored in float64, and run by classes that compute parts in float32: judged by the algebra"
        return Claim("runtime", None, found, required=False, detail=why)
    return Claim("runtime", result.passed, found, f"{FLOOR_MULTIPLE:g} x")
