"""From a growth and the source's tensor shapes to the plan of every target tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from growformer.algebra import (
    BARRED,
    ODDS,
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
)
from growformer.errors import PatternError
from growformer.planning.cover import Covered, Shapes, indices, stored_dims
from growformer.planning.growth import AxisGrowth, Growth, paired
from growformer.planning.inexact import inexact
from growformer.planning.migrate import Place, moves
from growformer.planning.plan import TensorPlan
from growformer.planning.ports import gain_factor, port, power


def tensor_plans(
    family: Family,
    growth: Growth,
    covered: Covered,
    shapes: Shapes,
    becoming: Becoming | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[TensorPlan]:
    """The plan of every target tensor, layer by layer in the family's order of names."""
    rows, moved = [], moves(family, growth)
    for order, (name, pattern) in enumerate(family.patterns):
        new_to_family = becoming is not None and name.text in becoming.new
        sources = covered.names[_twin(becoming, name.text) if becoming is not None and new_to_family else name.text]
        if not sources:
            continue
        for new, old in indices(growth, name.axes):
            exact = name.text in family.uneven or name.only is not None
            like = _like(growth, new, sources, exact=exact and not new_to_family)
            if like is None:
                continue
            made = (family, growth, covered.prefix, name, pattern, new, dict.fromkeys(old) if new_to_family else old)
            at = moved.get((name.text, tuple(new.values())))
            again = None if at is not None or new_to_family else _again(family, growth, name, pattern, new, old)
            if again is not None and (at_old := tuple(v for v in again.values() if v is not None)) in sources:
                whole = (family, growth, covered.prefix, name, pattern, new, again)
                plan = _unread(_tensor_plan(*whole, sources[at_old], shapes, is_new=False))
            elif at is None:
                plan = _tensor_plan(*made, sources[like], shapes, is_new=new_to_family or None in old.values())
            elif isinstance(at, Factor):
                plan = _tensor_plan(*made, sources[like], shapes, is_new=True)
                plan = replace(plan, fill=Fill("constant", sources[like], factor=at)) if plan.free else plan
            else:
                plan = _tensor_plan(*made, _at(family, covered, at), shapes, is_new=False)
            if becoming is not None and new_to_family and not becoming.new[name.text]:
                plan = replace(plan, fill=replace(plan.fill, std=float((config or {}).get("initializer_range", 0.02))))
            if any(_again_of(growth, axis, new) for axis in new if axis in family.layers):
                plan = _forgotten(plan)
            if any(run.ahead for dim in plan.dims for run in dim.runs):
                plan = replace(plan, ahead=_next(family, growth, sources, new, old))
            rows.append(((*_place(family, name, new), order), plan))
    yield from (plan for _, plan in sorted(rows, key=lambda row: row[0]))


def _again(
    family: Family,
    growth: Growth,
    name: NamePattern,
    pattern: TensorPattern,
    new: Mapping[str, int],
    old: Mapping[str, int | None],
) -> dict[str, int | None] | None:
    """The source index of what a tensor of a new layer starts from, where the layer starts as a copy of another.

    What closes the layer does not, nor a number that what passes is multiplied by.
    """
    fresh = [axis for axis, value in old.items() if value is None]
    if not fresh or family.passes(pattern):
        return None
    if any(axis not in family.layers or not growth.at(axis, new).donors for axis in fresh):
        return None
    if family.closes_layer(name, pattern) and not all(growth.at(axis, new).opened for axis in fresh):
        return None
    return {axis: growth.at(axis, new).donors[new[axis]] if value is None else value for axis, value in old.items()}


def _again_of(growth: Growth, axis: str, new: Mapping[str, int]) -> bool:
    """Whether the layer is an old one that stands before it already."""
    sources, place = growth.at(axis, new).sources, new[axis]
    return sources[place] is not None and sources[place] in sources[:place]


def _forgotten(plan: TensorPlan) -> TensorPlan:
    """The plan of a tensor that an optimizer knows nothing of: its first copy has the old one's moments."""
    dims = tuple(Lift(dim.old, tuple(replace(run, fresh=True) for run in dim.runs)) for dim in plan.dims)
    return replace(plan, dims=dims)


def _next(
    family: Family,
    growth: Growth,
    sources: Mapping[tuple[int, ...], str],
    new: Mapping[str, int],
    old: Mapping[str, int | None],
) -> str:
    """The same tensor of the next layer; the last layer's is its own, and so is what stands in none."""
    here = [growth.at(axis, new).like[new[axis]] if value is None else value for axis, value in old.items()]
    later = tuple(value + (axis in family.layers) for axis, value in zip(old, here, strict=True))
    return sources.get(later, sources.get(tuple(here), ""))


def _unread(plan: TensorPlan) -> TensorPlan:
    """The plan of a copy that nobody reads yet: nothing in it continues what the source learned."""
    dims = tuple(Lift(dim.old, tuple(replace(run, back=None) for run in dim.runs)) for dim in plan.dims)
    return replace(plan, dims=dims, inexact="")


def _at(family: Family, covered: Covered, place: Place) -> str:
    """The source tensor at a place, which gives its gain or shift to a new layer."""
    try:
        return covered.names[place[0]][place[1]]
    except KeyError:
        said = f"{place[0]} {list(place[1])} is missing from the checkpoint, and a new layer takes it over"
        raise PatternError(f"family {family.name}: {said}") from None


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
    *,
    is_new: bool,
) -> TensorPlan:
    disk = name.format(new)
    disk = disk[len(prefix) :] if prefix and disk.startswith(prefix) else disk
    passes = is_new and family.passes(pattern)
    fresh = [growth.at(axis, new) for axis, index in old.items() if index is None]
    seen = any(not axis.barred and not axis.opened for axis in fresh)
    closes = passes or (seen and family.closes_layer(name, pattern))
    inside = growth.inside if any(old[axis] is None for axis in old if axis in family.layers) else {}
    halved = any(atom.stand == "read" and atom.axis in inside for atom in pattern.atoms())
    sizes = dict(zip(map(id, stored_dims(name, pattern)), shapes[like], strict=True))

    def lift(dim: Dim, atom: Atom) -> Lift:
        if atom.axis == WILD:
            whole = Lift.identity(sizes[id(dim)])
        elif is_new and atom.axis in inside:
            return paired(inside[str(atom.axis)], "readers" if atom.stand == "read" else "writers")
        elif is_new and isinstance(atom.axis, str):
            axis = growth.at(atom.axis, new)
            if closes and family.batch_norm(atom.role) and atom.stand == "gain" and _shut(axis):
                # A new layer is closed where old channels are; new ones nobody reads yet, and two closures are one
                # too many.
                return _emptied(axis.lift)
            whole = Lift.identity(axis.new)
        else:
            whole = port(family, growth, atom, new)
        return Lift(0, (Run(whole.new, None, back=None),)) if is_new else whole

    dims = [dim.lift(lambda atom, dim=dim: lift(dim, atom)) for dim in stored_dims(name, pattern)]  # type: ignore[misc]
    if not is_new:
        dims = _powered(family, growth, pattern, new, dims)
        dims = _by_name(family, growth, name, pattern, new, dims)
        dims = _weighed(family, prefix, pattern, old, dims)
    gains = [atom for atom in pattern.atoms() if atom.stand == "gain" and isinstance(atom.axis, str)]
    scale = any(atom.role not in family.norms or family.batch_norm(atom.role) for atom in gains)
    if gains:
        factors = [
            gain_factor(family, growth, growth.at(str(a.axis), new), a.role, new) for a in gains if a.axis != WILD
        ]
        # What carries a mean past a gain for each channel is weighed by the old gains, and must not be by the new; and
        # a batch norm starts as it does in a new net, whatever the old gains (some start at zero).
        fill = Fill("mean", like, 1.0) if scale else Fill("mean", like, None, _product(factors))
    elif not is_new and any(a.role == ODDS and growth.at(str(a.axis), new).barred for a in pattern.atoms()):
        fill = Fill("mean", like, BARRED)
    else:
        fill = Fill("normal", like)
    shift = any(atom.stand == "shift" for atom in pattern.atoms())
    # What passes through a new layer is multiplied by 1, which is closed less one.
    offset = -1 if passes else max((family.offset(atom) for atom in gains), default=0)
    source = None if is_new else like
    apart = "" if is_new else inexact(family, growth, name, pattern, new, dims)
    free = is_new and not closes and not shift and not halved
    return TensorPlan(disk, source, tuple(dims), free, fill, name.text, offset, inexact=apart)


def _shut(axis: AxisGrowth) -> bool:
    """Whether nobody reads the axis' new channels, and there are some."""
    return axis.closed == "readers" and any(run.new for run in axis.lift.runs)


def _emptied(lift: Lift) -> Lift:
    """The dim of a new tensor: closed at old channels, free at new ones."""
    return Lift(0, tuple(Run(run.count, None, back=None, free=run.new) for run in lift.runs))


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
        if axis in family.layers:
            continue  # each has one source; that of a gain may be another layer's
        atom = reads.get(axis)
        run = _run_at(port(family, growth, atom, index) if atom else growth.at(axis, index).lift, index[axis])
        if not dims or (run.factor, run.back, run.share) == (ONE, ONE, None):
            continue
        if growth.at(axis, index).split:
            if atom is None:
                continue  # a slice weighs 1/m and counts m times: what writes its units has their gradient whole
            run = replace(run, back=run.factor.inverse)
        part = replace(run, factor=run.factor if atom else ONE)
        runs = (r if r.new else _within(r, part) for r in dims[0].runs)
        dims = [Lift(dims[0].old, tuple(runs)), *dims[1:]]
    return dims


def _within(run: Run, outer: Run) -> Run:
    """A run of a tensor that is itself one channel of an outer axis, which `outer` makes."""
    back = None if run.back is None or outer.back is None else run.back * outer.back
    return replace(run, factor=run.factor * outer.factor, back=back, share=outer.share, noise=outer.noise)


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
