"""A Family as python source, in the style of growformer.families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from typing import Any

from growformer.algebra import Family
from growformer.drafts.draft import Draft

_WIDE = 118


def source_of(draft: Draft) -> str:
    """The source of a module with the draft's literal; what was guessed stands in comments above it."""
    family = draft.family
    name = family.name.upper().replace("-", "_").replace(".", "_")
    used: set[str] = set()
    body = _literal(family, 0, used)
    head = [f'"""{family.name}: a draft, read off probes of transformers\' own classes; check every line."""', ""]
    if "Fraction" in used:
        head += ["from fractions import Fraction", ""]
    algebra = sorted(used - {"Fraction"})
    line = f"from growformer.algebra import {', '.join(algebra)}"
    if len(line) > _WIDE:
        line = "from growformer.algebra import (\n" + "".join(f"    {word},\n" for word in algebra) + ")"
    head += [line, ""]
    head += [f"# ? {guess}" for guess in draft.guesses]
    return "\n".join([*head, f"{name} = {body}", ""])


def _literal(value: Any, depth: int, used: set[str]) -> str:
    flat = _flat(value, used)
    if len(flat) + 4 * depth < _WIDE - 40 and not isinstance(value, Family):
        return flat
    pad, end = "    " * (depth + 1), "    " * depth
    if is_dataclass(value) and not isinstance(value, type):
        used.add(type(value).__name__)
        rows = [f"{pad}{k}={_literal(v, depth + 1, used)},\n" for k, v in _given(value)]
        return f"{type(value).__name__}(\n{''.join(rows)}{end})"
    if isinstance(value, Mapping):
        rows = [f"{pad}{_flat(k, used)}: {_literal(v, depth + 1, used)},\n" for k, v in value.items()]
        return f"{{\n{''.join(rows)}{end}}}"
    if isinstance(value, (tuple, list)):
        rows = [f"{pad}{_literal(v, depth + 1, used)},\n" for v in value]
        a, b = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        return f"{a}\n{''.join(rows)}{end}{b}"
    return flat


def _flat(value: Any, used: set[str]) -> str:
    if isinstance(value, Fraction):
        used.add("Fraction")
        return f"Fraction({value.numerator}, {value.denominator})"
    if is_dataclass(value) and not isinstance(value, type):
        used.add(type(value).__name__)
        inner = []
        for i, (k, v) in enumerate(_given(value)):
            said = _flat(v, used)
            positional = i == 0 and k == fields(value)[0].name
            inner.append(said if positional else f"{k}={said}")
        return f"{type(value).__name__}({', '.join(inner)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flat(k, used)}: {_flat(v, used)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        inner = [_flat(v, used) for v in value]
        return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(_flat(v, used) for v in value)}]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return repr(value)


def _given(value: Any) -> list[tuple[str, Any]]:
    """A dataclass's fields that are not at their defaults."""
    out = []
    for item in fields(value):
        mine = getattr(value, item.name)
        default = item.default if item.default is not MISSING else None
        if item.default_factory is not MISSING:
            default = item.default_factory()
        if mine != default or (item.default is MISSING and item.default_factory is MISSING):
            out.append((item.name, mine))
    return out
