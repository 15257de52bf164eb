"""The other classes of a config (the bare model, task heads): which share the body of the one that is drafted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

OWN = ":"
"""Stands between a class and the name of a parameter that is no other class's, though it may be called the same."""


@dataclass(frozen=True)
class Beside:
    """A class that shares the body of the one that is drafted.

    Attributes:
        name: the class.
        lead: what its names on disk leave out (the prefix of a bare model), or "".
        fresh: the names, in full, of tensors that no class before it has.
        headed: it has tensors that the bare model lacks.
    """

    name: str
    lead: str = ""
    fresh: tuple[str, ...] = ()
    headed: bool = False

    @property
    def shows(self) -> bool:
        """Whether a run of it may show what no run before did."""
        return self.headed or bool(self.fresh)


@dataclass(frozen=True)
class Classes:
    """The classes of a config.

    Attributes:
        bare: the names, in full, of the tensors of the bare model; empty where there is none.
        beside: those that share the body.
        apart: by class, why it is left out.
    """

    bare: frozenset[str] = frozenset()
    beside: tuple[Beside, ...] = ()
    apart: dict[str, str] = field(default_factory=dict)


def named_classes(config_class: type) -> tuple[str, ...]:
    """The classes that transformers' own tables have for a config, the bare model first."""
    from transformers.models.auto import modeling_auto

    tables = [modeling_auto.MODEL_MAPPING]
    tables += [t for n, t in vars(modeling_auto).items() if n.startswith("MODEL_FOR_") and n.endswith("_MAPPING")]
    found: dict[str, None] = {}
    for table in tables:
        if config_class in table:
            of = table[config_class]
            found |= dict.fromkeys(cls.__name__ for cls in (of if isinstance(of, tuple) else (of,)))
    return tuple(found)


def classes_of(main: Any, names: frozenset[str], names_of: Callable[[str], Collection[str]]) -> Classes:
    """The classes beside a model's own.

    Args:
        main: the model that is drafted.
        names: of its tensors on disk.
        names_of: of a class, the names of its model's tensors on disk.
    """
    prefix = f"{main.base_model_prefix}." if main.base_model_prefix else ""
    held: dict[str, dict[str, str]] = {}  # by class, names in full to names on disk
    apart: dict[str, str] = {}
    every = named_classes(type(main.config))
    for name in (n for n in every if n != type(main).__name__):
        try:
            disks = tuple(names_of(name))
        except Exception as error:  # whatever a class raises, it is a no
            apart[name] = f"it does not build with this config ({type(error).__name__})"
            continue
        bare = prefix and any(n.startswith(prefix) for n in names) and not any(n.startswith(prefix) for n in disks)
        # A head of a bare model keeps its name: only what the model that is drafted knows by the prefix has it.
        held[name] = {(prefix if bare else "") + disk: disk for disk in disks}
    body = frozenset(held[every[0]]) if every and every[0] in held else frozenset[str]()
    shared = body & names
    out: list[Beside] = []
    seen = set(names)
    for name, both in held.items():
        lacks = sorted(shared - both.keys())
        if lacks or not shared:
            apart[name] = f"it has no {lacks[0]}" if lacks else "its names are others"
            continue
        lead = next((full[: -len(disk)] for full, disk in both.items()), "")
        fresh = tuple(full for full in both if full not in seen)
        seen |= {full for full in fresh if full in body}  # heads of two classes may be called the same
        out.append(Beside(name, lead, fresh, bool(both.keys() - body)))
    return Classes(body if shared else frozenset(), tuple(out), apart)


def share(main: Mapping[str, Any], model: Any, lead: str) -> dict[str, Any]:
    """Give a model the parameters that it shares.

    Args:
        main: parameters and buffers of the models before it, by their names in full.
        model: the one that takes them.
        lead: what its names leave out.

    Returns:
        Its own parameters and buffers, by their names in full.
    """
    own: dict[str, Any] = {}
    for kind in ("_parameters", "_buffers"):
        for path, module in model.named_modules():
            for leaf, x in list(getattr(module, kind).items()):
                full = f"{lead}{path}.{leaf}" if path else f"{lead}{leaf}"
                known = main.get(full)
                if known is not None and x is not None and known.shape == x.shape:
                    getattr(module, kind)[leaf] = known
                elif x is not None:
                    own[full] = x
    return own


def own_name(name: str, full: str, body: Collection[str]) -> str:
    """The name of a parameter of the class `name`: in full in the body, else with the class before it."""
    return full if full in body else f"{name}{OWN}{full}"
