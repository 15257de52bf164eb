"""Fusing two models of one family into one that is as wide as both together (Deep Fusion, arXiv 2306.11903).

Self-fusion sets a model beside itself. Here each model has the self-fusion's plan, with the channels of the second
copy, or of the first, left to the other. Of a tensor W1 and a tensor W2 comes the block-diagonal [[W1, 0], [0, W2]]
where both its dims are copied, [W1; W2] where the dim that it writes is, and [W1/2, W2/2] where it reads copies and
writes an output of the model: the logits are then the mean of both models'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from growformer.algebra import OUTSIDE, WILD, Family, Field, Lift, Method, Run, TensorPattern, assigned, lookup
from growformer.errors import RequestError
from growformer.planning.apply import Applier, Read
from growformer.planning.cover import Shapes
from growformer.planning.make import make_plan
from growformer.planning.moves import called, field
from growformer.planning.picks import kind_of
from growformer.planning.plan import Plan, TensorPlan
from growformer.planning.sizes import size_of

if TYPE_CHECKING:
    import torch

FORMAT = "fusion 1"
"""Of a fusion's JSON; a reader of plans refuses it by this name."""

_SILENT = frozenset(
    {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache", "initializer_range"}
    | {"rope_theta", "rope_scaling"}  # the older spelling of rope_parameters, which counts
)
"""Config fields that say nothing of what weights compute; the fused model has those of the first."""


@dataclass(frozen=True)
class Half:
    """One of the two models.

    Attributes:
        label: what a user calls it.
        family: its family, as its config has it.
        raw: its config.json.
        full, defaults: the same with the class's defaults filled in, and these alone.
        shapes: the shape of every tensor by its name on disk.
        read: names of config fields that the modelling code reads.
    """

    label: str
    family: Family
    raw: Mapping[str, Any]
    full: Mapping[str, Any]
    defaults: Mapping[str, Any]
    shapes: Shapes
    read: Collection[str] = ()

    def size(self, axis: str) -> int:
        return size_of(self.family.axes[axis], self.full)


@dataclass(frozen=True)
class Fusion:
    """What a fusion of two models does.

    Attributes:
        one, other: for each model, where its entries go in the fused model; what is the other's is closed.
        averaged: tensors that have no channel of either model's own, and add to an output: the mean of both.
        alike: tensors that have none and serve both: they must be equal.
    """

    one: Plan
    other: Plan
    averaged: frozenset[str]
    alike: tuple[str, ...]

    @property
    def target_config(self) -> Mapping[str, Any]:
        return self.one.target_config

    @property
    def parameters(self) -> tuple[int, int, int]:
        """Entries of the two models, and of the fused one."""
        first, fused = self.one.parameters
        return first, self.other.parameters[0], fused

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        sides = {"one": self.one.to_json(), "other": self.other.to_json()}
        return {"format": FORMAT, **sides, "averaged": sorted(self.averaged), "alike": list(self.alike)}


def fuse_plan(one: Half, other: Half, method: Method, ignored: Collection[str] = ()) -> Fusion:
    """The plan of a fusion, from shapes alone.

    Args:
        one, other: the models.
        method: self-fusion.
        ignored: config fields that may differ, or that no fact of the family covers; the first model's count.

    Raises:
        RequestError: the two cannot be fused; the message names the field or the tensor, with both values.
        PatternError: where config and tensors do not belong together.
    """
    kinds = one.raw.get("model_type"), other.raw.get("model_type")
    if kinds[0] != kinds[1]:
        raise _differ("model_type", *kinds, one, other, "two models of one type can be fused")
    plans = [_beside_itself(half, method, ignored) for half in (one, other)]
    wide = frozenset(axis for axis, entry in plans[0].axes.items() if entry["old"] != entry["new"])
    _check_fields(one, other, plans, ignored)
    _check_sizes(one, other, wide)
    config = _config(one, other, plans, wide)
    first, second, averaged, alike = [], [], set[str](), []
    found = plans[1].by_name
    odd = sorted(plans[0].by_name.keys() ^ found.keys())
    if odd:
        has = one.label if odd[0] in plans[0].by_name else other.label
        raise RequestError(f"{odd[0]} is a tensor of {has} alone; both must have the same")
    for a in plans[0].tensors:
        mine, theirs = _halves(a, found[a.name])
        first.append(mine)
        second.append(theirs)
        pattern = _pattern(one.family, a)
        if any(_number(run) is not None for dim in a.dims for run in dim.runs):
            _check_written(one.family, a, pattern)
        elif all(atom.stand == "write" for atom in pattern.atoms()) and _gives(one.family, pattern):
            averaged.add(a.name)
        else:
            alike.append(a.name)
    sizes = {name: lookup(config, name) for name in plans[0].request}
    made = []
    for number, (plan, tensors) in enumerate(zip(plans, (first, second), strict=True)):
        others = plans[1 - number].axes
        axes = {axis: _masked_axis(entry, others[axis], number) for axis, entry in plan.axes.items()}
        request = sizes | ({"ignore_fields": sorted(ignored)} if ignored else {})
        made.append(
            replace(
                plan, method="fuse", request=request, target_config=config, tensors=tuple(tensors), axes=axes,
                changes=(_changes(one.family, wide),), within_eps=(), moved=(),
            )
        )  # fmt: skip
    return Fusion(made[0], made[1], frozenset(averaged), tuple(alike))


class Fuser:
    """Makes the fused model's tensors.

    Args:
        fusion: the plan.
        one, other: read the tensors of the two models.
        dtype: storage dtype of the result; None keeps the models' own, which must be the same.
    """

    def __init__(self, fusion: Fusion, one: Read, other: Read, dtype: torch.dtype | None = None) -> None:
        self.fusion = fusion
        self._reads = one, other
        self._makers = Applier(fusion.one, one, dtype), Applier(fusion.other, other, dtype)

    def require_alike(self) -> None:
        """Refuse tensors that serve both models, and are not the same in both.

        Raises:
            RequestError: naming the first.
        """
        import torch

        for name in self.fusion.alike:
            values = [read(str(self._source(name, i)), None) for i, read in enumerate(self._reads)]
            if not torch.equal(*values):
                raise RequestError(
                    f"{name} has no channel that is one model's alone, and would have to serve both: it must be the "
                    f"same in both, and differs by up to {(values[0].double() - values[1].double()).abs().max():.1e}"
                )

    def _source(self, name: str, which: int) -> str | None:
        return (self.fusion.one, self.fusion.other)[which].by_name[name].source

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """A fused tensor in pieces of whole rows, in order, in storage dtype."""
        mine, theirs = self.fusion.one.by_name[name], self.fusion.other.by_name[name]
        for start, stop in Applier.cuts(mine):
            a, b = self._makers[0].piece(mine, start, stop), self._makers[1].piece(theirs, start, stop)
            if name in self.fusion.averaged:
                yield ((a.double() + b.double()) / 2).to(a.dtype)
                continue
            out = b  # in memory of its own
            for block in mine.blocks((start, stop)) if mine.shape else ():
                if block.source is not None:
                    first = (block.start[0] - start, *block.start[1:])
                    box = tuple(slice(at, at + size) for at, size in zip(first, block.shape, strict=True))
                    out[box] = a[box]
            yield out

    def tensor(self, name: str) -> torch.Tensor:
        """A whole fused tensor."""
        import torch

        pieces = [*self.rows(name)]
        return torch.cat(pieces) if pieces[0].ndim else pieces[0]


def _changes(family: Family, wide: Collection[str]) -> str:
    roles = sorted(role for role, norm in family.norms.items() if set(norm.axes) & set(wide))
    said = f"a norm ({', '.join(roles)}) takes one mean over both models' channels" if roles else "outputs are averaged"
    return f"two models side by side compute what neither of them does, for {said}"


def _beside_itself(half: Half, method: Method, ignored: Collection[str]) -> Plan:
    """A model's self-fusion, along all that the method widens: the plan in which the other will stand for the copy."""
    family, request = half.family, dict[str, int]()
    for axis, size in family.axes.items():
        if isinstance(size, Field) and kind_of(family, axis) in method.ways and not _stays(half, axis):
            request[size.name] = 2 * half.size(axis)
    try:
        return make_plan(
            family, method, half.raw, half.full, half.defaults, half.shapes, request, read=half.read, ignored=ignored
        )
    except RequestError as error:
        said = f"{half.label} cannot stand beside another {family.name}, nor beside itself (--method deepfusion)"
        raise RequestError(f"{said}: {error}") from error


def _stays(half: Half, axis: str) -> bool:
    """Whether an axis is declared as one that cannot grow; that of a stream is refused, not left."""
    frozen = (f for f in half.family.frozen if axis in f.axes and axis not in half.family.streams)
    return any(not f.unless or any(lookup(half.full, k) != v for k, v in f.unless.items()) for f in frozen)


def _differ(name: str, a: object, b: object, one: Half, other: Half, why: str) -> RequestError:
    return RequestError(f"{name} is {a!r:.80} in {one.label} and {b!r:.80} in {other.label}; {why}")


def _leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its value, those of parts by names with dots."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _grown_fields(plan: Plan) -> set[str]:
    """The config fields that a self-fusion changes."""
    was = dict(_leaves(plan.source_config))
    return {name for name, value in _leaves(plan.target_config) if was.get(name) != value} | set(plan.request)


def _check_fields(one: Half, other: Half, plans: list[Plan], ignored: Collection[str]) -> None:
    """Refuse configs that differ in anything but widths."""
    widths = _grown_fields(plans[0]) | _grown_fields(plans[1])
    first, second = dict(_leaves(one.full)), dict(_leaves(other.full))
    for name in first | second:
        part, _, last = name.rpartition(".")
        silent = last in _SILENT and not part.endswith("rope_parameters")
        free = name in widths or name in ignored or silent
        if not free and first.get(name) != second.get(name):
            why = "it is no width, and must be the same in both"
            raise _differ(name, first.get(name), second.get(name), one, other, f"{why} (--ignore-field {name} goes on)")


def _check_sizes(one: Half, other: Half, wide: Collection[str]) -> None:
    """Refuse sizes that must be equal, or stand in one ratio, and do not."""
    family = one.family
    for axis in family.axes:
        a, b = one.size(axis), other.size(axis)
        if axis not in wide and a != b:
            why = "it is not added up, and must be the same in both"
            raise _differ(field(family, axis) or f"the {called(axis)}", a, b, one, other, why)
    for attention in family.attentions:
        if attention.kv_heads is None:
            continue
        a, b = (half.size(attention.heads) // half.size(attention.kv_heads) for half in (one, other))
        if a != b:
            name = f"{field(family, attention.heads)} / {field(family, attention.kv_heads)}"
            raise _differ(name, a, b, one, other, "all key/value heads of a model serve as many query heads")
    for power in family.powers.values():
        a, b = one.size(power.axis), other.size(power.axis)
        if a != b:
            why = f"the code multiplies by a power of it, and only two equal ones are fused in {family.name}"
            raise _differ(field(family, power.axis) or power.axis, a, b, one, other, why)


def _config(one: Half, other: Half, plans: list[Plan], wide: Collection[str]) -> dict[str, Any]:
    """The fused model's config.json: what two self-fusions double is the sum of both."""
    config, theirs = dict(plans[0].target_config), dict(_leaves(plans[1].target_config))
    for name in _grown_fields(plans[0]):
        a, b = lookup(config, name), theirs.get(name)
        if isinstance(a, int) and isinstance(b, int):
            config = assigned(config, name, (a + b) // 2)
    for rule in one.family.rules:
        over, by = lookup(config, rule.over), lookup(config, rule.by)
        if isinstance(over, int) and isinstance(by, int) and over % by:
            raise RequestError(
                f"{rule.over} would be {over} and {rule.by} {by}, and {one.family.name}'s config class refuses what is "
                f"no multiple: {rule.over} is {lookup(one.full, rule.over)} and {lookup(other.full, rule.over)} here, "
                f"{rule.by} {lookup(one.full, rule.by)} and {lookup(other.full, rule.by)}"
            )
    for axis, size in one.family.axes.items():
        if not isinstance(size, Field) or size.default is None or lookup(config, size.name) is not None:
            continue
        wanted = one.size(axis) + (other.size(axis) if axis in wide else 0)
        if size_of(size.default, {**one.full, **config}) != wanted:  # it followed another field, and does no more
            config = assigned(config, size.name, wanted)
    return config


def _number(run: Run) -> int | None:
    """Which model's copy a run of a self-fusion belongs to; None where it belongs to neither."""
    if run.copy >= 0:
        return run.copy
    return run.share[0] if run.own and run.share is not None else None


def _masked(mine: Lift, theirs: Lift, number: int, what: str) -> Lift:
    """A self-fusion's lift with one model's channels, and as many closed ones as the other has for its own."""
    numbers = [_number(run) for run in mine.runs]
    if all(n is None for n in numbers):
        if len(mine.runs) > 1:
            raise RequestError(
                f"{what} grows by copies that every reader shares, not side by side: no block of it is one model's"
            )
        return mine
    if None in numbers:
        raise RequestError(f"{what} holds channels that are copied beside others that are not, in one dim")
    if [_number(run) for run in theirs.runs] != numbers:
        raise RequestError(f"{what}: its channels stand in another order in the two models")
    pairs = zip(mine.runs, theirs.runs, numbers, strict=True)
    shut = (run if n == number else Run(their.count, None, back=None) for run, their, n in pairs)
    return Lift(mine.old, tuple(shut))


def _halves(a: TensorPlan, b: TensorPlan) -> tuple[TensorPlan, TensorPlan]:
    """One tensor of both self-fusions, each with its own model's channels alone."""
    if len(a.dims) != len(b.dims):
        raise RequestError(f"{a.name} has {len(a.dims)} dims in the one model and {len(b.dims)} in the other")
    mine = tuple(_masked(x, y, 0, a.name) for x, y in zip(a.dims, b.dims, strict=True))
    theirs = tuple(_masked(y, x, 1, a.name) for x, y in zip(a.dims, b.dims, strict=True))
    made = replace(a, dims=mine), replace(b, dims=theirs)
    if made[0].shape != made[1].shape:
        raise RequestError(
            f"{a.name} would be {list(made[0].shape)} by the one model, {list(made[1].shape)} by the other"
        )
    return made


def _masked_axis(entry: Mapping[str, Any], other: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What a receipt says of an axis: this model's channels among those of both."""
    if entry["old"] == entry["new"]:
        return dict(entry)
    own, others = Run(int(entry["old"]), 0), Run(int(other["old"]), None, back=None)
    lift = Lift(int(entry["old"]), (others, own) if number else (own, others))
    return {**entry, "new": lift.new, "lift": lift.to_json()}


def _pattern(family: Family, tensor: TensorPlan) -> TensorPattern:
    return next(pattern for name, pattern in family.patterns if name.text == tensor.pattern)


def _gives(family: Family, pattern: TensorPattern) -> bool:
    """Whether all that a tensor writes is an output of the model: the vocabulary, scores, what no tensor reads."""
    written = [atom.axis for atom in pattern.atoms() if atom.stand == "write" and isinstance(atom.axis, str)]
    inside = {atom.axis for _, p in family.patterns for atom in p.atoms() if atom.stand != "write" or atom.index}
    return bool(written) and all(axis == WILD or axis in OUTSIDE or axis not in inside for axis in written)


def _check_written(family: Family, tensor: TensorPlan, pattern: TensorPattern) -> None:
    """Refuse what both streams write into the same channels inside the model: two numbers in the place of one."""
    if any(run.copy >= 0 for dim in tensor.dims for run in dim.runs) or _gives(family, pattern):
        return
    into = ", ".join(str(atom.axis) for atom in pattern.atoms() if atom.stand == "write")
    raise RequestError(
        f"{tensor.name} writes {into}, which is not added up: both models would write into the same channels, and "
        f"{family.name} reads them as one's; one model beside itself (expand --method deepfusion) works"
    )
