"""A source read as a model of another family: the request for it, and its config in that family's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growformer.algebra import Becoming, Family, Field, lookup
from growformer.errors import RequestError
from growformer.planning.config import BASE_FIELDS, known_fields
from growformer.planning.moves import field
from growformer.planning.sizes import growable, read_request


@dataclass(frozen=True)
class Origin:
    """What a plan is told of a source of another family.

    Attributes:
        becoming: how it becomes one of the target's family.
        raw: the source's own config.json.
        sizes: what was asked for, by config field of the target.
        chosen: how many experts a token takes.
        moved: in words, what else is set though nobody asked.
    """

    becoming: Becoming
    raw: Mapping[str, Any]
    sizes: Mapping[str, int]
    chosen: int
    moved: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the target starts."""
        return (
            "every expert starts as a copy of the dense MLP, and the router is drawn: what a token's experts give adds "
            "up to what the MLP gave, and as each of them sees other tokens, training tells them apart",
        )


def read_becoming(
    becoming: Becoming,
    source: Family,
    target: Family,
    raw: Mapping[str, Any],
    request: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Origin:
    """Check a request for a model of another family.

    Args:
        becoming: how the source becomes one.
        source, target: the two families.
        raw: the source's config.json.
        request: what is asked, `model_type` aside, by the names of the target's config.json.
        defaults: the target's config class as it is without arguments.

    Raises:
        RequestError: no number of experts, more of them for a token than there are, weights that do not add up to
            one, a size that nothing has, or what `read_request` refuses.
    """
    experts = target.experts
    if experts is None or experts.whole is None:
        raise RequestError(f"{target.name}: the weights of its experts never add up to one; {source.name} stays")
    rest = dict(request)
    for name, wanted in experts.whole.items():
        if name in rest and str(given := rest.pop(name)).lower() != str(wanted).lower():
            raise RequestError(
                f"{name}={given}: the weights of a token's experts would not add up to one, and copies of one MLP "
                f"would give less than the MLP did, each token another part; only {name}={wanted!r} is exact"
            )
    count, top = field(target, experts.axis), experts.chosen
    sizes = read_request(target, rest, also=(top,)) if rest else {}
    if count not in sizes:
        raise RequestError(f"model_type={target.name}: how many experts? Add {count}=8; each is a copy of the MLP")
    asked = top in sizes
    chosen = sizes.pop(top, defaults.get(top) or 1)
    moved = [] if asked else [f"{top} -> {chosen}: the default of {target.name}"]
    if chosen > sizes[count]:
        said = "" if asked else f" (the default of {target.name})"
        works = f"{top}=2" if sizes[count] > 1 else f"{count}={chosen}"
        raise RequestError(
            f"{top}={chosen}{said}: a token cannot choose more experts than there are, and {count}={sizes[count]}; "
            f"{works} works"
        )
    _, own = _axes(becoming, source, target)
    moved += [
        f"{name} is as {becoming.fields[name]}; any other size of it is exact as well"
        for name in sorted(own & becoming.fields.keys() - sizes.keys())
    ]
    return Origin(becoming, raw, sizes, chosen, tuple(moved))


def seen_config(
    origin: Origin,
    source: Family,
    target: Family,
    full: Mapping[str, Any],
    defaults: Mapping[str, Any],
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """The source's config as one of the target's family: one expert, which every token takes.

    What the two classes fill in by themselves may differ, so what the source's means is written out.

    Args:
        origin: from `read_becoming`.
        source, target: the two families.
        full: the source's config with its class's defaults filled in.
        defaults: the source's config class as it is without arguments.
        others: the same of the target's.

    Raises:
        RequestError: a field that the target has no place for, by name.
    """
    becoming, raw, experts = origin.becoming, origin.raw, target.experts
    assert experts is not None and experts.whole is not None
    for name, value in becoming.requires.items():
        if lookup(full, name) != value:
            raise RequestError(
                f"config.json: {name}={lookup(full, name)!r} has no place in a {target.name}; only {name}={value!r} "
                f"can become one"
            )
    out: dict[str, Any] = {}
    ours = {*others, *BASE_FIELDS, *known_fields(target)}
    meant = {*defaults, *BASE_FIELDS, *known_fields(source)}
    for name, value in {**raw, **full}.items():
        if name in becoming.idle or (name in becoming.requires and name not in ours):
            continue
        if name in meant and name not in ours and value != defaults.get(name):
            raise RequestError(
                f"config.json: {name}={value!r} is not {source.name}'s default ({defaults.get(name)!r}), and "
                f"{target.name} has no such field"
            )
        if name in ours and name not in meant and value != others.get(name):
            raise RequestError(
                f"config.json: {name}={value!r} says nothing to {source.name}, and would to {target.name}; take it out"
            )
        if name in raw or (name in ours and value != others.get(name)):
            out[name] = value if raw.get(name) is None else raw[name]  # the other class may take no null
    out["model_type"] = target.model_types[0]
    if raw.get("architectures"):
        out["architectures"] = [_architecture(becoming, target, name) for name in raw["architectures"]]
    if full.get("rope_parameters") is not None:
        out["rope_parameters"] = full["rope_parameters"]
    _, own = _axes(becoming, source, target)
    for name, of in becoming.fields.items():
        out[name] = origin.sizes.get(name, lookup(full, of)) if name in own else lookup(full, of)
    count = field(target, experts.axis)
    ones = [count, experts.chosen, *(older for older, name in target.aliases.items() if name == count)]
    return {**out, **becoming.sets, **experts.whole, **dict.fromkeys(ones, 1)}


def check_there(becoming: Becoming, source: Family, target: Family, sizes: Mapping[str, int]) -> None:
    """Refuse a size that no tensor of the model to be has: the width of dense layers, of which there are none.

    Raises:
        RequestError: naming the field, and the one that was meant.
    """
    there, _ = _axes(becoming, source, target)
    for name in sizes:
        axes = {axis for axis, size in target.axes.items() if isinstance(size, Field) and size.name == name}
        if axes and not axes & there:
            instead = [new for new, old in becoming.fields.items() if old == name]
            raise RequestError(
                f"{name}: in {target.name} it is the width of layers without experts, and here every layer has them"
                + (f"; ask for {' or '.join(f'{new}={sizes[name]}' for new in instead)}" if instead else "")
            )


def foreign(request: Mapping[str, Any], source: Family, target: Family) -> str:
    """A key of the request that the source has no field for and the target has; "" where there is none."""
    experts = target.experts
    names = {*growable(target), *target.aliases, *([experts.chosen] if experts else [])} - {*growable(source)}
    return next((key for key in request if key in names), "")


def _architecture(becoming: Becoming, target: Family, name: str) -> str:
    if name not in becoming.architectures:
        raise RequestError(
            f"config.json: architecture {name} has no like in {target.name}; {', '.join(becoming.architectures)} have"
        )
    return becoming.architectures[name]


def _axes(becoming: Becoming, source: Family, target: Family) -> tuple[set[str], set[str]]:
    """The axes that the tensors of the model to be have, and the config fields of those that only new tensors have."""
    kept = {becoming.tensors.get(name, name) for name in (*source.tensors, *source.tasks)}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, pattern in target.patterns:
        if name.text in kept or name.text in becoming.new:
            found[name.text in becoming.new] |= {*pattern.axes(), *name.axes}
    own = (target.axes.get(axis) for axis in found[True] - found[False])
    return found[True] | found[False], {size.name for size in own if isinstance(size, Field)}
