"""make_plan: request x family x method -> plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growformer.algebra import Family, Method
from growformer.errors import RequestError
from growformer.planning.build import Shapes, cover, tensor_plans
from growformer.planning.config import check_fields, target_config
from growformer.planning.growth import Growth
from growformer.planning.plan import Plan
from growformer.planning.resolve import resolve_growth
from growformer.planning.sizes import resolve_sizes


def make_plan(
    family: Family,
    method: Method,
    raw: Mapping[str, Any],
    full: Mapping[str, Any],
    defaults: Mapping[str, Any],
    shapes: Shapes,
    request: Mapping[str, Any],
    *,
    seed: int = 0,
    layers_at: Sequence[int] | None = None,
) -> Plan:
    """The plan of a growth, from shapes alone.

    Args:
        family: the model family.
        method: the way of growing.
        raw: the source's config.json.
        full: the same with the config class's defaults filled in.
        defaults: the config class's own defaults.
        shapes: the shape of every source tensor by its name on disk.
        request: new sizes by config field.
        seed: of the draws.
        layers_at: places of the new layers in the grown model; None spreads them evenly.

    Raises:
        RequestError: where the request has no exact answer; the message names the nearest that works.
        PatternError: where config and tensors do not belong together.
    """
    check_fields(family, full, defaults)
    sizes = resolve_sizes(family, full, request)
    if layers_at is not None and sizes.old[family.layer] == sizes.new[family.layer]:
        raise RequestError("the new layers were placed, but no new layer was asked for")
    tied = family.tied is not None and family.tied.head not in shapes
    growth = resolve_growth(family, sizes, method, tied=tied, layers_at=layers_at)
    config, notes = target_config(family, raw, full, growth, sizes)
    covered = cover(family, growth, shapes, full)
    return Plan(
        family=family.name,
        method=method.name,
        seed=seed,
        request=dict(request) | ({} if layers_at is None else {"layers_at": list(layers_at)}),
        moved=sizes.moved,
        source_config=dict(raw),
        target_config=config,
        tensors=tuple(tensor_plans(family, growth, covered)),
        dropped=covered.dropped,
        axes=axes_json(growth),
        layers=tuple(growth.at(family.layer).sources),
        dead=tuple(axis.dead for axis in growth if axis.dead),
        notes=tuple(notes),
    )


def axes_json(growth: Growth) -> dict[str, Any]:
    """For each axis, its lift with left inverse, its scale and its closed side: all that a certificate may be told."""
    out: dict[str, Any] = {}
    for axis in growth:
        name = axis.axis + "".join(f"@{k}={v}" for k, v in axis.scope)
        out[name] = {
            "old": axis.old,
            "new": axis.new,
            "lift": axis.lift.to_json(),
            "scale": str(axis.scale.square),
            "closed": axis.closed,
            "dead": axis.dead,
        }
    return out
