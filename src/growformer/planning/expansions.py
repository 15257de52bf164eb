"""The six expansions of Gesmundo & Maile (arXiv 2308.06103, section 3) as data that composes in any order.

An expansion says what to grow and where; it holds no weights. Sizes are new sizes, not differences; heads and layers
are counted by how many are added. `layers` and `heads` name indices in the model as it is when the expansion acts, so
in a composition after those before it; left out, they mean all.

The reference Transformer can follow every word of it (`growformer.planning.reference_growth`). A Hugging Face config
holds one size for all layers, and `Expansion.fields` says the same request in its names, or refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from growformer.algebra import Family, Field, Ratio
from growformer.errors import RequestError
from growformer.planning.resolve import spread
from growformer.planning.sizes import size_of

if TYPE_CHECKING:  # the models import torch, which a command line that only reads a request does not need
    from growformer.models import LayerSize

__all__ = [
    "AttentionExpansion",
    "Composition",
    "Expansion",
    "HeadAddition",
    "HeadsExpansion",
    "HiddenExpansion",
    "LayerAddition",
    "MLPExpansion",
    "compose",
]

AXES = ("mlp", "heads", "key", "value", "hidden", "layer")
"""What the six expansions grow, by the axis names of the Hugging Face families."""


@dataclass(frozen=True)
class Expansion:
    """Anything that grows a model: one of the paper's six, or a composition of them."""

    axis: ClassVar[str] = ""
    sizes: ClassVar[tuple[str, ...]] = ()
    indices: ClassVar[tuple[str, ...]] = ()
    ragged: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.sizes:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RequestError(f"{type(self).__name__}: {name}={value!r}; it should be a whole number, 1 or more")
        for name in self.indices:
            if (value := getattr(self, name)) is None:
                continue
            places = tuple(value) if isinstance(value, Iterable) else ()
            whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in places)
            if not places or not whole or len(set(places)) != len(places):
                raise RequestError(
                    f"{type(self).__name__}: {name}={value!r}; it should list different indices, counted from 0"
                )
            object.__setattr__(self, name, places)

    def __str__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in given if value is not None)})"

    @property
    def steps(self) -> tuple[Expansion, ...]:
        """The single expansions it is made of, in the order in which they act."""
        return (self,)

    def grown(self, old: int) -> int:
        """The new size of its axis where all layers and heads have one size, `old`."""
        raise NotImplementedError

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, one entry a step, arguments left out where they were."""
        return [{"name": type(step).__name__, **_plain(step)} for step in self.steps]

    def fields(self, family: Family, config: Mapping[str, Any]) -> dict[str, int]:
        """The same request in the words of config.json.

        Args:
            family: a family whose config holds one size for all layers.
            config: the source's config with the class's defaults filled in.

        Returns:
            New sizes by config field, as `make_plan` takes them. Places of new layers are `layers_at`.

        Raises:
            RequestError: what the config cannot say: sizes that differ from layer to layer or head to head, a size
                that no field holds, key without value where one field is both; or a smaller size.
        """
        named = {"heads": family.attentions[0].heads, "hidden": family.stream, "layer": family.layer}
        asked: dict[str, int] = {}
        names: dict[str, str] = {}
        for step in self.steps:
            axis = named.get(step.axis, step.axis)
            if apart := [f"{name}={getattr(step, name)}" for name in step.ragged if getattr(step, name) is not None]:
                raise RequestError(
                    f"{step}: {', '.join(apart)} makes layers or heads differ, and {family.name}'s config holds one "
                    f"size for all layers; leave it out, or grow the reference Transformer"
                )
            names[axis] = _field(family, step, axis)
            old = asked.get(axis, size_of(family.axes[axis], config))
            asked[axis] = step.grown(old)
            if asked[axis] < old:
                raise RequestError(f"{step}: {names[axis]} is {old} already; growing never takes away")
        out: dict[str, int] = {}
        for axis, name in names.items():
            both = [a for a in AXES if isinstance(size := family.axes.get(a), Field) and size.name == name]
            sizes = {asked.get(a) for a in both}
            if len(sizes) > 1:
                said = f"compose(AttentionExpansion({asked[axis]}), HeadsExpansion({asked[axis]}))"
                raise RequestError(
                    f"{', '.join(map(str, self.steps))}: {family.name}'s {name} is {' and '.join(both)} in one, so "
                    f"they grow together and to one size; {said} works"
                )
            out[name] = asked[axis]
        return out

    def layers_at(self, layers: int) -> tuple[int, ...] | None:
        """Where the new layers stand in the grown model, or None where nobody placed any.

        Args:
            layers: how many layers the source has.

        Raises:
            RequestError: places that are out of range, or not as many as the new layers.
        """
        additions = [step for step in self.steps if isinstance(step, LayerAddition)]
        if all(step.at is None for step in additions):
            return None
        old = list(range(layers))
        now: list[int | None] = [*old]
        for step in additions:
            now = [None if i is None else now[i] for i in step.sources(len(now))]
        return tuple(place for place, source in enumerate(now) if source is None)


def _plain(step: Expansion) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(step).items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _field(family: Family, step: Expansion, axis: str) -> str:
    """The config field that sizes `axis`."""
    size = family.axes.get(axis)
    if isinstance(size, Field):
        return size.name
    if isinstance(size, Ratio):
        raise RequestError(
            f"{step}: {family.name} has no field for it: its head size is {size.over} / {size.by}; "
            f"grow hidden and the head size follows"
        )
    raise RequestError(f"{step}: {family.name} has no {axis} axis that a config field sizes")


def insert(step: Expansion, old: int, places: Sequence[int], count: int, what: str) -> list[int | None]:
    """For each of `old + count` places the old index that stands there, or None where `places` names it.

    Raises:
        RequestError: where the places are out of range, or not as many as the new ones.
    """
    if len(places) != count or any(place >= old + count for place in places):
        raise RequestError(
            f"{step}: the new {what}s' places {list(places)} should be {count} different numbers from 0 to "
            f"{old + count - 1} (places among the {old + count} {what}s there will be)"
        )
    rest = iter(range(old))
    return [None if place in places else next(rest) for place in range(old + count)]


@dataclass(frozen=True)
class MLPExpansion(Expansion):
    """Definition 3.1: p grows. W1 and b1 get free columns, W2 gets zero rows.

    Attributes:
        mlp: the new p.
        layers: which layers; None: all.
    """

    mlp: int
    layers: Sequence[int] | None = None

    axis = "mlp"
    sizes = ("mlp",)
    indices = ("layers",)
    ragged = ("layers",)

    def grown(self, old: int) -> int:
        return self.mlp


@dataclass(frozen=True)
class HeadAddition(Expansion):
    """Definition 3.2: E grows. A new head's W_Q, W_K and W_V are free, and its rows of W_O are zero.

    Attributes:
        heads: how many heads are added (to each layer).
        layers: which layers; None: all.
        at: places of the new heads among the heads there will be; None: after the old ones.
        key, value: k and v of the new heads; None: those of the layer's last head.
    """

    heads: int
    layers: Sequence[int] | None = None
    at: Sequence[int] | None = None
    key: int | None = None
    value: int | None = None

    axis = "heads"
    sizes = ("heads", "key", "value")
    indices = ("layers", "at")
    ragged = ("layers", "at", "key", "value")

    def grown(self, old: int) -> int:
        return old + self.heads

    def sources(self, old: int) -> list[int | None]:
        """For each head there will be, the index it has now, or None."""
        places = range(old, old + self.heads) if self.at is None else self.at
        return insert(self, old, places, self.heads, "head")


@dataclass(frozen=True)
class HeadsExpansion(Expansion):
    """Definition 3.3: v grows. W_V gets free columns, and the head's split of W_O gets zero rows.

    Attributes:
        value: the new v.
        layers: which layers; None: all.
        heads: which heads of them; None: all.
    """

    value: int
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None

    axis = "value"
    sizes = ("value",)
    indices = ("layers", "heads")
    ragged = ("layers", "heads")

    def grown(self, old: int) -> int:
        return self.value


@dataclass(frozen=True)
class AttentionExpansion(Expansion):
    """Definition 3.4: k grows. W_Q gets free columns; W_K is multiplied by sqrt(k'/k) and gets zero columns.

    Attributes:
        key: the new k.
        layers: which layers; None: all.
        heads: which heads of them; None: all.
    """

    key: int
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None

    axis = "key"
    sizes = ("key",)
    indices = ("layers", "heads")
    ragged = ("layers", "heads")

    def grown(self, old: int) -> int:
        return self.key


@dataclass(frozen=True)
class HiddenExpansion(Expansion):
    """Definition 3.5: h grows. What writes the stream gets zero columns, what reads it free rows, gains x sqrt(h/h').

    Beyond the paper, eps x h/h' (the paper's norm has none), and new gains start at the mean of the old ones.

    Attributes:
        hidden: the new h.
    """

    hidden: int

    axis = "hidden"
    sizes = ("hidden",)

    def grown(self, old: int) -> int:
        return self.hidden


@dataclass(frozen=True)
class LayerAddition(Expansion):
    """Definition 3.6: N grows. A new layer's W_O, W2 and b2 are zero, and the rest is free.

    Attributes:
        layers: how many layers are added.
        at: places of the new layers among the layers there will be; None: spread evenly, each after an old one.
        size: sizes of the new layers; None: each has those of the layer before it (of the first, where it is first).
    """

    layers: int
    at: Sequence[int] | None = None
    size: LayerSize | None = None

    axis = "layer"
    sizes = ("layers",)
    indices = ("at",)
    ragged = ("size",)

    def grown(self, old: int) -> int:
        return old + self.layers

    def sources(self, old: int) -> list[int | None]:
        """For each layer there will be, the index it has now, or None."""
        places = spread(old, old + self.layers) if self.at is None else self.at
        return insert(self, old, places, self.layers, "layer")


@dataclass(frozen=True)
class Composition(Expansion):
    """Expansions that act one after another; itself an expansion.

    Attributes:
        parts: in the order in which they act.
    """

    parts: tuple[Expansion, ...]

    def __str__(self) -> str:
        return f"compose({', '.join(map(str, self.steps))})"

    @property
    def steps(self) -> tuple[Expansion, ...]:
        return tuple(step for part in self.parts for step in part.steps)


def compose(*expansions: Expansion) -> Composition:
    """One expansion that does what `expansions` do one after another, in a single plan.

    Compositions among them are flattened. New blocks are drawn once, for the final sizes, so their values differ from
    those of a chain; what the old weights become is the same to the last bit of every exact factor.

    Raises:
        RequestError: where nothing is given.
    """
    if not expansions:
        raise RequestError("compose() of nothing; give it expansions, such as MLPExpansion(4096), LayerAddition(4)")
    return Composition(tuple(step for expansion in expansions for step in expansion.steps))
