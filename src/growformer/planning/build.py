"""From a growth and the source's tensor shapes to the plan of every target tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from growformer.algebra import Atom, Family, Fill, Lift, NamePattern, Run, TensorPattern
from growformer.errors import PatternError
from growformer.planning.growth import Growth
from growformer.planning.plan import TensorPlan
from growformer.planning.ports import gain_factor, port

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


def cover(family: Family, growth: Growth, shapes: Shapes, config: Mapping[str, Any]) -> Covered:
    """Sort the source's tensors by pattern, and check that each is covered once, whole, and of the declared shape.

    `config` is the source's, defaults filled in: it says which optional tensors there must be.

    Raises:
        PatternError: a tensor no pattern covers, a missing tensor, or a shape other than the pattern's.
    """
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in shapes)
    prefix = family.prefix if bare else ""
    drops = [NamePattern(text) for text in family.drop]
    names: dict[str, dict[tuple[int, ...], str]] = {name.text: {} for name, _ in family.patterns}
    dropped: list[str] = []
    for disk, shape in shapes.items():
        full = disk if family.tied is not None and disk == family.tied.head else prefix + disk
        if any(drop.match(full) is not None for drop in drops):
            dropped.append(disk)
            continue
        name, pattern, index = family.find(full)
        _check_shape(family, growth, disk, shape, pattern, index)
        names[name.text][tuple(index.values())] = disk
    tied = family.tied
    if tied is not None and not bare and not config.get(tied.field) and not names[tied.head]:
        raise PatternError(
            f"family {family.name}: tensor {tied.head!r} is missing from the checkpoint, and config.json does not tie "
            f"it ({tied.field}={config.get(tied.field)!r})"
        )
    _check_whole(family, growth, names, config)
    return Covered(prefix, names, tuple(dropped))


def idle_rows(family: Family, pattern: TensorPattern, size: Callable[[Atom], int]) -> list[tuple[int, int]]:
    """The rows of a key bias that softmax cannot see, as (start, stop); none for any other tensor.

    What is added to every key adds the same number to all of a query's scores, unless rotary positions turn it: such a
    bias has no gradient in any model, grown or not.
    """
    bias = len(pattern.dims) == 1 and all(atom.stand == "write" for atom in pattern.atoms())
    if not bias or family.attention.rotary is not None:
        return []

    def lift(atom: Atom) -> Lift:
        key = atom.role == "k" and atom.axis == "key"
        return Lift(0, (Run(size(atom), None, back=None),)) if key else Lift.identity(size(atom))

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
    family: Family, growth: Growth, name: str, shape: tuple[int, ...], pattern: TensorPattern, index: Mapping[str, int]
) -> None:
    where = _target_index(growth, index)
    if where is None:
        return  # its index is beyond the config, which `_check_whole` says better than a shape could
    wanted = tuple(dim.size(lambda atom: _old_size(growth, atom, where)) for dim in pattern.dims)
    if wanted != shape:
        sizes = {a.axis: _old_size(growth, a, where) for a in pattern.atoms() if isinstance(a.axis, str)}
        said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise PatternError(
            f"family {family.name}: tensor {name!r} has shape {list(shape)}, but its pattern {pattern.text!r} "
            f"with {said} from config.json gives {list(wanted)}; the config and the weights do not belong together"
        )


def _check_whole(
    family: Family, growth: Growth, names: Mapping[str, Mapping[tuple[int, ...], str]], config: Mapping[str, Any]
) -> None:
    for name, _ in family.patterns:
        have = set(names[name.text])
        olds = (tuple(old.values()) for _, old in _indices(growth, name.axes))
        want = {tuple(v for v in old if v is not None) for old in olds if None not in old}
        head = family.tied is not None and name.text == family.tied.head
        switch = family.optional.get(name.text)
        if switch is not None and bool(have) != bool(config.get(switch)):
            said = "has none" if config.get(switch) else "has some"
            raise PatternError(
                f"family {family.name}: config.json says {switch}={config.get(switch)!r}, and the checkpoint {said} "
                f"of the tensors {name.text}"
            )
        if (switch is not None or head) and not have:
            continue
        missing = want - have
        extra = have - want
        if missing or extra:
            which = missing or extra
            shown = name.format(dict(zip(name.axes, sorted(which)[0], strict=True)))
            said = "is missing from the checkpoint" if missing else "is beyond what config.json says"
            raise PatternError(f"family {family.name}: tensor {shown!r} {said} ({len(which)} such tensors)")


def _indices(growth: Growth, axes: tuple[str, ...]) -> Iterator[tuple[dict[str, int], dict[str, int | None]]]:
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


def tensor_plans(family: Family, growth: Growth, covered: Covered) -> Iterator[TensorPlan]:
    """The plan of every target tensor, layer by layer in the family's order of names."""
    shared = {axis for name, pattern in family.patterns if not name.axes for axis in pattern.axes()}
    rows = []
    for order, (name, pattern) in enumerate(family.patterns):
        sources = covered.names[name.text]
        if not sources:
            continue
        for new, old in _indices(growth, name.axes):
            plan = _tensor_plan(family, growth, covered.prefix, name, pattern, new, old, sources, shared)
            rows.append(((new.get(family.layer, _outside(family, name)), order), plan))
    yield from (plan for _, plan in sorted(rows, key=lambda row: row[0]))


def _outside(family: Family, name: NamePattern) -> float:
    """Tensors before the first layered name come first, those after it last."""
    texts = [n.text for n, _ in family.patterns]
    layered = [i for i, (n, _) in enumerate(family.patterns) if family.layer in n.axes]
    return -1.0 if texts.index(name.text) < layered[0] else float("inf")


def _tensor_plan(
    family: Family,
    growth: Growth,
    prefix: str,
    name: NamePattern,
    pattern: TensorPattern,
    new: dict[str, int],
    old: dict[str, int | None],
    sources: Mapping[tuple[int, ...], str],
    shared: set[str],
) -> TensorPlan:
    disk = name.format(new)
    disk = disk[len(prefix) :] if prefix and disk.startswith(prefix) else disk
    is_new = None in old.values()
    closes = any(atom.axis == family.stream and atom.stand == "write" for atom in pattern.atoms())

    def lift(atom: Atom) -> Lift:
        if not is_new:
            return port(family, growth, atom, new)
        if isinstance(atom.axis, str) and atom.axis in shared:
            whole = port(family, growth, atom, new)
            runs = tuple(Run(r.count, None, back=None, free=r.free and r.new) for r in whole.runs)
            return Lift(whole.old, runs)
        size = atom.axis if isinstance(atom.axis, int) else growth.at(atom.axis, new).new
        return Lift(0, (Run(size, None, back=None),))

    source = None if is_new else sources[tuple(v for v in old.values() if v is not None)]
    like = source or sources[_like(growth, new, sources)]
    gain = next((atom for atom in pattern.atoms() if atom.stand == "gain" and isinstance(atom.axis, str)), None)
    if gain is None:
        fill = Fill("normal", like)
    else:
        fill = Fill("mean", like, None, gain_factor(family, growth, growth.at(str(gain.axis), new), gain.role))
    shift = any(atom.stand == "shift" for atom in pattern.atoms())
    dims = tuple(dim.lift(lift) for dim in pattern.dims)
    if is_new:
        dims = tuple(Lift(0, dim.runs) for dim in dims)
    return TensorPlan(disk, source, dims, is_new and not closes and not shift, fill, name.text)


def _like(growth: Growth, new: Mapping[str, int], sources: Mapping[tuple[int, ...], str]) -> tuple[int, ...]:
    """The source tensor whose figures fill a new one: the one that its index axes name, or the nearest there is."""
    want: list[int] = []
    done: dict[str, int] = {}
    for axis, value in new.items():
        entry = growth.at(axis, done)
        source = entry.sources[value]
        want.append(source if source is not None else (entry.like[value] if entry.like else 0))
        done[axis] = value
    if tuple(want) in sources:
        return tuple(want)
    return min(sources, key=lambda have: [abs(a - b) for a, b in itertools.zip_longest(have, want, fillvalue=0)])
