"""Does every tensor of a family's stock models have one pattern, of its shape, and every pattern a tensor?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from growformer.algebra import WILD, Atom, Family, NamePattern, TensorPattern, lookup
from growformer.algebra.sizes import fields_of
from growformer.api.checks.samples import raw_config, variants
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.errors import GrowformerError, PatternError
from growformer.planning.config import BASE_FIELDS, known_fields
from growformer.planning.cover import stored_dims
from growformer.planning.sizes import size_of


@dataclass
class Cover:
    """What was found.

    Attributes:
        samples: by sample, how many tensors were covered.
        problems: one sentence each.
        gaps: the same of variants of the sample: configs that growth refuses, for tensors and patterns do not fit.
        undeclared: config fields without a fact.
        changes: the variants of the sample that the class takes, by name.
    """

    samples: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    undeclared: tuple[str, ...] = ()
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


def cover_family(family: Family) -> Cover:
    """Build every architecture's sample, and its variants, on the meta device, and hold the patterns against them."""
    found = Cover()
    used: set[tuple[str, str]] = set()
    declared: dict[tuple[str, str], None] = {}
    try:
        full = full_config(raw_config(family, family.architectures[0]))[0]
    except GrowformerError as error:
        found.problems.append(f"{family.architectures[0]}: {error}")
        return found
    broken = undeclared_names(family.of(full), full)
    if broken:
        found.problems += broken
        return found  # nothing can be asked of a literal that speaks of what it does not declare
    found.problems += _same_sizes(family.of(full), full)
    known = BASE_FIELDS | known_fields(family.of(full))
    defaults = full_config(raw_config(family, family.architectures[0]))[1]
    found.undeclared = tuple(sorted(n for n in defaults if n not in known and not _reached(known, n)))
    asked: dict[str, dict[str, Any]] = {"": {}, **variants(family, full)}
    for (label, changes), architecture in itertools.product(asked.items(), family.architectures):
        what = architecture + (f" with {label}" if label else "")
        problems = found.gaps if label else found.problems
        try:
            raw = raw_config(family, architecture, changes)
            shapes = stock_tensors(raw, "the sample")
        except GrowformerError as error:
            # A variant may be one that the class does not take; the sample itself must be.
            if not label:
                problems.append(f"{what}: {error}")
            continue
        full = full_config(raw)[0]
        here = family.of(full)
        declared |= dict.fromkeys((name, text) for name, text in {**here.tensors, **here.tasks}.items())
        odd = any(lookup(full, name) != value for name, value in here.requires.items())
        # A class may take a field for others that it is told by, and not keep it.
        if odd or any(lookup(full, name) not in (value, None) for name, value in changes.items()):
            continue
        try:
            hits = _hold(here, full, shapes, what, problems)
        except (PatternError, TypeError) as error:
            problems.append(f"{what}: the literal is broken: {type(error).__name__}: {error}")
            continue
        found.samples[what] = len(shapes)
        if label and (hits - used or _switches(family, changes)):
            found.changes.setdefault(label, changes)
        used |= hits
    for name, text in declared:
        if (name, text) in used or text is None:
            continue
        said = f"no architecture has a tensor {name}: {text!r}, under any variant of the sample"
        # What only checkpoints of other versions hold is no tensor of the installed classes.
        aside = name in family.uneven and not NamePattern(name).axes
        (found.gaps if aside else found.problems).append(said)
    return found


def undeclared_names(family: Family, full: Mapping[str, Any]) -> list[str]:
    """Axes, norms and config fields that the facts of a family name and nothing declares, one sentence each."""
    out = []
    facts: dict[str, tuple[str | None, ...]] = {f"norm {role!r}": norm.axes for role, norm in family.norms.items()}
    for i, a in enumerate(family.attentions):
        turned = (a.rotary.axis,) if a.rotary is not None else ()
        facts[f"attention {i + 1}"] = (a.heads, a.kv_heads, a.group, *a.key, a.value, *turned)
    if family.experts is not None:
        facts["experts"] = (family.experts.axis,)
    facts |= {"streams": family.streams, "layers": family.layers, "copied": tuple(family.copied)}
    facts |= {f"power {role!r}": (power.axis,) for role, power in family.powers.items()}
    facts |= {f"frozen {i + 1}": frozen.axes for i, frozen in enumerate(family.frozen)}
    for name, pattern in family.patterns:
        inner = [str(atom.axis) for dim in pattern.dims if dim.atom is None for atom in dim.atoms()]
        if WILD in inner:
            out.append(f"tensor {name.text}: {pattern.text!r} has {WILD} inside a product or a sum; it is a whole dim")
        facts[f"tensor {name.text}"] = (
            *name.axes,
            *(str(atom.axis) for atom in pattern.atoms() if not isinstance(atom.axis, int) and atom.axis != WILD),
        )
    for what, axes in facts.items():
        lost = [axis for axis in dict.fromkeys(axes) if axis is not None and axis not in family.axes]
        out += [f"{what} names the axis {axis!r}, which `axes` does not declare" for axis in lost]
    for axis, size in family.axes.items():
        try:
            size_of(size, full)
        except (TypeError, GrowformerError):
            lost = [name for name in sorted(fields_of(size)) if not isinstance(lookup(full, name), int)]
            out.append(
                f"axis {axis!r} takes its size from {' and '.join(lost)}, which the sample's config does not have"
            )
    if family.tied is not None and family.tied.norm not in family.norms:
        out.append(f"tied names the norm {family.tied.norm!r}, which `norms` does not declare")
    return out


def _switches(family: Family, changes: Mapping[str, Any]) -> bool:
    """Whether a variant changes facts of the family, and not its tensors alone."""
    tied = family.tied is not None and family.tied.field in changes
    return tied or any(set(conditions) & set(changes) for conditions, _ in family.when)


def _reached(known: frozenset[str] | set[str], name: str) -> bool:
    return any(one.startswith(f"{name}.") for one in known)


def _same_sizes(family: Family, full: Mapping[str, Any]) -> list[str]:
    """Axes of one size in the sample though no field says so: their patterns could be mixed up unseen."""
    sizes: dict[int, list[str]] = {}
    for axis, declared in family.axes.items():
        # Layers are an index, not the size of any dim.
        if axis not in family.layers:
            sizes.setdefault(size_of(declared, full), []).append(axis)
    out = []
    for size, axes in sizes.items():
        if len({repr(family.axes[axis]) for axis in axes}) > 1:
            out.append(f"sample: {' and '.join(axes)} have one size, {size}; sizes must be pairwise different")
    return out


def _hold(
    family: Family, full: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str, problems: list[str]
) -> set[tuple[str, str]]:
    """Hold the patterns of a family, as a config has it, against one stock model's tensors; those that were used."""
    texts = {**family.tensors, **family.tasks}
    names = {name.text: name for name, _ in family.patterns}
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in shapes)
    prefix = family.prefix if bare else ""
    hits: dict[str, set[tuple[int, ...]]] = {}
    for disk, shape in shapes.items():
        name = family.full_name(disk, prefix)
        if family.drops(name):
            continue
        try:
            pattern_name, pattern, index = family.find(name)
            wanted = _shape(family, full, pattern_name, pattern)
        except PatternError as error:
            problems.append(f"{what}: {error}")
            continue
        except KeyError as error:
            problems.append(f"{what}: tensor {disk!r}: its pattern has an axis {error} that is not declared")
            continue
        hits.setdefault(pattern_name.text, set()).add(tuple(index.values()))
        if len(wanted) != len(shape) or any(n not in (None, m) for n, m in zip(wanted, shape, strict=True)):
            given = [WILD if n is None else n for n in wanted]
            problems.append(f"{what}: tensor {disk!r} is {list(shape)}, and its pattern {pattern.text!r} gives {given}")
    may_lack = {*family.uneven, *family.tasks, *([family.tied.head] if family.tied is not None else [])}
    for text in texts:
        have = hits.get(text, set())
        switch = family.optional.get(text)
        outside = bool(prefix) and not text.startswith(prefix)
        counts = [range(size_of(family.axes[axis], full)) for axis in names[text].axes]
        wanted_at = {index for index in itertools.product(*counts) if names[text].has(index)}
        if switch is not None and wanted_at and not outside and bool(have) != bool(lookup(full, switch)):
            said = "some" if have else "none"
            problems.append(f"{what}: {switch}={lookup(full, switch)!r}, and the model has {said} of {text}")
        if (switch is not None and not have) or text in may_lack or outside:
            continue
        lacking = wanted_at - have
        if lacking:
            problems.append(f"{what}: the model has no tensor {text} at {sorted(lacking)[0]} (or it is `uneven`)")
    return {(text, texts[text]) for text in hits}


def _shape(family: Family, full: Mapping[str, Any], name: NamePattern, pattern: TensorPattern) -> list[int | None]:
    """The shape that a pattern means; None for a dim that stays as the checkpoint has it."""

    def size(atom: Atom) -> int:
        return atom.axis if isinstance(atom.axis, int) else size_of(family.axes[atom.axis], full)

    return [
        None if dim.atom is not None and dim.atom.axis == WILD else dim.size(size) for dim in stored_dims(name, pattern)
    ]
