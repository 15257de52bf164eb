"""The Family type: everything the engine needs to know of a model family, as one literal without code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from growformer.algebra.facts import Attention, Divides, Experts, Frozen, Lends, Norm, Power, Tied
from growformer.algebra.pattern import GATE, ODDS, Atom, NamePattern, TensorPattern
from growformer.algebra.sizes import Field, Size, fields_of, lookup, meets
from growformer.errors import PatternError

__all__ = ["OUTSIDE", "Family", "PerLayer", "replace"]

OUTSIDE = ("vocab", "positions")
"""Axes that a model's inputs and outputs index: they grow at their end, and what is new there nobody has used."""

_HEADS = ("ForCausalLM", "ForMaskedLM", "LMHead", "ForConditionalGeneration", "ForPreTraining", "DoubleHeads")

PerLayer = Literal["each", "runs", "numbers", "first", "last", "keyed"]
"""How a config field speaks of layers: a list with one entry each; a list of [entries, times] (GPT-Neo); a list of
layer numbers; the number of the first, or the last, layers that it holds for; or an object with entries by layer
number, which may leave layers out."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: the family's name, usually its model type.
        model_types: the `model_type`s in config.json that it serves.
        architectures: the classes in config.json that it serves.
        axes: for each axis, the config field that sizes it. Several axes may have one field; they then grow together.
        tensors: for each tensor name on disk (index axes in braces), its pattern. Order is the order on disk.
        tasks: the same for tensors of task heads, which a checkpoint has or has not.
        norms: by role.
        attention: facts of attention; several where axes differ (an encoder's and a decoder's heads).
        experts: facts of a mixture of experts.
        streams: the axes of residual streams (several where towers stand side by side). A tensor of a layer that writes
            one closes a new layer.
        layers: the index axes of layers.
        tied: the head that may share the embedding.
        powers: by role of a writer of the stream (or "logits"), by which power of a size the code multiplies.
        copied: axes that grow only by copies of all their channels, each with the reason in one sentence.
        optional: names of tensors that a config switches on (biases), with the field that does.
        gates: names of tensors that write an MLP's gate: it multiplies what another tensor writes in the same channels.
        activations: by axis of units, the config field that names what stands between their writers and their readers.
        uneven: names of tensors that only some layers have (dense and sparse layers in turn).
        prefix: the part of the names that a bare backbone's checkpoint leaves out.
        drop: names of old buffers that are computed, not stored, and are left behind.
        per_layer: config fields that speak of single layers, with how they do.
        kinds: by a name that tensor names pin layers by (``{layer:wide}``), the layers meant: those for which every
            one of these `per_layer` fields has this entry ("each"), or counts them among its own or not ("last").
        lends: where the last layers take keys and values from others, how.
        settled: how many of the first layers no new layer may come before.
        rules: what the config class demands.
        follows: config fields that repeat another field's value, and grow with it.
        aliases: older names of config fields, which a config may hold beside or in place of them.
        frozen: axes that cannot grow as the config stands.
        requires: config fields that change the function in a way no fact covers, with the one value that is served.
        neutral: config fields that do not touch the function of width, depth or position and travel as they are.
        when: (conditions, changes) pairs, tried in order: where every config field has the value of its condition (or
            is `Unlike` another), the changes replace this family's attributes (mappings are merged, and None takes an
            entry away).
        sample: config fields of a tiny model for tests, sizes pairwise different.
        variants: changes to the sample that make other models of the family.
        placed: by kind, the numbers of its layers in the config's model; worked out by `of`.
        lenders: the numbers of the layers that lend keys and values in the config's model; worked out by `of`.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    axes: Mapping[str, Size]
    tensors: Mapping[str, str]
    norms: Mapping[str, Norm]
    attention: Attention | tuple[Attention, ...]
    tasks: Mapping[str, str] = field(default_factory=dict)
    experts: Experts | None = None
    streams: tuple[str, ...] = ("hidden",)
    layers: tuple[str, ...] = ("layer",)
    tied: Tied | None = None
    powers: Mapping[str, Power] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[str, ...] = ()
    activations: Mapping[str, str] = field(default_factory=dict)
    uneven: tuple[str, ...] = ()
    prefix: str = ""
    drop: tuple[str, ...] = ()
    per_layer: Mapping[str, PerLayer] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    lends: Lends | None = None
    settled: int = 0
    rules: tuple[Divides, ...] = ()
    follows: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[Frozen, ...] = ()
    requires: Mapping[str, object] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    when: tuple[tuple[Mapping[str, object], Mapping[str, Any]], ...] = ()
    sample: Mapping[str, object] = field(default_factory=dict)
    variants: tuple[Mapping[str, object], ...] = ()
    placed: Mapping[str, frozenset[int]] = field(default_factory=dict)
    lenders: frozenset[int] = frozenset()

    def of(self, config: Mapping[str, Any]) -> Family:
        """This family as a config has it: every change of `when` whose conditions hold, made.

        Args:
            config: with the class's defaults filled in.
        """
        family = self
        for conditions, changes in self.when:
            if meets(config, conditions):
                merged = {k: _merged(getattr(family, k), value, k == "requires") for k, value in changes.items()}
                family = replace(family, **merged)
        # What only another variant speaks of is known, and does not matter here.
        spoken = {name for size in self.axes.values() for name in fields_of(size)}
        spoken |= {name for conditions, _ in self.when for name in conditions}
        return replace(
            family,
            when=(),
            neutral=(*family.neutral, *sorted(spoken - set(family.neutral))),
            placed={kind: family._members(kind, config) for kind in family.kinds},
            lenders=family.lends.lenders(config) if family.lends is not None else frozenset(),
        )

    def _members(self, kind: str, config: Mapping[str, Any]) -> frozenset[int]:
        """The numbers of the layers of one kind."""
        size = self.axes[self.layer]
        found = lookup(config, size.name) if isinstance(size, Field) else None
        count = found if isinstance(found, int) else 0
        members = set(range(count))
        for name, wanted in self.kinds[kind].items():
            value = lookup(config, name)
            if self.per_layer.get(name) == "last":
                members = {i for i in members if (i >= count - (value or 0)) == wanted}
            else:
                members = {i for i in members if i < len(value or ()) and value[i] == wanted}
        return frozenset(members)

    @cached_property
    def patterns(self) -> tuple[tuple[NamePattern, TensorPattern], ...]:
        """Every tensor's name and pattern, parsed."""
        found = []
        for name, text in {**self.tensors, **self.tasks}.items():
            pattern = TensorPattern.parse(text).indexed(self.streams)
            found.append((self._name(name), pattern.written_as(GATE) if name in self.gates else pattern))
        return tuple(found)

    @cached_property
    def _dropped(self) -> tuple[NamePattern, ...]:
        return tuple(self._name(text) for text in self.drop)

    def _name(self, text: str) -> NamePattern:
        kind = NamePattern(text).kind
        if kind and kind not in self.kinds:
            raise PatternError(f"family {self.name}: tensor name {text!r}: there is no kind {kind} of layers")
        return NamePattern(text, self.placed.get(kind, frozenset()) if kind else None)

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        return (self.attention,) if isinstance(self.attention, Attention) else self.attention

    @property
    def stream(self) -> str:
        """The first of the streams."""
        return self.streams[0]

    @property
    def layer(self) -> str:
        """The first of the layer axes."""
        return self.layers[0]

    def attention_of(self, axis: str) -> Attention | None:
        """The attention whose heads, key or value axis this is, or None."""
        for attention in self.attentions:
            mine = (attention.heads, attention.kv_heads, attention.group, *attention.key, attention.value)
            if axis in mine:
                return attention
        return None

    def find(self, name: str) -> tuple[NamePattern, TensorPattern, dict[str, int]]:
        """The pattern that covers the tensor `name`, with the values of its index axes.

        Raises:
            PatternError: where none or several do.
        """
        hits = [(n, p, index) for n, p in self.patterns if (index := _index(n, name)) is not None]
        if len(hits) != 1:
            said = "no pattern covers it" if not hits else f"{len(hits)} patterns cover it"
            raise PatternError(f"family {self.name}: tensor {name!r}: {said}")
        return hits[0]

    def drops(self, name: str) -> bool:
        """Whether the tensor `name` is left behind."""
        return any(_index(pattern, name) is not None for pattern in self._dropped)

    def full_name(self, disk: str, prefix: str) -> str:
        """The name that patterns know a tensor by: a bare backbone leaves `prefix` out, but heads never had it."""
        if not prefix or any(name.match(disk) is not None for name, _ in self.patterns):
            return disk
        return prefix + disk

    def headed(self, config: Mapping[str, Any]) -> bool:
        """Whether the model of a config has the head that could be tied: transformers names its classes by their heads.

        A config that names no class means a language model.
        """
        named = (config.get("architectures") or [_HEADS[0]])[0]
        return self.tied is not None and any(head in named for head in _HEADS)

    def norm_over(self, axis: str) -> Norm | None:
        """The norm that reads `axis` alone, or None."""
        return next((norm for norm in self.norms.values() if norm.axis == axis and norm.kind != "batch"), None)

    def batch_norm(self, role: str | None) -> Norm | None:
        """The batch norm of a role, which reads each channel on its own; None where it is none."""
        norm = self.norms.get(role or "")
        return norm if norm is not None and norm.kind == "batch" else None

    def norm_across(self, axis: str) -> Norm | None:
        """The norm that reads `axis` in a product with other axes, or None."""
        return next((norm for norm in self.norms.values() if axis in norm.axes and len(norm.axes) > 1), None)

    def fixed_eps(self, norm: Norm) -> bool:
        """Whether the norm's eps cannot be rescaled: it stands in the code, or serves norms over other axes too."""
        return not isinstance(norm.eps, str) or any(
            other.eps == norm.eps and other.axis != norm.axis for other in self.norms.values()
        )

    def odds(self, axis: str) -> list[NamePattern]:
        """The names of the biases on what channels of `axis` are chosen by."""
        return [n for n, p in self.patterns if any((a.role, a.axis) == (ODDS, axis) for a in p.atoms())]

    def closes_layer(self, name: NamePattern, pattern: TensorPattern) -> bool:
        """Whether a new layer is closed at this tensor.

        It stands in the layer, and is the gain (or the shift) of a norm on what a branch adds to the stream; or, where
        the family has no such norm, it writes the stream itself.
        """
        if not set(self.layers) & set(name.axes):
            return False
        added = {role for role, norm in self.norms.items() if norm.output == "added"}
        if added:
            return any(atom.role in added and atom.stand != "write" for atom in pattern.atoms())
        return any(atom.axis in self.streams and atom.stand == "write" for atom in pattern.atoms())

    def side(self, role: str | None) -> Literal["q", "k", "v"] | None:
        """Whether tensors of a role are the queries, keys or values of an attention; None for any other role."""
        for attention in self.attentions:
            if role in attention.roles:
                sides: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
                return sides[attention.roles.index(role)]
        return None

    @staticmethod
    def passes(pattern: TensorPattern) -> bool:
        """Whether a tensor is but a number that multiplies what passes, the stream perhaps: a new layer's is 1."""
        atoms = list(pattern.atoms())
        return bool(atoms) and all(atom.stand == "gain" and isinstance(atom.axis, int) for atom in atoms)

    def offset(self, atom: Atom) -> int:
        """What the code adds to the stored numbers of a norm's gain before it multiplies: 1 or 0."""
        norm = self.norms.get(atom.role or "") if atom.stand == "gain" else None
        return 0 if norm is None else norm.offset


def _index(pattern: NamePattern, name: str) -> dict[str, int] | None:
    """The values of a source tensor's index axes under a name pattern, or None where it is no such tensor."""
    index = pattern.match(name)
    return index if index is not None and pattern.has(tuple(index.values())) else None


def _merged(old: Any, new: Any, values: bool) -> Any:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # None takes away what is there; of a config field that is not there, it is a value like another.
        kept = {key: value for key, value in {**old, **new}.items() if value is not None}
        return {**kept, **{key: None for key, value in new.items() if values and value is None and key not in old}}
    return new
