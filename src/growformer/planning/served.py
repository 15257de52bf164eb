"""What a family cannot do, whatever the sizes: frozen axes, depth under norms on the stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growformer.algebra import Family, Field, lookup
from growformer.errors import RequestError
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
        for axis in norm.axes if len(norm.axes) > 1 and family.side(role) not in ("q", "k") else ():
            if sizes.old[axis] != sizes.new[axis]:
                raise RequestError(
                    f"{_named(family, axis)} {sizes.old[axis]} -> {sizes.new[axis]}: the norm {role} reads "
                    f"{' and '.join(norm.axes)} together and is neither the queries' nor the keys'; no recipe covers "
                    f"it; it stays {sizes.old[axis]}"
                )
    for axis in family.layers:
        inside = {atom.role for name, pattern in family.patterns if axis in name.axes for atom in pattern.atoms()}
        on_stream = [role for role, norm in family.norms.items() if role in inside and norm.output == "stream"]
        if on_stream and sizes.old[axis] != sizes.new[axis]:
            raise RequestError(
                f"{_named(family, axis)} {sizes.old[axis]} -> {sizes.new[axis]}: {family.name} normalises the stream "
                f"itself at the end of each layer, so no new layer leaves it as it is (moving the last norm's gain is "
                f"exact only up to its eps); it stays {sizes.old[axis]}"
            )


def _named(family: Family, axis: str) -> str:
    size = family.axes.get(axis)
    return size.name if isinstance(size, Field) else f"the {axis} size"
