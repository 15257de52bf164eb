"""A model of one family asked to become one of another: which family that is, and the source as its growth sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growformer.algebra import Becoming, Family
from growformer.checkpoint.stock import fields_read, full_config
from growformer.errors import RequestError, SourceError
from growformer.families import BECOMING, FAMILIES
from growformer.planning import Plan
from growformer.planning.becoming import Origin, foreign, read_becoming, seen_config
from growformer.planning.config import check_fields
from growformer.proof import origin as proof
from growformer.proof.case import Case


@dataclass(frozen=True)
class Seen:
    """A source as growth sees it: itself, or a model of the family that it becomes.

    Attributes:
        family: the family that grows, as the config has it.
        raw: config.json in that family's words.
        full: the same with the class's defaults filled in.
        defaults: the class's own defaults.
        request: new sizes by config field.
        origin: what the source is, where it is of another family.
    """

    family: Family
    raw: Mapping[str, Any]
    full: Mapping[str, Any]
    defaults: Mapping[str, Any]
    request: dict[str, Any]
    origin: Origin | None = None


def becoming_of(family: Family, request: Mapping[str, Any]) -> Becoming | None:
    """How a source of `family` becomes what the request says by `model_type`; None where it stays what it is.

    Raises:
        RequestError: it cannot become that, with what it can; or the request names what only another family has.
    """
    kind = request.get("model_type")
    targets = [target for source, target in BECOMING if source == family.name]
    if kind is None:
        for target in targets:
            if key := foreign(request, family, FAMILIES[target]):
                raise RequestError(
                    f"unknown key {key}: {family.name} has no such field; with model_type={target} it is that of the "
                    f"mixture of experts that computes the same"
                )
        return None
    if kind in family.model_types:
        return None
    found = next((target for target in targets if kind in FAMILIES[target].model_types), None)
    if found is None:
        can = f"it can become {' or '.join(targets)}" if targets else "no family is declared that it can become"
        others = ", ".join(f"{source} -> {target}" for source, target in BECOMING if source != family.name)
        raise RequestError(f"model_type={kind}: the source is a {family.name}; {can} (others: {others})")
    return BECOMING[family.name, found]


def seen(family: Family, raw: Mapping[str, Any], request: Mapping[str, Any], ignored: Sequence[str] = ()) -> Seen:
    """The source as its growth sees it.

    Args:
        family: the source's.
        raw: its config.json.
        request: what is asked.
        ignored: config fields that no fact covers and that the user takes upon himself.

    Raises:
        RequestError: as `becoming_of`, `read_becoming` and `seen_config`.
    """
    becoming = becoming_of(family, request)
    full, defaults = full_config(raw)
    rest = {name: value for name, value in request.items() if name != "model_type"}
    if becoming is None:
        return Seen(family, raw, full, defaults, rest)
    target = FAMILIES[becoming.target]
    others = class_defaults(target)
    check_fields(family, full, defaults, fields_read(raw), ignored)
    origin = read_becoming(becoming, family, target, raw, rest, others)
    view = seen_config(origin, family, target, full, defaults, others)
    seen_full, seen_defaults = full_config(view, f"config.json, as {target.name}")
    return Seen(target.of(seen_full), view, seen_full, seen_defaults, dict(origin.sizes), origin)


def case_of(
    family: Family, plan: Plan, src: Path, out: Path, raw: Mapping[str, Any], config: Mapping[str, Any]
) -> Case:
    """A growth as the proofs see it.

    Args:
        family: the source's.
        plan: as made, or as the receipt holds it; of two families, it is asked for their names.
        src, out: the two folders.
        raw, config: their config.json.

    Raises:
        SourceError: the receipt names families of which none becomes the other, or a source that is of another.
    """
    full = full_config(raw)[0]
    if not plan.source_family:
        return Case(family, plan, src, out, full, config)
    becoming = BECOMING.get((plan.source_family, plan.family))
    if becoming is None or plan.source_family != family.name:
        raise SourceError(
            f"{out}: its growformer.json says that a {plan.source_family} became a {plan.family}; "
            + (f"the source is a {family.name}" if becoming is not None else "no such growth is declared")
        )
    target = FAMILIES[becoming.target]
    origin = proof.Origin(becoming, class_defaults(target))
    return Case(target, plan, src, out, full, config, origin, family)


def class_defaults(family: Family) -> dict[str, Any]:
    """What a family's config class is without arguments."""
    return full_config({"model_type": family.model_types[0]})[1]
