"""The structural certificate: a grown checkpoint computes the source's function, by the algebra of its own two folders.

It believes a receipt only one pair (E, R), a scale and a closed side per axis, and the layer map. What these demand of
every tensor and config field it works out from the family's patterns by its own code (facts, fields, places,
equations). A plan's blocks are never read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import Family
from growformer.algebra.pattern import NamePattern, TensorPattern
from growformer.errors import ChangedError, PatternError
from growformer.proof.equations import Found, Tensors, check_new, check_old
from growformer.proof.facts import Facts, read_axes
from growformer.proof.fields import check_fields, check_sizes
from growformer.proof.places import Places, atom_places, dim_places

if TYPE_CHECKING:
    from growformer.checkpoint import TensorFiles

__all__ = ["Certificate", "DictTensors", "FileTensors", "Placed", "Sides", "Tensors", "certify"]


class DictTensors:
    """Tensors in memory, as `certify` reads them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor if rows is None else tensor[rows]


class FileTensors:
    """The safetensors files of a folder, as `certify` reads them."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files

    @property
    def names(self) -> list[str]:
        return self._files.names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        # An empty read has the dtype, and the files' reader alone knows how the format names dtypes.
        return self._files.read(name, slice(0, 0)).dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._files.read(name, rows)


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
    """

    failures: list[str] = field(default_factory=list)
    tensors: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("identical", "scaled", "rounded", "new"), 0))
    zero_entries: int = 0
    free_entries: int = 0

    @property
    def ok(self) -> bool:
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise ChangedError with every failure, where there is one."""
        if self.failures:
            raise ChangedError("the grown model is not the source's function:\n  " + "\n  ".join(self.failures))


@dataclass(frozen=True)
class Placed:
    """A target tensor (or a source tensor) under its family's pattern; `source` is what it comes from."""

    name: str
    at: NamePattern
    pattern: TensorPattern
    index: Mapping[str, int]
    source: str | None


class Sides:
    """The two folders under one family and one receipt."""

    def __init__(
        self,
        family: Family,
        axes: Mapping[str, Mapping[str, Any]],
        layers: Sequence[int | None],
        source: Tensors,
        target: Tensors,
        source_config: Mapping[str, Any],
        target_config: Mapping[str, Any],
        source_full: Mapping[str, Any] | None,
    ) -> None:
        self.family, self.layers, self.source, self.target = family, list(layers), source, target
        self.target_config = target_config
        full = {**source_config, **(source_full or {})}
        self.failures: list[str] = []
        self._places: dict[tuple[str, Factor | None], list[Places]] = {}
        self.bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in source.names)
        self.old = self._cover(source, "source")
        tied = family.tied
        head = tied is None or tied.head in source.names
        self.facts: Facts | None = None
        told, problems = read_axes(family, axes, self._sizes_of_shapes(), layers)
        self.failures += problems
        if set(family.axes) - {family.layer} - set(told):
            return
        kept = [layer for layer in layers if layer is not None]
        if kept != list(range(len(kept))):
            self.failures.append(f"axis {family.layer}: layers {kept} of the source, in this order; required each once")
            return
        sizes = {name: (axis.old, axis.new) for name, axis in told.items()}
        sizes[family.layer] = (len(kept), len(layers))
        self.failures += check_sizes(family, sizes, source_config, target_config, full)
        self.facts = Facts(family, told, not head and tied is not None and bool(full.get(tied.field, True)))
        self.failures += check_fields(self.facts, layers, source_config, target_config, full)
        self.failures += dict.fromkeys(self.facts.problems)  # several norms may say the same

    def _cover(self, tensors: Tensors, side: str) -> dict[str, Placed]:
        """Each tensor under the one pattern that covers it; buffers that are left behind are not among them."""
        drop = [NamePattern(text) for text in self.family.drop]
        out: dict[str, Placed] = {}
        for name in tensors.names:
            full = self.family.prefix + name if self.bare else name
            if side == "source" and any(pattern.match(full) is not None for pattern in drop):
                continue
            try:
                at, pattern, index = self.family.find(full)
            except PatternError as error:
                self.failures.append(f"{side}: {error}")
                continue
            out[name] = Placed(name, at, pattern, index, None)
        return out

    def _sizes_of_shapes(self) -> dict[str, int]:
        """The sizes of axes that are a dim of their own, for axes that the receipt leaves out."""
        out = {}
        for tensor in self.old.values():
            for dim, size in zip(tensor.pattern.dims, self.source.shape(tensor.name), strict=False):
                if dim.atom is not None and isinstance(dim.atom.axis, str):
                    out[dim.atom.axis] = size
        return out

    def _name(self, at: NamePattern, index: Mapping[str, int]) -> str:
        return at.format(index).removeprefix(self.family.prefix if self.bare else "")

    def required(self) -> dict[str, Placed]:
        """Every tensor that the target must have, and no other."""
        layer, out = self.family.layer, dict[str, Placed]()
        by_layer: dict[int, list[Placed]] = {}
        for old in self.old.values():
            if layer in old.index:
                by_layer.setdefault(old.index[layer], []).append(old)
            else:
                out[old.name] = Placed(old.name, old.at, old.pattern, old.index, old.name)
        last = next((old for old in self.layers if old is not None), 0)
        for i, at in enumerate(self.layers):
            last = last if at is None else at
            for old in by_layer.get(last, []):
                index = {**old.index, layer: i}
                name = self._name(old.at, index)
                out[name] = Placed(name, old.at, old.pattern, index, None if at is None else old.name)
        return out

    def check_names(self) -> dict[str, Placed]:
        """What is missing or too much on either side; returns the target tensors that can be looked at."""
        layer, tied = self.family.layer, self.family.tied
        for at, _ in self.family.patterns:
            found = {old.index.get(layer, -1) for old in self.old.values() if old.at.text == at.text}
            wanted = {layer_ for layer_ in self.layers if layer_ is not None} if layer in at.axes else {-1}
            may_lack = at.text in self.family.optional or (tied is not None and at.text == tied.head)
            if found != wanted and not (may_lack and not found):
                lacking, extra = sorted(wanted - found), sorted(found - wanted)
                index = dict.fromkeys(at.axes, (lacking + extra)[0])
                self.failures.append(f"source: {at.format(index)} is {'missing' if lacking else 'of no layer'}")
        required, names = self.required(), set(self.target.names)
        self.failures += [f"{name}: missing in the target" for name in required if name not in names]
        self.failures += [f"{name}: in the target, but nothing asks for it" for name in sorted(names - set(required))]
        return {name: tensor for name, tensor in required.items() if name in names}

    def places(self, tensor: Placed, gain: Factor | None = None) -> list[Places]:
        assert self.facts is not None
        facts, key = self.facts, (tensor.pattern.text, gain)
        if key not in self._places:
            dims = tensor.pattern.dims
            self._places[key] = [dim_places(dim, lambda atom: atom_places(facts, atom, gain)) for dim in dims]
        return self._places[key]

    def qk_role(self, tensor: Placed) -> str | None:
        """The role, q or k, of a gain over the key axis: of the two factors only the product is known."""
        assert self.facts is not None
        return next((a.role for a in tensor.pattern.atoms() if a.stand == "gain" and a.axis == self.facts.key), None)

    def check(self, tensor: Placed) -> Found:
        if tensor.source is None:
            return check_new(self.target, tensor.name, self.family.closes_layer(tensor.at, tensor.pattern))
        return check_old(self.places(tensor), self.target, tensor.name, self.source, tensor.source)

    def check_qk(self, q: Placed, k: Placed) -> dict[str, tuple[Factor, Found]]:
        """The gains of a layer's queries and keys: the factor all on one of them, or half on each.

        Where none of these is found, what is said is about the first of them: all on the keys.
        """
        assert self.facts is not None and q.source is not None and k.source is not None
        product = self.facts.qk_gain()
        root = _root(product)
        splits = [(ONE, product), (product, ONE), *([] if root is None else [(root, root)])]
        first: dict[str, tuple[Factor, Found]] = {}
        for split in splits:
            found = {
                tensor.name: (
                    factor,
                    check_old(self.places(tensor, factor), self.target, tensor.name, self.source, old),
                )
                for tensor, old, factor in ((q, q.source, split[0]), (k, k.source, split[1]))
            }
            first = first or found
            if not any(each.wrong for _, each in found.values()):
                return found
        return first

    def pairs(self, tensors: Mapping[str, Placed]) -> Iterator[tuple[Placed, Placed]]:
        """The gains of q and of k of each old layer."""
        by_layer: dict[int, dict[str, Placed]] = {}
        for tensor in tensors.values():
            role = self.qk_role(tensor)
            if role is not None and tensor.source is not None:
                by_layer.setdefault(tensor.index[self.family.layer], {})[role] = tensor
        return ((pair["q"], pair["k"]) for pair in by_layer.values() if set(pair) == {"q", "k"})


def _root(factor: Factor) -> Factor | None:
    """The factor whose square this one is, where it is the root of a fraction."""
    text = str(factor)
    return None if text.startswith("sqrt") else Factor.parse(text)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that look at a tensor each. Torch's own threads would wait in every small step for a core that is busy
    elsewhere (a folder is hashed meanwhile), which has cost ten times the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def certify(
    family: Family,
    axes: Mapping[str, Mapping[str, Any]],
    layers: Sequence[int | None],
    source: Tensors,
    target: Tensors,
    source_config: Mapping[str, Any],
    target_config: Mapping[str, Any],
    *,
    source_full: Mapping[str, Any] | None = None,
) -> Certificate:
    """Check that the target computes the source's function (the equations of arXiv 2308.06103, sections 3.1 to 3.6).

    Every tensor is streamed in pieces of rows; memory does not grow with a tensor's size, but for one float64 row
    where rows are means.

    Args:
        family: the family of both models.
        axes: what the receipt says of each axis: old and new size, lift (runs), scale (a square), closed side.
        layers: for each target layer its source layer, or None where it is new.
        source, target: the tensors of the two folders, of shapes by the family's patterns.
        source_config, target_config: the two config.json.
        source_full: the source's config with defaults filled in by its class.

    Returns:
        The certificate; it holds where its `failures` are empty.
    """
    result = Certificate()
    case = Sides(family, axes, layers, source, target, source_config, target_config, source_full)
    result.failures = case.failures
    if case.facts is None or case.facts.problems:
        return result
    tensors = case.check_names()
    paired: dict[str, tuple[Factor, Found]] = {}
    for q, k in case.pairs(tensors):
        paired |= case.check_qk(q, k)
    fidelity: Counter[str] = Counter()
    stated = str(target_config.get("dtype") or target_config.get("torch_dtype")).removeprefix("torch.")

    def look(tensor: Placed) -> tuple[Found, torch.dtype, torch.dtype]:
        name = tensor.name
        dtype, old = target.dtype(name), source.dtype(tensor.source or next(iter(case.old)))
        if dtype != old and str(dtype) != f"torch.{stated}":
            wrong = f"{name}: dtype {dtype}; required {old}, or the config's dtype {stated!r}"
            return Found(wrong, fidelity=""), dtype, old
        try:
            return paired[name][1] if name in paired else case.check(tensor), dtype, old
        except ValueError as error:
            return Found(f"{name}: {error}"), dtype, old

    with _workers() as pool:
        for found, dtype, old in pool.map(look, tensors.values()):
            if found.wrong:
                result.failures.append(found.wrong)
            if not found.fidelity:  # of another dtype: not looked at
                continue
            if found.fidelity in ("identical", "scaled") and torch.promote_types(dtype, old) != dtype:
                found.fidelity = "rounded"
            result.tensors += 1
            result.zero_entries += found.zero
            result.free_entries += found.free
            fidelity[found.fidelity] += 1
    result.counts |= fidelity
    return result
