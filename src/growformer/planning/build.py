"""From a growth and the source's tensor shapes to the plan of every target tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from growformer.algebra import (
    ONE,
    WILD,
    Atom,
    Becoming,
    Dim,
    Factor,
    Family,
    Fill,
    Lift,
    NamePattern,
    Run,
    TensorPattern,
    lookup,
)
from growformer.errors import PatternError
from growformer.planning.growth import Growth
from growformer.planning.plan import TensorPlan
from growformer.planning.ports import gain_factor, port, power

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
    family: Family, pattern: TensorPattern, size: Callable[[Atom], int], turned: Mapping[str, int] | None = None
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
        moved = 0 if rotary is None or rotary.axis != atom.axis else (turned or {}).get(rotary.axis, count)
        return Lift(moved, (*([Run(moved, 0)] if moved else []), *([Run(count - moved)] if count > moved else [])))

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
        olds = (tuple(old.values()) for _, old in _indices(growth, name.axes))
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


def tensor_plans(
    family: Family,
    growth: Growth,
    covered: Covered,
    shapes: Shapes,
    becoming: Becoming | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[TensorPlan]:
    """The plan of every target tensor, layer by layer in the family's order of names."""
    rows = []
    for order, (name, pattern) in enumerate(family.patterns):
        new_to_family = becoming is not None and name.text in becoming.new
        sources = covered.names[_twin(becoming, name.text) if becoming is not None and new_to_family else name.text]
        if not sources:
            continue
        for new, old in _indices(growth, name.axes):
            exact = name.text in family.uneven or name.only is not None
            like = _like(growth, new, sources, exact=exact and not new_to_family)
            if like is None:
                continue
            old = dict.fromkeys(old) if new_to_family else old
            plan = _tensor_plan(family, growth, covered.prefix, name, pattern, new, old, sources[like], shapes)
            if becoming is not None and new_to_family and not becoming.new[name.text]:
                plan = replace(plan, fill=replace(plan.fill, std=float((config or {}).get("initializer_range", 0.02))))
            rows.append(((*_place(family, name, new), order), plan))
    yield from (plan for _, plan in sorted(rows, key=lambda row: row[0]))


def _twin(becoming: Becoming, name: str) -> str:
    """The target name of the old tensor that a new one is like: in std where it says so, else in its dtype only."""
    like = becoming.new[name] or next(iter(becoming.tensors))
    return becoming.tensors.get(like, like)


def _place(family: Family, name: NamePattern, index: Mapping[str, int]) -> tuple[float, float]:
    """Where a tensor stands on disk: by the layer axis that its name holds, then by layer; the others around them."""
    texts = [n.text for n, _ in family.patterns]
    for axis in family.layers:
        if axis in index:
            first = next(i for i, (n, _) in enumerate(family.patterns) if axis in n.axes)
            return float(first), float(index[axis])
    return float(texts.index(name.text)), -1.0


def _tensor_plan(
    family: Family,
    growth: Growth,
    prefix: str,
    name: NamePattern,
    pattern: TensorPattern,
    new: dict[str, int],
    old: dict[str, int | None],
    like: str,
    shapes: Shapes,
) -> TensorPlan:
    disk = name.format(new)
    disk = disk[len(prefix) :] if prefix and disk.startswith(prefix) else disk
    is_new = None in old.values()
    passes = is_new and family.passes(pattern)
    closes = passes or (is_new and family.closes_layer(name, pattern))
    sizes = dict(zip(map(id, stored_dims(name, pattern)), shapes[like], strict=True))

    def lift(dim: Dim, atom: Atom) -> Lift:
        if atom.axis == WILD:
            whole = Lift.identity(sizes[id(dim)])
        elif is_new and isinstance(atom.axis, str):
            whole = Lift.identity(growth.at(atom.axis, new).new)
        else:
            whole = port(family, growth, atom, new)
        return Lift(0, (Run(whole.new, None, back=None),)) if is_new else whole

    dims = [dim.lift(lambda atom, dim=dim: lift(dim, atom)) for dim in stored_dims(name, pattern)]  # type: ignore[misc]
    if not is_new:
        dims = _powered(family, growth, pattern, new, dims)
        dims = _by_name(family, growth, name, pattern, new, dims)
        dims = _weighed(family, prefix, pattern, old, dims)
    gains = [atom for atom in pattern.atoms() if atom.stand == "gain" and isinstance(atom.axis, str)]
    scale = any(atom.role not in family.norms for atom in gains)
    if gains:
        factors = [
            gain_factor(family, growth, growth.at(str(a.axis), new), a.role, new) for a in gains if a.axis != WILD
        ]
        # What carries a mean past a gain for each channel is weighed by the old gains, and must not be by the new.
        fill = Fill("mean", like, 1.0) if scale else Fill("mean", like, None, _product(factors))
    else:
        fill = Fill("normal", like)
    shift = any(atom.stand == "shift" for atom in pattern.atoms())
    # What passes through a new layer is multiplied by 1, which is closed less one.
    offset = -1 if passes else max((family.offset(atom) for atom in gains), default=0)
    source = None if is_new else like
    return TensorPlan(disk, source, tuple(dims), is_new and not closes and not shift, fill, name.text, offset)


def _product(factors: Iterable[Factor]) -> Factor:
    out = ONE
    for factor in factors:
        out = out * factor
    return out


def _powered(
    family: Family, growth: Growth, pattern: TensorPattern, index: Mapping[str, int], dims: list[Lift]
) -> list[Lift]:
    """The dims, where the code multiplies what the tensor writes by a power of the size of an axis that it reads."""
    writes = {atom.role for atom in pattern.atoms() if atom.stand == "write"}
    factor = ONE
    for atom in pattern.atoms():
        if atom.stand == "read" and isinstance(atom.axis, str) and atom.axis != WILD:
            axis = growth.at(atom.axis, index)
            factor = _product([factor, *(power(family, axis, role) for role in writes)])
    return dims if factor == ONE or not dims else [dims[0].times(factor), *dims[1:]]


def _by_name(
    family: Family,
    growth: Growth,
    name: NamePattern,
    pattern: TensorPattern,
    index: Mapping[str, int],
    dims: list[Lift],
) -> list[Lift]:
    """The dims, with what the index axes in the tensor's name demand of it.

    An expert's copy has its share of what reads it; any other copy is unread, as copies within a tensor are.
    """
    reads = {atom.axis: atom for atom in pattern.atoms() if atom.index and atom.stand == "read"}
    for axis in name.axes:
        atom = reads.get(axis)
        run = _run_at(port(family, growth, atom, index) if atom else growth.at(axis, index).lift, index[axis])
        if not dims or (atom is None and run.back is not None):
            continue
        runs = dims[0].times(run.factor).runs if atom else dims[0].runs
        change: dict[str, Any] = {"share": run.share} if atom else {}
        if run.back is None:
            change["back"] = None
        dims = [Lift(dims[0].old, tuple(replace(r, **change) if not r.new else r for r in runs)), *dims[1:]]
    return dims


def _weighed(
    family: Family, prefix: str, pattern: TensorPattern, old: Mapping[str, int | None], dims: list[Lift]
) -> list[Lift]:
    """The dims, with means of writers weighed by the gain that stands between them and the stream (LayerScale)."""
    written = {atom.role for atom in pattern.atoms() if atom.stand == "write"}
    roles = written - set(family.norms) - {None}
    for name, gain in family.patterns:
        if not any(atom.stand == "gain" and atom.role in roles for atom in gain.atoms()):
            continue
        index = {axis: value for axis in name.axes if (value := old.get(axis)) is not None}
        disk = name.format(index).removeprefix(prefix)
        dims = [Lift(d.old, tuple(replace(r, weigh=disk) if r.mean else r for r in d.runs)) for d in dims]
    return dims


def _run_at(lift: Lift, channel: int) -> Run:
    return next(run for start, run in lift.spans() if start <= channel < start + run.count)


def _like(
    growth: Growth, new: Mapping[str, int], sources: Mapping[tuple[int, ...], str], *, exact: bool
) -> tuple[int, ...] | None:
    """The source tensor that a target tensor comes from or is like: the one that its index axes name.

    Or the nearest there is; with `exact`, none.
    """
    want: list[int] = []
    done: dict[str, int] = {}
    for axis, value in new.items():
        entry = growth.at(axis, done)
        source = entry.sources[value]
        want.append(source if source is not None else (entry.like[value] if entry.like else 0))
        done[axis] = value
    if tuple(want) in sources:
        return tuple(want)
    if exact:
        return None
    return min(sources, key=lambda have: [abs(a - b) for a, b in itertools.zip_longest(have, want, fillvalue=0)])
