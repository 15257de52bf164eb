"""The structural certificate: a grown checkpoint computes the source's function, by the algebra of its own two folders.

It believes a receipt only one pair (E, R), a scale and a closed side per axis, the layer map, and the gain that norms
on the stream keep which gave theirs to a new layer. What these demand of
every tensor and config field it works out from the family's patterns by its own code (facts, fields, places,
equations). A plan's blocks are never read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import Family
from growformer.algebra.pattern import WILD
from growformer.algebra.sizes import lookup
from growformer.errors import ChangedError, PatternError
from growformer.proof.axes import Axis, read_axes
from growformer.proof.equations import Found, Slabs, Tensors, check_new, check_old, same
from growformer.proof.facts import Facts
from growformer.proof.fields import check_fields, check_sizes
from growformer.proof.handing import LayerMap, kept_gains
from growformer.proof.layers import Names, Placed, check_layers, layer_maps
from growformer.proof.mirrors import check_inside, check_pairs, inside
from growformer.proof.origin import Origin
from growformer.proof.places import Places, Where, atom_places, dim_places
from growformer.proof.reading import DictTensors, FileTensors
from growformer.proof.slices import slice_number
from growformer.proof.spans import Spans

__all__ = ["Certificate", "DictTensors", "FileTensors", "LayerMap", "Placed", "Sides", "Tensors", "certify"]


@dataclass
class Certificate:
    """What `certify` found.

    Attributes:
        failures: each names the tensor, axis or config field, what was found and what is required.
        tensors: how many target tensors were checked.
        counts: how many of them hold the source's bits ("identical"), its bits but for a power of two ("scaled"), its
            values rounded once ("rounded"), or nothing of it ("new": those of new layers).
        zero_entries: entries that had to be zero.
        free_entries: entries whose value cannot be seen.
        inseparable: by axis, how many channels are copies that nothing tells apart, of how many (see `symmetry`).
        copied: there are copies.
    """

    failures: list[str] = field(default_factory=list)
    tensors: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("identical", "scaled", "rounded", "new"), 0))
    zero_entries: int = 0
    free_entries: int = 0
    inseparable: dict[str, tuple[int, int]] = field(default_factory=dict)
    copied: bool = False

    @property
    def ok(self) -> bool:
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise ChangedError with every failure, where there is one."""
        if self.failures:
            raise ChangedError("the grown model is not the source's function:\n  " + "\n  ".join(self.failures))


class Sides:
    """The two folders under one family and one receipt."""

    def __init__(
        self,
        family: Family,
        axes: Mapping[str, Mapping[str, Any]],
        layers: LayerMap | Sequence[int | None],
        source: Tensors,
        target: Tensors,
        source_config: Mapping[str, Any],
        target_config: Mapping[str, Any],
        source_full: Mapping[str, Any] | None,
        origin: Origin | None = None,
    ) -> None:
        full: Mapping[str, Any] = {**source_config, **(source_full or {})}
        self.failures: list[str] = []
        if origin is not None:
            source_config, full, self.failures = origin.seen(family, source_config, full, target_config)
            target_config = origin.filled(target_config)
        self.family = family = family.of(full)
        self.source, self.target, self.origin = source, target, origin
        self._places: dict[tuple[str, tuple[int, ...], bool, Factor, int], tuple[list[Places], Spans | None]] = {}
        self._lock = threading.Lock()
        bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in source.names)
        self.prefix = family.prefix if bare else ""
        tied = family.tied
        head = tied.head if tied is not None and tied.head in source.names else None
        self.tied = family.headed(full) and (head is None or bool(lookup(full, tied.field if tied else "")))
        self.spare = head if self.tied else None  # stored beside the embedding that it is tied to
        self.headless = bare or not family.headed(full)
        self.old = self._cover()
        self.facts: Facts | None = None
        self.paired: set[str] = set()
        self.inside: dict[str, Axis] = {}
        counts = {axis: 1 + max(old.index.get(axis, -1) for old in self.old.values()) for axis in family.layers}
        self.layers = layer_maps(family, layers, counts if self.old else {})
        told, problems = read_axes(family, axes, self._sizes_of_shapes(), self.layers)
        kept, odd = kept_gains(family, axes)
        unfit = check_layers(family, self.layers, kept)
        problems += [*odd, *unfit]
        named = {axis for at, _ in family.patterns for axis in at.axes} - {*told, *family.layers}
        problems += [f"axis {axis}: names of tensors hold it, and the family has none such" for axis in sorted(named)]
        self.failures += problems
        if set(family.axes) - set(family.layers) - set(told) or named or odd or unfit:
            return
        sizes = {name: (axis.old, axis.size) for name, axis in told.items()}
        sizes |= {axis: (len(at) - list(at).count(None), len(at)) for axis, at in self.layers.items()}
        self.failures += check_sizes(family, sizes, source_config, target_config, full)
        lifted = {axis: Axis.of_layers(axis, at) for axis, at in self.layers.items()}
        self.facts = Facts(family, told, self.tied, lifted, routed=origin is not None)
        self.names = Names(self.facts, self.layers, kept, self.old, self.prefix, origin)
        self.failures += check_fields(self.facts, self.layers, source_config, target_config, full)
        self.failures += dict.fromkeys(self.facts.problems)  # several norms may say the same
        self.paired = {axis for axis in family.layers if axes.get(axis, {}).get("closed") == "pairs"}
        try:
            self.inside = inside(family, told) if self.paired else {}
        except ValueError as error:
            self.failures.append(f"axis {next(iter(self.paired))}: {error}")

    def _cover(self) -> dict[str, Placed]:
        """Each source tensor under the one pattern that covers it; buffers that are left behind are not among them."""
        out: dict[str, Placed] = {}
        for name in self.source.names:
            full = self.family.full_name(name, self.prefix)
            if name == self.spare or self.family.drops(full):
                continue
            try:
                at, pattern, index = self.family.find(self.origin.becoming.renamed(full) if self.origin else full)
            except PatternError as error:
                self.failures.append(f"source: {error}")
                continue
            out[name] = Placed(name, at, pattern, index)
        return out

    def _sizes_of_shapes(self) -> dict[str, int]:
        """The sizes of axes that are a dim of their own, for axes that the receipt leaves out."""
        out = {}
        for tensor in self.old.values():
            for dim, size in zip(tensor.dims, self.source.shape(tensor.name), strict=False):
                if dim.atom is not None and isinstance(dim.atom.axis, str):
                    out[dim.atom.axis] = size
        return out

    def check_names(self) -> dict[str, Placed]:
        """What is missing or too much on either side; returns the target tensors that can be looked at."""
        self.check_head()
        tied, origin = self.family.tied, self.origin
        for at, _ in self.family.patterns:
            found = {tuple(old.index.values()) for old in self.old.values() if old.at.text == at.text}
            wanted = set(self.names.indices(at))
            may_lack = at.text in (*self.family.optional, *self.family.tasks) or not at.text.startswith(self.prefix)
            if tied is not None and at.text == tied.head:
                may_lack = may_lack or self.tied or self.headless
            lacking, extra = sorted(wanted - found), sorted(found - wanted)
            if (origin.may_lack(at) if origin else at.text in self.family.uneven) or (may_lack and not found):
                lacking = []
            if lacking or extra:
                name = at.format(dict(zip(at.axes, (lacking or extra)[0], strict=True)))
                self.failures.append(f"source: {name} is {'missing' if lacking else 'of no layer'}")
        try:
            required, names = self.names.required(), set(self.target.names)
        except ValueError as error:
            self.failures.append(str(error))
            return {}
        self.failures += [f"{name}: missing in the target" for name in required if name not in names]
        self.failures += [f"{name}: in the target, but nothing asks for it" for name in sorted(names - set(required))]
        return {name: tensor for name, tensor in required.items() if names.issuperset((name, *tensor.copies))}

    def check_spare(self) -> None:
        """That a head which the config ties, and which the source stores all the same, is the embedding."""
        tied = self.family.tied
        for old in self.old.values():
            if tied is None or self.spare is None or old.at.text != tied.embedding:
                continue
            if not same(self.source, self.spare, old.name):
                self.failures.append(f"source: {self.spare} is other than {old.name}, to which config.json ties it")

    def check_head(self) -> None:
        """That what the head demands falls on one norm."""
        assert self.facts is not None
        tied, norms = self.family.tied, self.facts.norms
        if tied is None or norms.head == ONE:
            return
        gains = [
            old.name
            for old in self.old.values()
            if any((atom.stand, atom.role) == ("gain", tied.norm) for atom in old.pattern.atoms())
            and norms.demand(tied.norm, old.at, self.last(old, source=True)) != ONE
        ]
        if len(gains) > 1:
            self.failures.append(f"axis {self.family.norms[tied.norm].axis}: {gains} all give to the head; not covered")

    def last(self, tensor: Placed, *, source: bool = False) -> bool:
        """Whether a tensor stands in the last of its layers, or in none."""
        layers = {axis: [at for at in maps if at is not None] if source else maps for axis, maps in self.layers.items()}
        return all(i == len(layers[axis]) - 1 for axis, i in tensor.index.items() if axis in layers)

    def places(self, tensor: Placed, split: Factor = ONE) -> list[Places]:
        """What the dims of a target tensor must hold; see `places_and_spans`."""
        return self.places_and_spans(tensor, split)[0]

    def places_and_spans(self, tensor: Placed, split: Factor = ONE) -> tuple[list[Places], Spans | None]:
        """What the dims of a target tensor must hold, index by index and, where that is quicker, by spans.

        Args:
            tensor: the tensor.
            split: what the gains of queries, or of keys, are multiplied by.

        Raises:
            ValueError: no rule covers it.
        """
        assert self.facts is not None
        facts, dims = self.facts, tensor.dims
        shape = self.source.shape(tensor.like)
        if len(shape) != len(dims):
            raise ValueError(f"shape {list(shape)}; required {len(dims)} dims, as {tensor.pattern.text!r}")
        wild = [n if d.atom is not None and d.atom.axis == WILD else 0 for d, n in zip(dims, shape, strict=True)]
        key = (tensor.at.text, tuple(wild), last := self.last(tensor), split, number := self.slice_of(tensor))
        with self._lock:
            if key not in self._places:
                where = Where(tensor.at, last, split, number)
                places = [
                    dim_places(dim, lambda atom, size=size: atom_places(facts, atom, where, size))  # type: ignore[misc]
                    for dim, size in zip(dims, wild, strict=True)
                ]
                if self.parts(tensor):
                    places[0] = places[0].times(Factor.of(facts.split))
                self._places[key] = places, None if self.offset(tensor) or not places else Spans.of(places)
            return self._places[key]

    def slice_of(self, tensor: Placed) -> int:
        """Which slice of the experts' width a target tensor has; 0 where there is one alone."""
        facts, experts = self.facts, self.family.experts
        if facts is None or experts is None or facts.split == 1 or experts.axis not in tensor.index:
            return 0
        return slice_number(facts.axes[experts.axis], tensor.index[experts.axis])

    def parts(self, tensor: Placed) -> bool:
        """Whether a target tensor is what reads one of an expert's slices, and counts for all of them."""
        experts = self.family.experts
        return self.facts is not None and self.facts.split > 1 and experts is not None and tensor.reads(experts.axis)

    def stacked(self, tensor: Placed, places: Sequence[Places]) -> list[Places]:
        """The places of all copies of a tensor, stacked along a last dim: together they are the source's."""
        assert self.facts is not None
        axis = next(axis for axis in tensor.at.axes if axis not in self.layers and tensor.atom(axis).stand == "read")
        index = atom_places(self.facts, tensor.atom(axis), Where(tensor.at))
        return [*places, index.of(int(index.source[tensor.index[axis]]))]

    def offset(self, tensor: Placed) -> int:
        """What is added to the stored numbers for new entries that are shut to be zero.

        A gain that is no norm's passes a carried mean only where it is one, and a number passes a new layer's stream.
        """
        if tensor.source is None and self.family.passes(tensor.pattern):
            return -1
        assert self.facts is not None
        if any(self.facts.scales(atom) and self.facts.axes[str(atom.axis)].means for atom in tensor.pattern.atoms()):
            return -1
        return max((self.family.offset(atom) for atom in tensor.pattern.atoms()), default=0)

    def weigh(self, tensor: Placed) -> Tensor | None:
        """The source's gain that stands between what a tensor writes and a stream that carries the mean of it."""
        name = None if self.facts is None else self.facts.scale_of(tensor.at, tensor.pattern)
        if name is None or tensor.source is None:
            return None
        return self.source.read(self.names.disk(name, self.old[tensor.source].index)).double()

    def qk_role(self, tensor: Placed) -> tuple[str, str] | None:
        """The role, q or k, and the axis of a gain or shift over keys: of two gains only the product is known."""
        assert self.facts is not None
        for atom in tensor.pattern.atoms():
            norm = self.family.norms.get(atom.role or "")
            side = self.family.side(atom.role)
            if atom.stand in ("gain", "shift") and side in ("q", "k") and norm is not None:
                return (side, norm.axes[-1]) if norm.axes[-1] in self.facts.attending.keys else None
        return None

    def check(self, tensor: Placed, split: Factor = ONE) -> Found:
        """One target tensor; of copies that are read together, all of them at the first."""
        (places, spans), offset = self.places_and_spans(tensor, split), self.offset(tensor)
        if tensor.source is None:
            shape = [dim.new for dim in places]
            inner = self.inside if any(axis in self.paired for axis in tensor.index) else {}
            reads = (inner.get(str(atom.axis)) for atom in tensor.pattern.atoms() if atom.stand == "read")
            halved = any(axis is not None and axis.partner is not None for axis in reads)
            closed = tensor.closed and not halved
            found = check_new(self.target, tensor.name, shape, closed, offset, tensor.value)
            if inner and not found.wrong:
                found.wrong = check_inside(inner, tensor.dims, self.target, tensor.name)
            return found
        if len(tensor.copies) < 2:
            found = check_old(
                places, self.target, tensor.name, self.source, tensor.source, offset, spans, self.weigh(tensor)
            )
            if self.facts is not None and self.facts.paired and not found.wrong:
                found.wrong = check_pairs(self.facts.axes, tensor.dims, self.target, tensor.name)
            return found
        if tensor.name != tensor.copies[0]:
            return Found(fidelity="rounded")
        target, source = Slabs(self.target, tensor.copies), Slabs(self.source, [tensor.source])
        return check_old(self.stacked(tensor, places), target, tensor.name, source, tensor.source, offset)

    def check_qk(self, layer: Sequence[tuple[Placed, str, str]]) -> dict[str, tuple[Factor, Found]]:
        """The gains (and shifts) of a layer's queries and keys: the factor all on one side, or half on each.

        Where none of these is found, what is said is about the first of them: on the queries as little as can be.
        """
        assert self.facts is not None
        # Shifts fix how it is shared; so do keys that other layers borrow, whose queries have none to share it with.
        fixed = bool(self.family.lenders) or any(
            atom.stand == "shift" for tensor, _, _ in layer for atom in tensor.pattern.atoms()
        )
        first: dict[str, tuple[Factor, Found]] = {}
        for split in range(1 if fixed else 4):
            found: dict[str, tuple[Factor, Found]] = {}
            for tensor, role, key in layer:
                gains = _splits(*self.facts.attending.qk_gains(key))
                if split < len(gains):
                    factor = gains[split][role == "k"]
                    found[tensor.name] = factor, self.check(tensor, factor)
            first = first or found
            if len(found) == len(layer) and not any(each.wrong for _, each in found.values()):
                return found
        return first

    def pairs(self, tensors: Mapping[str, Placed]) -> Iterator[list[tuple[Placed, str, str]]]:
        """The gains and shifts of queries and keys of each old layer, with their roles and axes."""
        by_layer: dict[tuple[tuple[str, int], ...], list[tuple[Placed, str, str]]] = {}
        for tensor in tensors.values():
            role = self.qk_role(tensor)
            if role is not None and tensor.source is not None:
                layer = tuple((axis, at) for axis, at in tensor.index.items() if axis in self.layers)
                by_layer.setdefault(layer, []).append((tensor, *role))
        return (layer for layer in by_layer.values() if {role for _, role, _ in layer} == {"q", "k"})


def _splits(q: Factor, k: Factor) -> list[tuple[Factor, Factor]]:
    """Ways to share the product of two gains."""
    root = _root(q * k)
    return [(q, k), (ONE, q * k), (q * k, ONE), *([] if root is None else [(root, root)])]


def _root(factor: Factor) -> Factor | None:
    """The factor whose square this one is, where it is the root of a fraction."""
    text = str(factor)
    return None if text.startswith("sqrt") else Factor.parse(text)


def certify(
    family: Family,
    axes: Mapping[str, Mapping[str, Any]],
    layers: LayerMap | Sequence[int | None],
    source: Tensors,
    target: Tensors,
    source_config: Mapping[str, Any],
    target_config: Mapping[str, Any],
    *,
    source_full: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
    threads: int | None = None,
) -> Certificate:
    """Check that the target computes the source's function (the equations of arXiv 2308.06103, sections 3.1 to 3.6).

    Every tensor is streamed in pieces of rows; memory does not grow with a tensor's size, but for one float64 row
    where rows are means.

    Args:
        family: the family of both models, or the target's where the source is of another.
        axes: what the receipt says of each axis: old and new size, lift (runs), scale (a square), closed side.
        layers: by layer axis, for each target layer its source layer, or None where it is new (of one axis, its list).
        source, target: the tensors of the two folders, of shapes by the family's patterns.
        source_config, target_config: the two config.json.
        source_full: the source's config with defaults filled in by its class.
        origin: how a source of another family became one of this.
        threads: how many tensors are looked at at once; None: one for each core.

    Returns:
        The certificate; it holds where its `failures` are empty.
    """
    from growformer.proof.certifier import Certifier

    told = (family, axes, layers, source, target, source_config, target_config)
    return Certifier(*told, source_full=source_full, origin=origin).result(threads)
