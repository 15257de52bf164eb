"""The Family type: everything the engine needs to know of a model family, as one literal without code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from growformer.algebra.pattern import NamePattern, TensorPattern
from growformer.errors import PatternError

__all__ = ["Attention", "Divides", "Family", "Field", "Norm", "Ratio", "Rotary", "Size", "Tied", "Times", "replace"]


@dataclass(frozen=True)
class Field:
    """A size that is a config field; `default` says what it is where the config holds null or nothing."""

    name: str
    default: Ratio | Times | Field | None = None


@dataclass(frozen=True)
class Ratio:
    """A size that no field holds: one field divided by another (GPT-2's head size n_embd / n_head)."""

    over: str
    by: str


@dataclass(frozen=True)
class Times:
    """A size that is a multiple of a field (GPT-2's n_inner = 4 n_embd where it is null)."""

    times: int
    field: str


Size = Field | Ratio | Times


@dataclass(frozen=True)
class Norm:
    """A norm over an axis. Its role in patterns is its key in `Family.norms`.

    Attributes:
        axis: the axis whose channels it reads.
        kind: "rms" or "layer" (which subtracts the mean).
        eps: the config field that holds its eps.
    """

    axis: str
    kind: Literal["rms", "layer"]
    eps: str


@dataclass(frozen=True)
class Rotary:
    """Rotary positions over the key axis.

    Attributes:
        layout: "half": channel i turns with channel i + key/2.
        steady: rope types whose frequencies theta^(-2i/key) stay where they are under theta' = theta^(key'/key).
        inside: those of them for which that holds only up to max_position_embeddings.
    """

    layout: Literal["half"] = "half"
    steady: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic")
    inside: tuple[str, ...] = ("dynamic",)


@dataclass(frozen=True)
class Attention:
    """Facts of attention. Query, key and value tensors carry the roles q, k and v.

    Attributes:
        heads: the axis of query heads.
        kv_heads: the axis of key/value heads where it is another one (head h reads head h // (heads / kv_heads) of it).
        scaled: scores are divided by sqrt(key).
        rotary: rotary positions, or None.
    """

    heads: str = "heads"
    kv_heads: str | None = None
    scaled: bool = True
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Tied:
    """A head that may share the embedding's tensor.

    Attributes:
        head, embedding: tensor names on disk.
        norm: the role of the norm that the head reads.
        field: the config field that ties them.
    """

    head: str
    embedding: str
    norm: str
    field: str = "tie_word_embeddings"


@dataclass(frozen=True)
class Divides:
    """A rule of the config class: `over` must be a multiple of `by`."""

    by: str
    over: str


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: the family's name, usually its model type.
        model_types: the `model_type`s in config.json that it serves.
        architectures: the classes in config.json that it serves.
        axes: for each axis, the config field that sizes it.
        tensors: for each tensor name on disk (index axes in braces), its pattern. Order is the order on disk.
        norms: by role.
        attention: facts of attention.
        stream: the axis of the residual stream. A tensor of a layer that writes it closes a new layer.
        layer: the index axis of layers.
        tied: the head that may share the embedding.
        optional: names of tensors that a config switches on (biases), with the field that does.
        prefix: the part of the names that a bare backbone's checkpoint leaves out.
        drop: names of old buffers that are computed, not stored, and are left behind.
        per_layer: config fields that are lists with one entry a layer.
        rules: what the config class demands.
        requires: config fields that change the function in a way no fact covers, with the one value that is served.
        neutral: config fields that do not touch the function of width, depth or position and travel as they are.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    axes: Mapping[str, Size]
    tensors: Mapping[str, str]
    norms: Mapping[str, Norm]
    attention: Attention
    stream: str = "hidden"
    layer: str = "layer"
    tied: Tied | None = None
    optional: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    drop: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ()
    rules: tuple[Divides, ...] = ()
    requires: Mapping[str, object] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()

    @cached_property
    def patterns(self) -> tuple[tuple[NamePattern, TensorPattern], ...]:
        """Every tensor's name and pattern, parsed."""
        return tuple((NamePattern(name), TensorPattern.parse(text)) for name, text in self.tensors.items())

    def find(self, name: str) -> tuple[NamePattern, TensorPattern, dict[str, int]]:
        """The pattern that covers the tensor `name`, with the values of its index axes.

        Raises:
            PatternError: where none or several do.
        """
        hits = [(n, p, index) for n, p in self.patterns if (index := n.match(name)) is not None]
        if len(hits) != 1:
            said = "no pattern covers it" if not hits else f"{len(hits)} patterns cover it"
            raise PatternError(f"family {self.name}: tensor {name!r}: {said}")
        return hits[0]

    def norm_over(self, axis: str) -> Norm | None:
        """The norm that reads `axis`, or None."""
        return next((norm for norm in self.norms.values() if norm.axis == axis), None)

    def shared_eps(self, norm: Norm) -> bool:
        """Whether the norm's eps field serves norms over another axis too."""
        return any(other.eps == norm.eps and other.axis != norm.axis for other in self.norms.values())

    def closes_layer(self, name: NamePattern, pattern: TensorPattern) -> bool:
        """Whether a new layer is closed at this tensor: it stands in the layer and writes the residual stream."""
        return self.layer in name.axes and any(
            atom.axis == self.stream and atom.stand == "write" for atom in pattern.atoms()
        )
