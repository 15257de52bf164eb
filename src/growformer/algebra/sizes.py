"""Where a config says how large an axis is, and how its fields are read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """A size that is a config field; `default` says what it is where the config holds null or nothing.

    `name` may have dots: "text_config.hidden_size".
    """

    name: str
    default: Ratio | Times | Field | Layered | None = None


@dataclass(frozen=True)
class Ratio:
    """A size that no field holds: one field divided by another (GPT-2's head size n_embd / n_head)."""

    over: str
    by: str


@dataclass(frozen=True)
class Times:
    """A size that is a multiple of a field (GPT-2's n_inner = 4 n_embd where it is null).

    `times` may be a field as well (DINOv2's mlp_ratio).
    """

    times: int | str
    field: str


@dataclass(frozen=True)
class Layered:
    """A size that layers of one type have to themselves (Gemma 4's larger heads in layers of full attention).

    Attributes:
        field: the config field that holds it for all layers.
        type: the entry of `types` that the layers have.
        types: the config field that lists the type of each layer.
        overrides: the config field that holds, by layer number, values other than that of `field`.
    """

    field: str
    type: str
    types: str = "layer_types"
    overrides: str = "per_layer_config"


Size = Field | Ratio | Times | Layered


def lookup(config: Mapping[str, Any], name: str) -> Any:
    """The value of a config field; dots lead into parts of the config. None where there is none."""
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


@dataclass(frozen=True)
class Unlike:
    """A condition on a config field: that its value is other than that of the field `name`."""

    name: str


def meets(config: Mapping[str, Any], conditions: Mapping[str, object]) -> bool:
    """Whether every config field has the value that its condition names, or is unlike the field that it names."""
    return all(
        lookup(config, name) != lookup(config, value.name)
        if isinstance(value, Unlike)
        else lookup(config, name) == value
        for name, value in conditions.items()
    )


def assigned(config: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The config with one field, whose name may have dots, set to `value`; the rest is shared."""
    first, _, rest = name.partition(".")
    out = dict(config)
    inner = out.get(first)
    out[first] = assigned(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value
    return out


def layered(size: Layered, config: Mapping[str, Any]) -> set[Any]:
    """Every value that layers of its type give a size: one, unless they differ among themselves."""
    stated = lookup(config, size.overrides) or {}
    own = {int(layer): entry for layer, entry in stated.items()}
    numbers = [i for i, kind in enumerate(lookup(config, size.types) or ()) if kind == size.type]
    common = lookup(config, size.field)
    return {own.get(i, {}).get(size.field, common) for i in numbers} or {common}


def fields_of(size: Size | None) -> set[str]:
    """Every config field that a size is made of."""
    match size:
        case Field():
            return {size.name} | fields_of(size.default)
        case Ratio():
            return {size.over, size.by}
        case Times():
            return {size.field} | ({size.times} if isinstance(size.times, str) else set())
        case Layered():
            return {size.field, size.types, size.overrides}
    return set()
