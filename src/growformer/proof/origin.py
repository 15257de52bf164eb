"""A source of another family as a certificate sees it, by its own reading of the declaration and of the two configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growformer.algebra.becoming import Becoming
from growformer.algebra.family import Family
from growformer.algebra.pattern import NamePattern
from growformer.algebra.sizes import Field, lookup

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """How the source became a model of the target's family.

    Attributes:
        becoming: the declaration, found by the names of the two families.
        defaults: the target's config class as it is without arguments.
    """

    becoming: Becoming
    defaults: Config

    def may_lack(self, at: NamePattern) -> bool:
        """Whether a source may have no tensor that the target's family knows by this name: all but what is renamed."""
        return at.text in self.becoming.new or at.text in self.becoming.tensors

    def like(self, name: str) -> str:
        """The source tensor that a new target tensor is stored as, both by their patterns' names."""
        return self.becoming.new[name] or next(iter(self.becoming.tensors))

    def filled(self, target: Config) -> dict[str, Any]:
        """The target's config with its class's defaults filled in: what it leaves out is not what the source's is."""
        return {**self.defaults, **target}

    def seen(self, family: Family, source: Config, full: Config, target: Config) -> tuple[Config, Config, list[str]]:
        """The source's config as one of the target's family, with one expert that every token takes.

        Args:
            family: the target's.
            source: config.json of the source.
            full: the same with its class's defaults filled in.
            target: config.json of the target.

        Returns:
            (that config, the same with defaults filled in, what has no place in it).
        """
        becoming, experts = self.becoming, family.experts
        problems = [
            f"config field {name}: {lookup(full, name)!r} has no place in {family.name}; required {value!r}"
            for name, value in becoming.requires.items()
            if lookup(full, name) != value
        ]
        if experts is None or experts.whole is None:
            return source, full, [*problems, f"family {family.name}: its experts' weights do not add up to one"]
        lost = {*becoming.idle, *(becoming.requires.keys() - self.defaults.keys())}
        count = family.axes[experts.axis]
        ones = {experts.chosen, *([count.name] if isinstance(count, Field) else [])}
        ones |= {older for older, name in family.aliases.items() if name in ones}
        sizes = {name: lookup(full, of) for name, of in becoming.fields.items()}
        sizes |= {name: target[name] for name in sizes.keys() & self._free(family) if name in target}
        told = {
            **sizes,
            **becoming.sets,
            **experts.whole,
            **dict.fromkeys(ones, 1),
            "model_type": family.model_types[0],
        }
        if full.get("architectures"):
            named = [becoming.architectures.get(name) for name in full["architectures"]]
            problems += [f"family {family.name}: no class like {full['architectures']}"] if None in named else []
            told["architectures"] = named
        seen, whole = ({k: v for k, v in config.items() if k not in lost} | told for config in (source, full))
        return seen, {**self.defaults, **whole}, problems

    def _free(self, family: Family) -> set[str]:
        """The config fields of axes that nothing but new tensors have: any size of them is as good."""
        old: set[str] = set()
        for name, pattern in family.patterns:
            dense = name.text in family.uneven and name.text in self.becoming.tensors  # a layer without experts
            old |= set() if name.text in self.becoming.new or dense else {*pattern.axes(), *name.axes}
        rest = (size for axis, size in family.axes.items() if axis not in old)
        return {size.name for size in rest if isinstance(size, Field)}
