"""The facts a family states of its architecture: norms, attention, rotary positions, experts, heads that are tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from growformer.algebra.sizes import lookup


@dataclass(frozen=True)
class Norm:
    """A norm over an axis. Its role in patterns is its key in `Family.norms`.

    Attributes:
        axis: the axis whose channels it reads; several: their product (one norm over the queries of all heads).
        kind: "rms", "layer" (which subtracts the mean), or "sum": it divides by the root of the sum of squares, in
            which zeros are not seen whatever their number, and gives a length that the config states. What follows
            need not be linear (TokenFormer's scores go on through a GeLU), so it takes zeros and nothing else. Or
            "batch": each channel by statistics of its own, so that it reads none beside another; what writes the
            channels it stands behind has its role.
        eps: the config field that holds its eps, or the number that stands in the code.
        gain: what the stored gain w multiplies by: "w", "1+w" (Gemma, Nemotron), or None where there is no gain, so
            that whatever a gain would take up falls to what reads the axis.
        output: where it goes: "branch" (to the readers of the axis), "added" (back onto the stream: a norm on a
            branch's output, which also closes a new layer), "inner" (into a sum that an "added" norm reads, as the
            stream would be: two branches side by side), or "stream" (it is the stream: an embedding norm, a post-norm).
        feeds: of a norm on the stream, the layer axis whose layers read it with nothing between: it ends each of these
            layers, or stands before the first. A new layer takes over the gain and shift of the one before it.
        length: of "sum": the config field of the length. It stays as it is, also where its class would work it out
            anew from the size.
    """

    axis: str | tuple[str, ...]
    kind: Literal["rms", "layer", "sum", "batch"]
    eps: str | float
    gain: Literal["w", "1+w"] | None = "w"
    output: Literal["branch", "added", "inner", "stream"] = "branch"
    feeds: str = ""
    length: str = ""

    @property
    def axes(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    @property
    def offset(self) -> int:
        """What is added to the stored gain."""
        return int(self.gain == "1+w")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions over (the first channels of) one axis of the dot product.

    Attributes:
        axis: the axis whose channels turn.
        layout: "half": channel i turns with channel i + n/2; "interleaved": channel 2i with 2i + 1.
        partial: the older key of rope_parameters.partial_rotary_factor where only the first channels turn, by that
            fraction, under every rope type ("partial_rotary_factor", "rotary_pct"); empty: all channels turn.
        turned: the config field that counts the channels that turn (GPT-J's rotary_dim), in place of a fraction.
        set: of rope parameters that are stated for each layer type, those of this type alone; empty: all.
        steady: rope types whose frequencies theta^(-2i/n) stay where they are under theta' = theta^(n'/n).
        inside: those of them for which that holds only up to max_position_embeddings.
        unlisted: why no list of frequencies can be written (rope type longrope), as the rest of a sentence; empty: one
            can.
    """

    axis: str = "key"
    layout: Literal["half", "interleaved"] = "half"
    partial: str = ""
    turned: str = ""
    set: str = ""
    steady: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic")
    inside: tuple[str, ...] = ("dynamic",)
    unlisted: str = ""

    @property
    def whole(self) -> bool:
        """All channels of the axis turn."""
        return not self.partial and not self.turned


@dataclass(frozen=True)
class Attention:
    """Facts of attention.

    Attributes:
        heads: the axis of query heads.
        kv_heads: the axis of key/value heads where it is another one (head h reads head h // (heads / kv_heads) of it).
        group: the axis of a key/value head's query heads, where patterns write heads as (kv_heads group).
        key: the axes that the dot product sums over.
        value: the axis of a head's values; that of its keys where keys are the values as well.
        scaled: scores are divided by the square root of the sizes of `key`, summed.
        rotary: rotary positions, or None.
        alibi: how the slopes of linear biases follow from the number of heads, or None.
        roles: those of its query, key and value tensors, and of the norms over queries and keys.
    """

    heads: str = "heads"
    kv_heads: str | None = None
    group: str | None = None
    key: tuple[str, ...] = ("key",)
    value: str = "value"
    scaled: bool = True
    rotary: Rotary | None = None
    alibi: Literal["bloom", "mpt"] | None = None
    roles: tuple[str, str, str] = ("q", "k", "v")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        axis: the axis of the routed experts. Patterns put it where it is written (router, the experts' inner units) or
            read (what the experts give is summed over it).
        chosen: the config field of how many experts a token takes.
        groups: config fields that count groups of experts, all and chosen.
        requires: config fields, with values, without which copies of experts would change the function.
        whole: config fields, with the values under which the weights of a token's experts add up to one, so that
            equal experts give together what each of them gives; None: never.
    """

    axis: str = "experts"
    chosen: str = "num_experts_per_tok"
    groups: tuple[str, ...] = ()
    requires: Mapping[str, object] = field(default_factory=dict)
    whole: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Power:
    """A tensor's output is multiplied, in the code, by the size of an axis to this power (Gemma: hidden to 1/2).

    What the role may stand on: a writer of that axis where it is the stream; a norm over it, whose gain then takes the
    power up; or what a reader of it writes (Gemma 4's projection to all layers: hidden to -1/2).
    """

    axis: str
    exponent: Fraction


@dataclass(frozen=True)
class Tied:
    """A head that may share the embedding's tensor.

    Attributes:
        head, embedding: tensor names on disk.
        norm: the role of the norm that the head reads.
        field: the config field that ties them.
        layer: the layer axis in whose last layer that norm is, where it is a layer's (BART); empty: it is one tensor.
    """

    head: str
    embedding: str
    norm: str
    field: str = "tie_word_embeddings"
    layer: str = ""


@dataclass(frozen=True)
class Frozen:
    """Axes that cannot grow, or cannot while config fields have other values than these.

    Attributes:
        axes: their names.
        reason: why, as the rest of a sentence that begins with the request.
        unless: config fields with the values under which they can; empty: never.
        ordered: their channels have an order, for the code gives each numbers of its own (positions that it computes).
    """

    axes: tuple[str, ...]
    reason: str
    unless: Mapping[str, object] = field(default_factory=dict)
    ordered: bool = False


@dataclass(frozen=True)
class Lends:
    """The last layers have no keys and values of their own: they take those of the last layer of their type before.

    No new layer may come right behind such a lender, which would lend in its place.

    Attributes:
        types: the config field that lists the type of each layer.
        count: the config field that says how many of the last layers borrow.
    """

    types: str = "layer_types"
    count: str = "num_kv_shared_layers"

    def lenders(self, config: Mapping[str, Any]) -> frozenset[int]:
        """The numbers of the layers that lend."""
        types, count = lookup(config, self.types) or (), lookup(config, self.count) or 0
        own = {kind: i for i, kind in enumerate(types[: len(types) - count])}
        return frozenset(own.values()) if count else frozenset()


@dataclass(frozen=True)
class Divides:
    """A rule of the config class: `over` must be a multiple of `by`."""

    by: str
    over: str
