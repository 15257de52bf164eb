"""What a family cannot do, whatever the sizes: frozen axes, depth where no norm can give a new layer its gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growformer.algebra import Family, Field, lookup
from growformer.errors import RequestError
from growformer.planning.migrate import chained, stream_norms
from growformer.planning.sizes import Sizes


def check_served(family: Family, full: Mapping[str, Any], sizes: Sizes) -> None:
    """Refuse what no growth of this family can do as its config stands.

    Args:
        family: the model family.
        full: the source's config with the class's defaults filled in.
        sizes: old and new sizes.

    Raises:
        RequestError: naming the axis, the reason, and what would lift it.
    """
    for frozen in family.frozen:
        odd = {name: lookup(full, name) for name, value in frozen.unless.items() if lookup(full, name) != value}
        for axis in frozen.axes:
            if (odd or not frozen.unless) and sizes.old[axis] != sizes.new[axis]:
                said = ", ".join(f"{name}={value!r}" for name, value in odd.items())
                raise RequestError(
                    f"{_named(family, axis)} {sizes.old[axis]} -> {sizes.new[axis]}: {frozen.reason}"
                    + (f" (config.json: {said})" if said else "")
                    + f"; it stays {sizes.old[axis]}"
                )
    for role, norm in family.norms.items():
        for axis in norm.axes if len(norm.axes) > 1 and role not in ("q", "k") else ():
            if sizes.old[axis] != sizes.new[axis]:
                raise RequestError(
                    f"{_named(family, axis)} {sizes.old[axis]} -> {sizes.new[axis]}: the norm {role} reads "
                    f"{' and '.join(norm.axes)} together and is neither the queries' nor the keys'; no recipe covers "
                    f"it; it stays {sizes.old[axis]}"
                )
    for axis in family.layers:
        on_stream = stream_norms(family, axis)
        if not on_stream or sizes.old[axis] == sizes.new[axis]:
            continue
        growth = f"{_named(family, axis)} {sizes.old[axis]} -> {sizes.new[axis]}"
        if not chained(family, axis):
            raise RequestError(
                f"{growth}: {family.name} normalises the stream itself in each layer, so that a new layer must take "
                f"over the gain of the norm before it, and no single norm is declared to end a layer; it stays "
                f"{sizes.old[axis]}"
            )
        eps = {lookup(full, norm.eps) if isinstance(norm.eps, str) else norm.eps for norm in on_stream}
        if len(eps) > 1:
            raise RequestError(
                f"{growth}: a new layer takes over the gain of the norm before it, and these norms have several eps "
                f"({', '.join(map(str, sorted(eps)))}); it stays {sizes.old[axis]}"
            )


def _named(family: Family, axis: str) -> str:
    size = family.axes.get(axis)
    return size.name if isinstance(size, Field) else f"the {axis} size"
