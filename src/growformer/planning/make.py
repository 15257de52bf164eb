"""make_plan: request x family x method -> plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from growformer.algebra import ONE, Family, Method
from growformer.errors import RequestError
from growformer.planning.alike import alike
from growformer.planning.becoming import Origin
from growformer.planning.build import tensor_plans
from growformer.planning.choices import Choices
from growformer.planning.config import check_fields, target_config
from growformer.planning.cover import Covered, Shapes, cover
from growformer.planning.growth import Growth
from growformer.planning.migrate import chain, within_eps
from growformer.planning.plan import Plan, TensorPlan
from growformer.planning.ports import restoring
from growformer.planning.resolve import resolve_growth
from growformer.planning.served import check_served
from growformer.planning.sizes import Sizes, resolve_sizes
from growformer.planning.slopes import without_slope


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
    layers_at: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    read: Collection[str] = (),
    ignored: Collection[str] = (),
    choices: Choices | None = None,
    origin: Origin | None = None,
) -> Plan:
    """The plan of a growth, from shapes alone.

    Args:
        family: the model family; the target's, where that is another.
        method: the way of growing.
        raw: the source's config.json; where its family is another, as `seen_config` has it.
        full: the same with the config class's defaults filled in.
        defaults: the config class's own defaults.
        shapes: the shape of every source tensor by its name on disk. A head that stands there although the config
            ties it is taken for the embedding, stored twice; whether the two are equal is the caller's to check.
        request: new sizes by config field.
        seed: of the draws.
        layers_at: places of the new layers in the grown model, by layer axis where several grow; None spreads them
            evenly.
        read: names of config fields that the modelling code reads.
        ignored: config fields that no fact covers and that the user takes upon himself.
        choices: the recipes of the request; None: the defaults.
        origin: what the source is, where it is of another family.

    Raises:
        RequestError: where the request has no exact answer; the message names the nearest that works.
        PatternError: where config and tensors do not belong together.
    """
    choices = choices or Choices()
    seen = check_fields(family, full, defaults, read, ignored)
    becoming, chosen = (None, None) if origin is None else (origin.becoming, origin.chosen)
    sizes = resolve_sizes(family, full, request, choices, chosen)
    check_served(family, full, sizes)
    tied, headed = ties(family, full, shapes), family.headed(full)
    places = _placed(family, sizes, layers_at)
    growth = resolve_growth(
        family, sizes, method, tied=tied, headed=headed, layers_at=places, choices=choices, seed=seed
    )
    growth = without_slope(family, growth, full)
    config, notes = target_config(family, raw, full, growth, sizes, choices.rope)
    covered = cover(family, growth, shapes, full, becoming)
    _check_absorbed(family, growth, covered)
    _check_barred(family, growth, covered)
    if family.tied is not None and family.tied.head in covered.dropped:
        notes.append(f"{family.tied.head} is stored beside the tied embedding, equal; written once")
    layers = {axis: tuple(growth.at(axis).sources) for axis in family.layers}
    tensors, opened = tuple(tensor_plans(family, growth, covered, shapes, becoming, full)), growth.opened()
    behind: tuple[TensorPlan, ...] = ()
    if opened is not None:
        later = tensor_plans(family, opened, covered, shapes, becoming, full)
        behind = tuple(after for now, after in zip(tensors, later, strict=True) if after != now)
        notes.append(
            f"new entries of {len(behind)} tensors fade in while the model trains (growformer.grow(..., fade=K)); at "
            f"growth, and in a file, they are zero"
        )
    notes += alike(family, growth, tensors)
    return Plan(
        family=family.name,
        method=method.name,
        seed=seed,
        request=_asked(family, request, origin)
        | ({} if layers_at is None else {"layers_at": _plain(layers_at)})
        | ({"ignore_fields": sorted(ignored)} if ignored else {})
        | choices.to_json(),
        moved=(*sizes.moved, *(origin.moved if origin is not None else ())),
        source_config=dict(raw if origin is None else origin.raw),
        target_config=config,
        tensors=tensors,
        dropped=covered.dropped,
        axes=axes_json(growth),
        layers=layers,
        dead=tuple(axis.dead for axis in growth if axis.dead),
        notes=tuple(dict.fromkeys([*seen, *notes, *(origin.notes if origin is not None else ())])),
        within_eps=within_eps(family, growth, full),
        changes=tuple(axis.changes for axis in growth if axis.changes),
        source_family="" if becoming is None else becoming.source,
        behind=behind,
        learned={axis.axis: axis.learned for axis in growth if axis.learned},
    )


def _asked(family: Family, request: Mapping[str, Any], origin: Origin | None) -> dict[str, Any]:
    """The request as it is kept."""
    if origin is None or family.experts is None:
        return dict(request)
    return {"model_type": family.model_types[0], **request, family.experts.chosen: origin.chosen}


def _check_absorbed(family: Family, growth: Growth, covered: Covered) -> None:
    """Refuse a rescale of the stream that nobody can take back: the last norm has no gain, and no head of its own."""
    for stream in family.streams:
        axis = growth.at(stream)
        bare = any(norm.axis == stream and norm.gain is None for norm in family.norms.values())
        if not bare or restoring(axis) == ONE:
            continue
        readers = [
            name
            for name, pattern in family.patterns
            if covered.names[name.text] and not set(family.layers) & set(name.axes)
            for atom in pattern.atoms()
            if atom.axis == stream and atom.stand == "read"
        ]
        if growth.tied or not readers:
            why = "the head shares the embedding's tensor" if growth.tied else "there is no head"
            raise RequestError(
                f"{family.name}: {stream} {axis.old} -> {axis.new} rescales what the last norm gives; that norm has no "
                f"gain to take it back, and {why}; {stream} stays {axis.old}"
                + (" (untied, with the head stored by itself, it can grow)" if growth.tied else "")
            )


def _check_barred(family: Family, growth: Growth, covered: Covered) -> None:
    """Refuse to bar new channels by a bias that the checkpoint does not have."""
    for axis in growth:
        names = [name.text for name in family.odds(axis.axis)]
        if axis.barred and not any(covered.names[name] for name in names):
            raise RequestError(
                f"{axis.axis} {axis.old} -> {axis.new}: new ones would be closed by a bias on what is chosen, and the "
                f"checkpoint has none ({', '.join(names)})"
            )


def ties(family: Family, full: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether the checkpoint's head reads through the embedding's own tensor."""
    if family.tied is None or not family.headed(full):
        return False
    return family.tied.head not in shapes or bool(full.get(family.tied.field))


def _placed(
    family: Family, sizes: Sizes, layers_at: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, Sequence[int]]:
    """The places of new layers, by layer axis.

    Raises:
        RequestError: places where no layer is new, on several axes at once, or before a settled layer.
    """
    if layers_at is None:
        return {}
    growing = [axis for axis in family.layers if sizes.old[axis] != sizes.new[axis]]
    if isinstance(layers_at, Mapping):
        placed = {axis: tuple(at) for axis, at in layers_at.items()}
    elif len(growing) > 1:
        raise RequestError(f"the new layers were placed, but layers of {' and '.join(growing)} are new; name the axis")
    else:
        placed = dict.fromkeys(growing, tuple(layers_at))
    if not placed or not set(placed) <= set(growing):
        raise RequestError("the new layers were placed, but no new layer was asked for")
    for axis, at in placed.items():
        found = chain(family, axis, "gain")
        if found is not None and found.before is None and 0 in at:
            raise RequestError(
                f"{family.name}: no norm stands before the first layer, whose gain a new one there could take over; "
                f"place new layers from {max(1, family.settled)} on"
            )
        if any(0 <= place < family.settled for place in at):
            raise RequestError(
                f"{family.name}: the first {family.settled} layer(s) are built another way and stay where they are; "
                f"place new layers from {family.settled} on"
            )
    return dict(placed)


def _plain(layers_at: Sequence[int] | Mapping[str, Sequence[int]]) -> Any:
    if isinstance(layers_at, Mapping):
        return {axis: list(at) for axis, at in layers_at.items()}
    return list(layers_at)


def axes_json(growth: Growth) -> dict[str, Any]:
    """For each axis, its lift with left inverse, its scale and its closed side: all that a certificate may be told.

    Of layers that end in a norm on the stream, also the gain that norms keep which gave theirs to a new layer; of a
    width that experts share out among their slices, how many these are, and the lift of all of them together.
    """
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
        } | ({"barred": True} if axis.barred else {})
        if axis.sliced is not None:
            out[name]["slices"] = axis.sliced[1]
        if axis.kept is not None:
            out[name]["kept"] = str(axis.kept.square)
    return out
