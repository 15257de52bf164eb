"""The plan: plain data that says, for every target tensor, where each block comes from."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from growformer.algebra import ONE, Factor, Fill, Lift, Run
from growformer.algebra.lift import sorts
from growformer.errors import RequestError, SourceError

FORMAT = 1
"""Version of the plan's JSON; a reader refuses any other."""

Fidelity = Literal["identical", "scaled", "rounded", "new"]


ALLOWED = (
    "a checkpoint can be grown so with expand_checkpoint(allow_dead=True)",
    "allow_change=True goes on all the same",
)
"""How to ask, of models in memory, for what is refused unless it is asked for."""


@dataclass(frozen=True)
class Block:
    """A box of one target tensor that is made in one way.

    Attributes:
        start, shape: the box.
        source: the first entry of the box of the source tensor it comes from; None for new entries.
        factor: what the source entries are multiplied by.
        back: what the target entries are multiplied by to give the source's again (summed over blocks); None: unread.
        mean: for each dim, how many source indices are averaged; 0: none.
        free: new entries only: filled (True) or closed (False).
        shares: for each dim, which share of the source's entries it holds (see `Run.share`), or None.
        weigh: for each dim, the tensor that weighs its mean (see `Run.weigh`), or "".
        noise: the std of what is added to and taken off its shares (see `Run.noise`); 0: none.
        portion: what its source entries are multiplied by besides: 0 where another copy reads them (see `Run.own`).
        fresh: an optimizer is to know nothing of it.
        ahead: its source is the next layer's tensor.
        mirror: for each dim, how far before the box the entries stand that it repeats (see `Run.mirror`); 0: none.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    source: tuple[int, ...] | None
    factor: Factor
    back: Factor | None
    mean: tuple[int, ...]
    free: bool
    shares: tuple[tuple[int, int] | None, ...] = ()
    weigh: tuple[str, ...] = ()
    noise: float = 0.0
    mirror: tuple[int, ...] = ()
    portion: int = 1
    fresh: bool = False
    ahead: bool = False

    @property
    def part(self) -> bool:
        """Its entries are parts of the source's that differ from entry to entry, or block to block."""
        return any(self.shares) or not self.portion


@dataclass(frozen=True)
class TensorPlan:
    """One target tensor.

    Attributes:
        name: on disk.
        source: the source tensor's name (another's than its own where a new layer takes it over); None for a tensor
            that is new as a whole (in a new layer).
        dims: for each dim, its lift.
        free: for a new tensor, whether its index axes leave it free.
        fill: how free entries are filled.
        pattern: the name pattern it belongs to, for tables.
        offset: what the model adds to the stored numbers before they count (1 for gains stored as 1+w): factors and
            closures are of the sum.
        ahead: the same tensor of the next layer, where some of its rows come from there.
        inexact: why the moments that the dual carries here are not the grown model's own; empty where they are.
    """

    name: str
    source: str | None
    dims: tuple[Lift, ...]
    free: bool
    fill: Fill
    pattern: str
    offset: int = 0
    ahead: str = ""
    inexact: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.new for dim in self.dims)

    @property
    def source_shape(self) -> tuple[int, ...]:
        return tuple(dim.old for dim in self.dims)

    @cached_property
    def fidelity(self) -> Fidelity:
        """How the source's entries arrive, before any change of dtype: identical, times powers of two, or rounded."""
        blocks = [block for block in self.sorts() if block.source is not None]
        if self.source is None or not any(block.back is not None for block in blocks):
            return "new"
        rank: list[Fidelity] = ["identical", "scaled", "rounded"]
        worst = 0
        for block in blocks:
            if any(block.mean) or block.factor.exponent is None or block.noise:
                return "rounded"
            worst = max(worst, int(block.factor != ONE or any(block.shares)))
            if self.offset and block.factor != ONE:
                return "rounded"
        return rank[worst]

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The different factors of its old blocks, for tables."""
        seen = {block.factor: None for block in self.sorts() if block.source is not None and not any(block.mean)}
        return tuple(seen)

    def blocks(self, rows: tuple[int, int] | None = None) -> Iterator[Block]:
        """Its blocks, in order; `rows` keeps only those rows of the first dim (blocks are cut to them)."""
        if not self.dims:
            yield self.block(())
            return
        first = list(window(self.dims[0], rows))
        rest = [list(dim.spans()) for dim in self.dims[1:]]
        for parts in itertools.product(first, *rest):
            yield self.block(parts)

    def sorts(self) -> Iterator[Block]:
        """A block of each sort there is: blocks of one sort differ in nothing but their places and sizes.

        Channels copied at random make as many blocks as two dims have runs, multiplied, and few sorts.
        """
        for runs in itertools.product(*map(sorts, self.dims)):
            yield self.block(tuple((0, run) for run in runs))

    def block(self, parts: Sequence[tuple[int, Run]]) -> Block:
        """The box that a run of each dim, with its first new channel, makes."""
        start = tuple(at for at, _ in parts)
        runs = [run for _, run in parts]
        shape = tuple(run.count for run in runs)
        flat = (0,) * len(runs)
        if self.source is None or any(run.old is None for run in runs):
            free = any(run.old is None and run.free for run in runs) or (self.source is None and self.free)
            return Block(start, shape, None, ONE, None, flat, free, mirror=tuple(run.mirror for run in runs))
        factor, back = ONE, ONE
        unread = False
        for run in runs:
            factor = factor * run.factor
            unread = unread or run.back is None
            back = back if run.back is None else back * run.back
        source = tuple(run.old or 0 for run in runs)
        means, shares = tuple(run.mean for run in runs), tuple(run.share for run in runs)
        weigh = tuple(run.weigh for run in runs)
        portion = 1
        for reader in (run for run in runs if run.own and run.share is not None):
            shares = tuple(None if run is reader else share for run, share in zip(runs, shares, strict=True))
            number, count = reader.share or (0, 1)
            others = [run.copy for run in runs if run is not reader and run.copy >= 0]
            portion = portion * all(other % count == number for other in others)
            factor = factor if others else factor * Factor.of(1, count)
        return Block(
            start,
            shape,
            source,
            factor,
            None if unread else back,
            means,
            False,
            shares,
            weigh,
            next((run.noise for run in runs if run.noise), 0.0),
            portion=portion,
            fresh=any(run.fresh for run in runs),
            ahead=any(run.ahead for run in runs),
        )

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


def window(lift: Lift, rows: tuple[int, int] | None) -> Iterator[tuple[int, Run]]:
    """Each run with the first new channel it fills, cut to `rows`."""
    for at, run in lift.spans():
        lo, hi = (at, at + run.count) if rows is None else (max(at, rows[0]), min(at + run.count, rows[1]))
        if lo >= hi:
            continue
        old = run.old if run.old is None or run.mean else run.old + lo - at
        yield lo, replace(run, count=hi - lo, old=old)


@dataclass(frozen=True)
class Plan:
    """What a growth does.

    Attributes:
        family, method: names; the family is the target's.
        source_family: the source's, where it is another.
        seed: of the draws.
        request: what was asked, in the words of config.json.
        moved: in words, what else changes because it must.
        source_config, target_config: as config.json holds them.
        tensors: one entry for each tensor of the target.
        dropped: source tensors left behind (buffers that are computed; the copy of a tied embedding).
        axes: for each axis that changes, its lift and closed side (the receipt's entry).
        layers: for each layer axis, for each target layer the source layer or None.
        dead: why some new entries can never be reached by a gradient, one sentence each.
        notes: warnings.
        within_eps: what is exact only up to the eps of norms, one sentence each, with the formula of the bound; empty
            where the growth is exact.
        changes: what makes the grown model compute another function, one sentence each; empty where it does not.
        learned: by axis, what of it comes from a loss (see `AxisGrowth.learned`), for which someone has to give a
            closure.
        behind: of tensors with closed entries that fade in while the grown model trains, what they fade in to.
    """

    family: str
    method: str
    seed: int
    request: Mapping[str, Any]
    moved: tuple[str, ...]
    source_config: Mapping[str, Any]
    target_config: Mapping[str, Any]
    tensors: tuple[TensorPlan, ...]
    dropped: tuple[str, ...] = ()
    axes: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    dead: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    within_eps: tuple[str, ...] = ()
    source_family: str = ""
    changes: tuple[str, ...] = ()
    behind: tuple[TensorPlan, ...] = ()
    learned: Mapping[str, str] = field(default_factory=dict)

    @property
    def opened(self) -> Plan:
        """The same growth with all that fades in there at once."""
        later = {tensor.name: tensor for tensor in self.behind}
        return replace(self, tensors=tuple(later.get(t.name, t) for t in self.tensors), behind=())

    @cached_property
    def by_name(self) -> dict[str, TensorPlan]:
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def lifted(self) -> bool:
        """A lift is learned before the grown model is what was asked for."""
        return "lift" in self.learned.values()

    @property
    def function(self) -> Literal["exact", "within eps", "changed"]:
        """How the grown model's function relates to the source's, in real arithmetic."""
        return "changed" if self.changes else "within eps" if self.within_eps else "exact"

    def require_allowed(self, *, dead: bool, change: bool, say: tuple[str, str]) -> None:
        """Refuse what a user must ask for by name.

        Args:
            dead: entries that can never learn are wanted all the same.
            change: another function is wanted.
            say: how to ask for the one and for the other.

        Raises:
            RequestError: the plan has such entries, or changes the function, and nobody asked for it.
        """
        if self.dead and not dead:
            raise RequestError(f"{self.dead[0]}; {say[0]}")
        if self.changes and not change:
            raise RequestError(f"{self.changes[0]}: the function changes; {say[1]}")

    def require_closure(self, given: bool, say: str) -> None:
        """Refuse a growth that needs a loss where there is none, or a loss that nothing needs.

        Args:
            given: there is a closure.
            say: where one could be given.

        Raises:
            RequestError: naming the method.
        """
        if self.learned and not given:
            raise RequestError(f"{self.method} takes what new {', '.join(self.learned)} holds from a loss: {say}")
        if given and not self.learned:
            raise RequestError(f"{self.method} asks no loss of anyone: leave out closure=; gradmax and ligo ask one")

    @property
    def fidelity(self) -> dict[str, int]:
        """How many tensors of each fidelity."""
        count = {"identical": 0, "scaled": 0, "rounded": 0, "new": 0}
        for tensor in self.tensors:
            count[tensor.fidelity] += 1
        return count

    @property
    def parameters(self) -> tuple[int, int]:
        """Entries of the source and of the target."""
        shapes = {t.source: t.source_shape for t in self.tensors if t.source is not None}  # copies have one source
        return sum(map(math.prod, shapes.values())), sum(tensor.entries for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Plain data; lifts are written once and named by number."""
        table: dict[Lift, int] = {}

        def row(t: TensorPlan) -> list[Any]:
            dims = [table.setdefault(dim, len(table)) for dim in t.dims]
            said = [t.name, t.source, dims, t.free, t.fill.to_json(), t.pattern, t.offset]
            return [*said, t.ahead] if t.ahead else said

        rows, behind = [row(t) for t in self.tensors], [row(t) for t in self.behind]
        return {
            "format": FORMAT,
            "family": self.family,
            "method": self.method,
            "seed": self.seed,
            "request": dict(self.request),
            "moved": list(self.moved),
            "source_config": dict(self.source_config),
            "target_config": dict(self.target_config),
            "lifts": [[lift.old, lift.to_json()] for lift in table],
            "tensors": rows,
            "dropped": list(self.dropped),
            "axes": dict(self.axes),
            "layers": {axis: list(sources) for axis, sources in self.layers.items()},
            "dead": list(self.dead),
            "notes": list(self.notes),
            "function": self.function,
            "within_eps": list(self.within_eps),
            **({"changes": list(self.changes)} if self.changes else {}),
            **({"inexact": inexact} if (inexact := self._inexact()) else {}),
            **({"source_family": self.source_family} if self.source_family else {}),
            **({"behind": behind} if behind else {}),
            **({"learned": dict(self.learned)} if self.learned else {}),
        }

    def _inexact(self) -> dict[str, list[str]]:
        """The tensors whose moments are not exact, by why."""
        out: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.inexact:
                out.setdefault(tensor.inexact, []).append(tensor.name)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            SourceError: where the format is another.
        """
        if data.get("format") != FORMAT:
            raise SourceError(f"the plan has format {data.get('format')!r}; this version reads format {FORMAT}")
        lifts = [Lift.from_json(old, rows) for old, rows in data["lifts"]]
        why = {name: said for said, names in data.get("inexact", {}).items() for name in names}

        def read(rows: Sequence[Any]) -> tuple[TensorPlan, ...]:
            made = (
                TensorPlan(name, source, tuple(lifts[i] for i in dims), free, Fill.from_json(fill), pattern, *rest)
                for name, source, dims, free, fill, pattern, *rest in rows
            )
            return tuple(replace(tensor, inexact=why.get(tensor.name, "")) for tensor in made)

        return cls(
            family=data["family"],
            method=data["method"],
            seed=data["seed"],
            request=data["request"],
            moved=tuple(data["moved"]),
            source_config=data["source_config"],
            target_config=data["target_config"],
            tensors=read(data["tensors"]),
            dropped=tuple(data["dropped"]),
            axes=data["axes"],
            layers=data["layers"],
            dead=tuple(data["dead"]),
            notes=tuple(data["notes"]),
            within_eps=tuple(data["within_eps"]),
            source_family=data.get("source_family", ""),
            changes=tuple(data.get("changes", ())),
            behind=read(data.get("behind", ())),
            learned=data.get("learned", {}),
        )

    def dumps(self) -> str:
        return json.dumps(self.to_json(), separators=(",", ":"))
