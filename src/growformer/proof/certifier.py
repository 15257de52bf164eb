"""The structural certificate, a tensor at a time and by several threads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from growformer.algebra.family import Family
from growformer.algebra.pattern import ODDS
from growformer.proof.barred import check_bias, lacking
from growformer.proof.certificate import Certificate, LayerMap, Placed, Sides
from growformer.proof.equations import Found, Tensors
from growformer.proof.origin import Origin
from growformer.proof.symmetry import copied_axes, inseparable


@contextmanager
def _workers(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that look at a tensor each. Torch's own threads would wait in every small step for a core that is busy
    elsewhere (a folder is hashed meanwhile), which has cost ten times the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class Certifier:
    """The certificate of `certify`, a tensor at a time: a tensor may be looked at while others are yet to be written.

    Takes what `certify` takes.
    """

    def __init__(
        self,
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
    ) -> None:
        told = (family, axes, layers, source, target, source_config, target_config)
        self._case = Sides(*told, source_full, origin)
        self._stated = str(target_config.get("dtype") or target_config.get("torch_dtype")).removeprefix("torch.")
        self._found: dict[str, tuple[Found, torch.dtype, torch.dtype]] = {}
        self._tensors: dict[str, Placed] = {}
        if self._case.facts is not None and not self._case.facts.problems:
            self._tensors = self._case.check_names()
            self._case.check_spare()
            for axis in self._case.facts.axes.values():
                self._case.failures += lacking(self._case.family, axis, self._case.old) if axis.barred else []
        # These stand or fall together.
        self._pairs = list(self._case.pairs(self._tensors)) if self._tensors else []
        self._paired = {tensor.name for layer in self._pairs for tensor, _, _ in layer}

    def look(self, name: str) -> None:
        """Look at a target tensor, which must stand in its file; several threads may call this."""
        # Copies are looked at together, and gains of queries and keys by the layer: once all of them stand.
        if name in self._tensors and name not in self._paired and len(self._tensors[name].copies) < 2:
            self._found[name] = self._look(self._tensors[name])

    def _look(self, tensor: Placed, paired: Found | None = None) -> tuple[Found, torch.dtype, torch.dtype]:
        name, case = tensor.name, self._case
        dtype, old = case.target.dtype(name), case.source.dtype(tensor.like)
        if dtype != old and str(dtype) != f"torch.{self._stated}":
            wrong = f"{name}: dtype {dtype}; required {old}, or the config's dtype {self._stated!r}"
            return Found(wrong, fidelity=""), dtype, old
        try:
            found = paired or case.check(tensor)
            odds = any(atom.role == ODDS for atom in tensor.pattern.atoms())
            if odds and tensor.source is not None and case.facts is not None and not found.wrong:
                found.wrong = check_bias(case.facts.axes, tensor, case.places(tensor), case.target) or None
            return found, dtype, old
        except ValueError as error:
            return Found(f"{name}: {error}"), dtype, old

    def result(self, threads: int | None = None) -> Certificate:
        """The certificate, once every tensor stands; those that nobody asked to look at are looked at now."""
        result = Certificate(list(self._case.failures))
        for layer in self._pairs:
            for name, (_, found) in self._case.check_qk(layer).items():
                self._found[name] = self._look(self._tensors[name], found)
        with _workers(threads) as pool:
            left = [name for name in self._tensors if name not in self._found]
            self._found |= zip(left, pool.map(self._look, [self._tensors[name] for name in left]), strict=True)
        fidelity: Counter[str] = Counter()
        for found, dtype, old in (self._found[name] for name in self._tensors):
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
        facts = self._case.facts
        if facts is not None and result.ok and copied_axes(facts):
            result.copied = True
            result.inseparable = inseparable(facts, list(self._tensors.values()), self._case.target)
        return result
