"""Growth schedules: a recipe's entries, spelled out as one growth after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from growformer.errors import RequestError
from growformer.training.triggers import At, Plateau, Rule, Slope

ORDERED = ("step", "tokens", "flops", "share")
"""Rules whose numbers must rise from one growth to the next."""

LIFT_STEPS = 100
"""In which `ligo` learns a lift, unless an entry says otherwise (arXiv 2303.00980)."""


class When(Rule):
    """When to grow: exactly one rule of `At`; a list of numbers gives each growth of a sequence its own."""

    step: PositiveInt | list[PositiveInt] | None = Field(default=None, description="After so many steps of the run.")
    tokens: PositiveFloat | list[PositiveFloat] | None = Field(
        default=None, description="Once the run has seen so many."
    )
    flops: PositiveFloat | list[PositiveFloat] | None = Field(
        default=None, description="Once training has taken so many."
    )
    share: float | list[float] | None = Field(default=None, description="Once this share of the budget is used.")
    plateau: Plateau | None = Field(default=None, description="Once the training loss has stopped falling.")
    slope: Slope | None = Field(
        default=None, description="Once the loss falls more slowly than the larger model's would."
    )
    tokens_per_parameter: PositiveFloat | list[PositiveFloat] | None = Field(
        default=None, description="Once there were so many tokens for each parameter of the present model (say 20)."
    )

    @model_validator(mode="after")
    def _one(self) -> When:
        self.each(self.length or 1)
        return self

    @property
    def length(self) -> int | None:
        """Of the list, if there is one."""
        lists = [value for value in dict(self).values() if isinstance(value, list)]
        return len(lists[0]) if lists else None

    def each(self, count: int) -> list[At]:
        """The rule of each growth."""
        given = {name: value for name, value in dict(self).items() if value is not None}
        return [
            At(**{name: value[i] if isinstance(value, list) else value for name, value in given.items()})
            for i in range(count)
        ]


class Entry(Rule):
    """One growth, or a sequence of them: what, when and how."""

    at: When = Field(description="When: one rule; a list of numbers gives each growth of a sequence its own.")
    to: dict[str, PositiveInt | list[PositiveInt]] = Field(
        min_length=1, description="New sizes, by the names of config.json; a list gives each growth its own."
    )
    sequence: Literal["linear", "geometric"] | None = Field(
        default=None, description="Get to these sizes in several growths, by equal steps or by equal ratios."
    )
    stages: PositiveInt | None = Field(default=None, description="How many growths, where `at` has no list.")
    multiple_of: PositiveInt | dict[str, PositiveInt] = Field(
        default=1, description="What sizes between are multiples of, for all sizes or by name."
    )
    method: str = Field(default="paper", description="How new entries start; see `growformer methods`.")
    allow_change: bool = Field(default=False, description="Go on where the method makes another function of the model.")
    seed: int | None = Field(default=None, description="Of the draws for new entries; left out: the recipe's.")
    warmup: int = Field(default=0, ge=0, description="Steps over which new entries' own learning rate rises.")
    fade: PositiveInt | Literal["line-search"] | None = Field(
        default=None,
        description="For msg and gated: steps over which new entries fade in; or line-search: at once, by as much as "
        "lowers the loss most.",
    )
    probe_batches: PositiveInt = Field(
        default=1,
        description="For gradmax and fade: line-search: how many of the run's next batches the growth asks a loss on.",
    )
    lift_steps: PositiveInt = Field(
        default=LIFT_STEPS,
        description="For ligo: steps in which the lift is learned, each on one of the run's next batches.",
    )
    freeze_old: int = Field(default=0, ge=0, description="Steps for which old entries stay as they are.")
    keep_dynamics: bool = Field(
        default=False, description="Scaled tensors keep the updates that they had: rates follow the factors."
    )
    learning_rate: PositiveFloat = Field(
        default=1.0, description="What the learning rate is multiplied by from then on."
    )
    layers_at: list[int] | None = Field(
        default=None, description="Places of new layers in the grown model; left out: even."
    )
    prove: bool | None = Field(default=None, description="Prove this growth; left out: as the recipe says.")
    control: bool = Field(
        default=False, description="A control: a growth to the sizes that there are, which must change nothing."
    )

    @property
    def searched(self) -> bool:
        """Whether a search says how far new entries fade in, all at once."""
        return self.fade == "line-search"

    @property
    def fade_steps(self) -> int | None:
        """`fade` as `growformer.grow` takes it: 0 leaves new entries at zero, for the search."""
        return 0 if self.fade == "line-search" else self.fade


@dataclass(frozen=True)
class Growth:
    """One growth.

    Attributes:
        where: its entry in the recipe, such as grow[1].
        at: when.
        to: the sizes that change, by the names of config.json.
        entry: how.
    """

    where: str
    at: At
    to: Mapping[str, int]
    entry: Entry


def entries_of(schedule: Mapping[int, Mapping[str, Any]] | Sequence[Entry | Mapping[str, Any]]) -> list[Entry]:
    """A schedule said in Python.

    Args:
        schedule: what to grow after which step of the run, `{1000: {"intermediate_size": 4096, "warmup": 100}}`: sizes,
            and beside them what an entry of a recipe may say (`warmup`, `freeze_old`, `layers_at`, ...); or a list of
            such entries as a recipe has them: `{"at": {"plateau": {}}, "to": {...}}`.

    Raises:
        RequestError: it is neither, or an entry says what none can; the message begins with the entry's place.
    """
    said: list[Any]
    if isinstance(schedule, Mapping):
        odd = [step for step in schedule if not isinstance(step, int) or isinstance(step, bool)]
        if odd:
            raise RequestError(f"the schedule has {odd[0]!r} for a step; it is {{step: {{size: value}}}}, or a list")
        said = [_at_step(step, schedule[step]) for step in sorted(schedule)]
    elif isinstance(schedule, Sequence) and not isinstance(schedule, str):
        said = list(schedule)
    else:
        kind = type(schedule).__name__
        raise RequestError(f"the schedule is a {kind}; it is {{step: {{size: value}}}}, or a list of entries")
    return [_entry(f"grow[{i}]", one) for i, one in enumerate(said)]


def _at_step(step: int, what: Any) -> Any:
    if not isinstance(what, Mapping):
        raise RequestError(f"after step {step} the schedule has {what!r}; it is {{step: {{size: value}}}}")
    options = {name: value for name, value in what.items() if name in Entry.model_fields}
    sizes = {name: value for name, value in what.items() if name not in Entry.model_fields}
    return {"at": {"step": step}, **options, **({"to": sizes} if sizes or "to" not in options else {})}


def _entry(where: str, said: Any) -> Entry:
    if isinstance(said, Entry):
        return said
    try:
        return Entry.model_validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join([where, *(str(part) for part in first["loc"])])
        raise RequestError(f"{key}: {first['msg'].removeprefix('Value error, ')}; got {first['input']!r}") from error


def spell_out(entries: Sequence[Entry], sizes: Mapping[str, int | None]) -> list[Growth]:
    """The growths of a run, in order.

    Args:
        entries: the recipe's `grow`.
        sizes: of the first model, by the names of config.json; None: follows from others. Those that entries name must
            be there.

    Raises:
        RequestError: lists of different lengths, sizes that shrink or stay, rules whose numbers do not rise, or a size
            that the first model does not have. The message begins with the entry's place in the recipe.
    """
    now = dict(sizes)
    out: list[Growth] = []
    for i, entry in enumerate(entries):
        where = f"grow[{i}]"
        for name in entry.to:
            if name not in now:
                raise RequestError(f"{where}.to.{name}: the model's config has no size of that name")
        count = _count(where, entry)
        for at, target in zip(entry.at.each(count), _targets(where, entry, now, count), strict=True):
            changed = {name: size for name, size in target.items() if size != now[name]}
            for name, size in changed.items():
                before = now[name]
                if before is not None and size < before:
                    raise RequestError(
                        f"{where}.to.{name}: {size} is smaller than the {before} that there are then; "
                        "a model only grows"
                    )
            if not changed and entry.control:
                changed = target
            if not changed:
                raise RequestError(f"{where}: one of its growths changes no size; use fewer stages, or larger sizes")
            _require_later(where, out, at)
            out.append(Growth(where, at, changed, entry))
            now.update(changed)
    return out


def between(first: int, last: int, count: int, how: str, multiple: int = 1) -> list[int]:
    """Sizes on the way from the first (left out) to the last (kept as it is), by equal steps or by equal ratios.

    Those between are rounded to the nearest multiple, and never fall.
    """
    out: list[int] = []
    for i in range(1, count):
        part = i / count
        size = first + (last - first) * part if how == "linear" else first * (last / first) ** part
        rounded = round(size / multiple) * multiple
        out.append(min(last, max(rounded, out[-1] if out else first)))
    return [*out, last]


def _targets(where: str, entry: Entry, now: Mapping[str, int | None], count: int) -> list[dict[str, int]]:
    columns: dict[str, list[int]] = {}
    for name, size in entry.to.items():
        if isinstance(size, list):
            columns[name] = size
        elif count == 1:
            columns[name] = [size]
        elif entry.sequence is not None:
            multiple = entry.multiple_of if isinstance(entry.multiple_of, int) else entry.multiple_of.get(name, 1)
            first = now[name]
            if first is None:
                raise RequestError(
                    f"{where}.to.{name}: the first model's config leaves it open; say it in model as well"
                )
            columns[name] = between(first, size, count, entry.sequence, multiple)
        else:
            raise RequestError(
                f"{where}.to.{name}: {count} growths and one size; add sequence: linear or geometric, or a list "
                f"of {count} sizes"
            )
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def _count(where: str, entry: Entry) -> int:
    lengths = {f"to.{name}": len(size) for name, size in entry.to.items() if isinstance(size, list)}
    if entry.at.length is not None:
        lengths["at"] = entry.at.length
    if entry.stages is not None:
        lengths["stages"] = entry.stages
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name}: {n}" for name, n in lengths.items())
        raise RequestError(f"{where}: its lists speak of different numbers of growths ({told})")
    count = next(iter(lengths.values()), 1)
    if entry.sequence is not None and count < 2:
        raise RequestError(f"{where}.sequence: needs several growths; say how many with stages, or a list in at")
    return count


def _require_later(where: str, before: Sequence[Growth], at: At) -> None:
    if at.kind not in ORDERED:
        return
    value = getattr(at, at.kind)
    earlier = [getattr(g.at, at.kind) for g in before if g.at.kind == at.kind]
    if earlier and value <= earlier[-1]:
        raise RequestError(
            f"{where}.at.{at.kind}: {value:g} is not after the growth before it ({earlier[-1]:g}); growths come in "
            "the order of the list"
        )
