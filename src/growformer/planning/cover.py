"""The source's tensors sorted by the pattern that covers each, and checked to be those of its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growformer.algebra import WILD, Atom, Becoming, Dim, Family, Lift, NamePattern, TensorPattern, lookup
from growformer.errors import PatternError
from growformer.planning.growth import Growth

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Covered:
    """The source's tensors, sorted by the pattern that covers each.

    Attributes:
        prefix: what stands before names on disk in patterns but not on disk (a bare backbone's checkpoint).
        names: for each name pattern, its source tensors by index.
        dropped: tensors that are left behind.
    """

    prefix: str
    names: Mapping[str, Mapping[tuple[int, ...], str]]
    dropped: tuple[str, ...]


def cover(
    family: Family, growth: Growth, shapes: Shapes, config: Mapping[str, Any], becoming: Becoming | None = None
) -> Covered:
    """Sort the source's tensors by pattern, and check that each is covered once, whole, and of the declared shape.

    `config` is the source's, defaults filled in: it says which optional tensors there must be. `becoming` says which of
    a source of another family go by which name in this one.

    Raises:
        PatternError: a tensor no pattern covers, a missing tensor, or a shape other than the pattern's.
    """
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in shapes)
    prefix = family.prefix if bare else ""
    names: dict[str, dict[tuple[int, ...], str]] = {name.text: {} for name, _ in family.patterns}
    dropped: list[str] = []
    tied = family.tied
    for disk, shape in shapes.items():
        head = tied is not None and disk == tied.head
        full = family.full_name(disk, prefix)
        if (head and growth.tied) or family.drops(full):
            dropped.append(disk)
            continue
        name, pattern, index = family.find(full if becoming is None else becoming.renamed(full))
        _check_shape(family, growth, disk, shape, name, pattern, index)
        names[name.text][tuple(index.values())] = disk
    if tied is not None and family.headed(config) and not (bare or growth.tied or names[tied.head]):
        raise PatternError(
            f"family {family.name}: tensor {tied.head!r} is missing from the checkpoint, and config.json does not tie "
            f"it ({tied.field}={config.get(tied.field)!r})"
        )
    _check_whole(family, growth, names, config, prefix, becoming)
    return Covered(prefix, names, tuple(dropped))


def idle_rows(
    family: Family,
    pattern: TensorPattern,
    size: Callable[[Atom], int],
    turned: Mapping[str, Sequence[bool]] | None = None,
) -> list[tuple[int, int]]:
    """The rows of a key bias that softmax cannot see, as (start, stop); none for any other tensor.

    What is added to every key adds the same number to all of a query's scores, unless rotary positions turn it: such a
    bias has no gradient in any model, grown or not.
    """
    bias = len(pattern.dims) == 1 and all(atom.stand == "write" for atom in pattern.atoms())
    if not bias:
        return []

    def lift(atom: Atom) -> Lift:
        attention = family.attention_of(str(atom.axis))
        count = size(atom)
        normed = family.norm_over(str(atom.axis)) is not None
        if attention is None or normed or family.side(atom.role) != "k" or atom.axis not in attention.key:
            return Lift.identity(count)
        rotary = attention.rotary
        mine = rotary is not None and rotary.axis == atom.axis
        turns = (turned or {}).get(str(atom.axis), [True] * count) if mine else [False] * count
        return Lift.rows(count, [i if turn else None for i, turn in enumerate(turns)])

    return [(start, start + run.count) for start, run in pattern.dims[0].lift(lift).spans() if run.new]


def _old_size(growth: Growth, atom: Atom, index: Mapping[str, int]) -> int:
    return atom.axis if isinstance(atom.axis, int) else growth.at(atom.axis, index).old


def _target_index(growth: Growth, index: Mapping[str, int]) -> dict[str, int] | None:
    """Where in the target the source tensor at `index` goes, for sizes are kept by target index; None: nowhere."""
    out: dict[str, int] = {}
    for axis, value in index.items():
        sources = growth.at(axis, out).sources
        if value not in sources:
            return None
        out[axis] = sources.index(value)
    return out


def _check_shape(
    family: Family,
    growth: Growth,
    disk: str,
    shape: tuple[int, ...],
    name: NamePattern,
    pattern: TensorPattern,
    index: Mapping[str, int],
) -> None:
    where = _target_index(growth, index)
    if where is None:
        return  # its index is beyond the config, which `_check_whole` says better than a shape could
    dims = stored_dims(name, pattern)
    wild = [dim.atom is not None and dim.atom.axis == WILD for dim in dims]
    wanted = [
        0 if w else dim.size(lambda atom: _old_size(growth, atom, where)) for dim, w in zip(dims, wild, strict=True)
    ]
    if len(wanted) != len(shape) or any(n != m for n, m, w in zip(wanted, shape, wild, strict=True) if not w):
        sizes = {
            a.axis: _old_size(growth, a, where) for a in pattern.atoms() if isinstance(a.axis, str) and a.axis != WILD
        }
        said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        given = [WILD if w else n for n, w in zip(wanted, wild, strict=True)]
        raise PatternError(
            f"family {family.name}: tensor {disk!r} has shape {list(shape)}, but its pattern {pattern.text!r} "
            f"with {said} from config.json gives {given}; the config and the weights do not belong together"
        )


def stored_dims(name: NamePattern, pattern: TensorPattern) -> list[Dim]:
    """The dims of the stored tensor: an index axis that the name holds takes none."""
    return [d for d in pattern.dims if not (d.atom is not None and d.atom.index and d.atom.axis in name.axes)]


def _check_whole(
    family: Family,
    growth: Growth,
    names: Mapping[str, Mapping[tuple[int, ...], str]],
    config: Mapping[str, Any],
    prefix: str,
    becoming: Becoming | None,
) -> None:
    renamed = set(becoming.tensors.values()) if becoming is not None else set()
    for name, _ in family.patterns:
        have = set(names[name.text])
        olds = (tuple(old.values()) for _, old in indices(growth, name.axes))
        want = {whole for old in olds if None not in old and name.has(whole := tuple(v for v in old if v is not None))}
        head = family.tied is not None and name.text == family.tied.head
        switch = family.optional.get(name.text)
        if switch is not None and want and bool(have) != bool(lookup(config, switch)):
            value = lookup(config, switch)
            raise PatternError(
                f"family {family.name}: config.json says {switch}={value!r}, and the checkpoint has "
                f"{'none' if value else 'some'} of the tensors {name.text}"
            )
        outside = bool(prefix) and not name.text.startswith(prefix)
        if (switch is not None or head or outside or name.text in family.tasks) and not have:
            continue
        new = becoming is not None and name.text in becoming.new
        missing = set() if new or (name.text in family.uneven and name.text not in renamed) else want - have
        extra = have - want
        if missing or extra:
            which = missing or extra
            shown = name.format(dict(zip(name.axes, sorted(which)[0], strict=True)))
            said = "is missing from the checkpoint" if missing else "is beyond what config.json says"
            raise PatternError(f"family {family.name}: tensor {shown!r} {said} ({len(which)} such tensors)")


def indices(growth: Growth, axes: tuple[str, ...]) -> Iterator[tuple[dict[str, int], dict[str, int | None]]]:
    """Every target index of the index axes, with the source index (None where new), nested scopes respected."""

    def walk(
        done: dict[str, int], old: dict[str, int | None], rest: tuple[str, ...]
    ) -> Iterator[tuple[dict[str, int], dict[str, int | None]]]:
        if not rest:
            yield dict(done), dict(old)
            return
        axis = rest[0]
        for new, source in enumerate(growth.at(axis, done).sources):
            yield from walk({**done, axis: new}, {**old, axis: source}, rest[1:])

    return walk({}, {}, axes)
