"""Which classes a draft serves, and the tensors that only some of them have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from growformer.algebra import Family, TensorPattern
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.drafts.attending import Attending
from growformer.drafts.classes import Classes, classes_of
from growformer.drafts.probe import Probe, build_meta, ends, quiet
from growformer.errors import GrowformerError

When = tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]


def classes_beside(base: Probe) -> Classes:
    """The classes that share the body of a model that was built."""

    def names(cls: str) -> list[str]:
        with quiet():
            return list(stock_tensors({**base.raw, "architectures": [cls]}))

    return classes_of(base.model, frozenset(base.shapes), names)


class Heads(Attending):
    """Adds the tensors of task heads, and the classes that have them."""

    def _tasks(self, tensors: dict[str, str]) -> tuple[dict[str, str], When]:
        """The tensors that some class lacks, with what one class alone calls by the name of another's.

        Args:
            tensors: of the model that is drafted, by pattern name; those that the bare model lacks are taken out. The
                head that may be tied stays: `tied` says who has it.
        """
        tasks: dict[str, str] = {}
        bare = self.base.classes.bare
        for text, disks in self.names.patterns.items() if bare else ():
            place = self.base.places.get(disks[0])
            head = self.head is not None and (place.param if place is not None else disks[0]) == self.head[0]
            if text in tensors and not head and not bare & set(disks):
                tasks[text] = tensors.pop(text)
        odd: dict[str, dict[str, str]] = {}
        for cls, places in self.base.heads.items():
            texts = {disk: self._text(disk, at.param, at.dims, bool(self.norms)) for disk, at in places.items()}
            own = {disk: text for disk, text in texts.items() if tasks.setdefault(disk, text) != text}
            if own:
                odd[cls] = own
        when: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        for cls, own in odd.items():
            changes: dict[str, Any] = {"tasks": own}
            # What writes an axis that this class does not have is no tensor of it either.
            lost = self._pooled({**tensors, **tasks}) - self._pooled({**self._held(cls, tasks), **own})
            if lost:
                gone = [n for n, t in tasks.items() if n not in own and lost & set(TensorPattern.parse(t).axes())]
                changes = {"axes": dict.fromkeys(sorted(lost)), "tasks": {**dict.fromkeys(gone), **own}}
            when.append(({"architectures": [cls]}, changes))
        return tasks, tuple(when)

    def _held(self, cls: str, tasks: Mapping[str, str]) -> dict[str, str]:
        """Those of the tensors of task heads that a class has."""
        beside = next(one for one in self.base.classes.beside if one.name == cls)
        names = {beside.lead + disk for disk in stock_tensors({**self.base.raw, "architectures": [cls]})}
        return {name: text for name, text in tasks.items() if name in names}

    def _pooled(self, tensors: Mapping[str, str]) -> set[str]:
        """The axes that classes beside brought, as far as these tensors name them."""
        named = {a for text in tensors.values() for a in TensorPattern.parse(text).axes()}
        return {a for a in named if self.patterns.axes.kinds.get(a) == "pooled"}

    def _serving(self, family: Family) -> Family:
        """The draft with the classes whose every tensor it covers; the others are guesses' to name."""
        classes = self.base.classes
        served = [family.architectures[0]]
        apart = dict(classes.apart)
        for one in classes.beside:
            if one.shows and one.name not in self.base.heads:
                apart[one.name] = (
                    "its tiny model does not run, or has norms of its own, or another head by the same name"
                )
            elif said := self._uncovered(family, one.name, one.lead):
                apart[one.name] = said
            else:
                served.append(one.name)
        when: list[Any] = [(c, changes) for c, changes in family.when if _class_of(c) in served]
        if "logits" in family.powers:
            when += [
                ({"architectures": [name]}, {"powers": {"logits": None}}) for name in served if not self._headed(name)
            ]
        self.guesses.extend(f"{name} is not served: {said}" for name, said in apart.items())
        return replace(family, architectures=tuple(served), when=tuple(when))

    def _headed(self, cls: str) -> bool:
        """Whether a class has the head that gives logits."""
        with quiet(), torch.device("meta"):
            return ends(build_meta({**self.base.raw, "architectures": [cls]}))[0] is not None

    def _uncovered(self, family: Family, cls: str, lead: str) -> str:
        """What of a class no pattern covers."""
        raw = {**self.base.raw, "architectures": [cls]}
        here = family.of(full_config(raw)[0])
        try:
            with quiet():
                disks = list(stock_tensors(raw))
            for disk in disks:
                here.find(here.full_name(disk, lead))
        except GrowformerError as error:
            return str(error)
        return ""


def _class_of(conditions: Mapping[str, object]) -> str:
    """The class that a condition of the draft's names."""
    named = conditions["architectures"]
    assert isinstance(named, list)
    return str(named[0])
