"""Variants of the source for the noise floor: what its own storage dtype does to it when nothing is grown."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from growformer.algebra import Dim, Family, TensorPattern

DRAWS = 8
"""Permutations drawn for the floor (design, section 6)."""

Order = Mapping[str, torch.Tensor]
"""For each permuted axis, the old channel that stands at each place."""


def orders(sizes: Mapping[str, int], draws: int = DRAWS) -> list[Order]:
    """Random orders of the channels of each axis, the same on every machine."""
    out: list[Order] = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        out.append({axis: torch.randperm(size, generator=generator) for axis, size in sizes.items()})
    return out


def permuted(
    find: Callable[[str], TensorPattern], source: Mapping[str, torch.Tensor], draws: Sequence[Order]
) -> Iterator[dict[str, torch.Tensor]]:
    """The source with channels in another order: the same function, other sums.

    Args:
        find: the pattern of a tensor by its name on disk.
        source: its tensors by name on disk.
        draws: from `orders`, for axes whose channels may stand in any order (the residual stream, the MLPs).

    Yields:
        One whole checkpoint a draw, in the source's shapes and dtypes.
    """
    for order in draws:
        out = {}
        for name, tensor in source.items():
            for dim, part in enumerate(find(name).dims):
                places = _places(part, order)
                tensor = tensor if places is None else tensor.index_select(dim, places)
            out[name] = tensor
        yield out


def _places(dim: Dim, order: Order) -> torch.Tensor | None:
    """The source index at each place of a dim, or None where nothing moves."""
    if dim.atom is not None:
        return order.get(str(dim.atom.axis))
    if dim.kind == "product" or not all(part.atom is not None and part.atom.axis in order for part in dim.parts):
        return None
    parts = [order[str(part.atom.axis)] for part in dim.parts if part.atom is not None]
    starts = [sum(len(part) for part in parts[:i]) for i in range(len(parts))]
    return torch.cat([part + start for part, start in zip(parts, starts, strict=True)])


def movable(family: Family) -> tuple[str, ...]:
    """The axes that `permuted` may reorder."""
    return tuple(axis for axis in (family.stream, "mlp") if axis in family.axes)
