"""A family under check: where it comes from, and its tiny stock models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growformer.algebra import Family, Unlike, assigned, lookup
from growformer.checkpoint.stock import class_named, full_config
from growformer.errors import PatternError, RequestError, SourceError
from growformer.families import FAMILIES

Fields = Mapping[str, Any]


def load_family(name: str) -> Family:
    """A family by name, or the one literal in a newcomer's Python file.

    The file is executed: it is the caller's own program, and nobody else's should be given.

    Raises:
        RequestError: no family has that name, or the file holds none or several.
        SourceError: the file cannot be run.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    path = Path(name)
    if path.suffix != ".py":
        raise RequestError(f"family {name!r} is unknown; there are {', '.join(FAMILIES)} (or the path of a FILE.py)")
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"newcomer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise SourceError(f"{path}: it cannot be run: {type(error).__name__}: {error}") from error
    known = {id(family) for family in FAMILIES.values()}
    found = {id(x): x for x in vars(module).values() if isinstance(x, Family) and id(x) not in known}
    if len(found) != 1:
        names = ", ".join(family.name for family in found.values())
        raise RequestError(f"{path}: one Family literal is expected; it holds {names or 'none'}")
    return next(iter(found.values()))


@contextmanager
def serving(family: Family) -> Iterator[None]:
    """Meanwhile the API serves `family`, and no other, for its model types."""
    before = dict(FAMILIES)
    for name, other in before.items():
        if set(other.model_types) & set(family.model_types):
            del FAMILIES[name]
    FAMILIES[family.name] = family
    try:
        yield
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def stock_named(architecture: str) -> Any:
    """The stock class of that name.

    Raises:
        RequestError: the installed transformers has none.
    """
    found = class_named(architecture)
    if found is None:
        raise RequestError(f"architecture {architecture}: the installed transformers has no such class")
    return found


def raw_config(family: Family, architecture: str, changes: Fields | None = None) -> dict[str, Any]:
    """What config.json of a tiny model holds.

    Args:
        family: its `sample` is the config.
        architecture: the class.
        changes: to the sample; names may have dots.

    Raises:
        RequestError: the config class refuses it, in its own words.
    """
    fields: dict[str, Any] = dict(family.sample)
    for name, value in (changes or {}).items():
        fields = assigned(fields, name, value)
    cls = stock_named(architecture).config_class
    try:
        config = cls(**fields)
    except Exception as error:  # each config class raises what it likes
        raise RequestError(f"{cls.__name__} refuses the sample: {error}") from error
    return {**config.to_dict(), "architectures": [architecture]}


def variants(family: Family, full: Fields) -> dict[str, dict[str, Any]]:
    """Changes to the sample that turn on what its config leaves off: switches of biases, ties, other layouts.

    Args:
        family: as it is declared.
        full: the sample's config, defaults filled in.

    Returns:
        By a name that says what is changed.
    """
    here = family.of(full)
    switches = [*dict.fromkeys(here.optional.values()), *family.neutral]
    flips = {name: not lookup(full, name) for name in switches if isinstance(lookup(full, name), bool)}
    biases = {name: value for name, value in flips.items() if name in here.optional.values()}
    asked: list[dict[str, Any]] = [biases, *({name: value} for name, value in flips.items())]
    if family.tied is not None and isinstance(lookup(full, family.tied.field), bool):
        asked.append({family.tied.field: not lookup(full, family.tied.field)})
    for conditions, _ in family.when:
        if "architectures" not in conditions and not any(isinstance(value, Unlike) for value in conditions.values()):
            asked += [dict(conditions), {**biases, **conditions}]
    asked += [dict(changes) for changes in getattr(family, "variants", ())]
    found = {}
    for changes in asked:
        new = {name: value for name, value in changes.items() if lookup(full, name) != value}
        if new:
            found[", ".join(f"{name}={value}" for name, value in new.items())] = new
    return found


def save_tiny(
    family: Family, architecture: str, folder: Path, dtype: str = "float64", changes: Fields | None = None
) -> Path:
    """A tiny stock checkpoint with every parameter random; gains around 1, so that none is at its default.

    Args:
        family: its `sample` is the config.
        architecture: the class.
        folder: to write.
        dtype: of the files; the numbers are the same, rounded.
        changes: to the sample.

    Returns:
        The folder.
    """
    import torch
    import transformers

    raw = raw_config(family, architecture, changes)
    cls = stock_named(architecture)
    model = cls(cls.config_class.from_dict(raw))
    generator = torch.Generator().manual_seed(0)
    stored = set(model.state_dict())
    # Scores that nothing divides by the head size would saturate the softmax, which then magnifies every rounding.
    divided = all(attention.scaled for attention in family.attentions)
    here = family.of(full_config(raw)[0])
    spread = 0.3 if divided or "q" in family.norms else 0.15
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in stored or not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            level = _level(here, name, divided) if tensor.dim() == 1 else 0.0
            tensor.copy_(level * (1 + 0.3 * drawn) if level else spread * drawn)
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.eval().to(getattr(torch, dtype)).save_pretrained(folder)
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()
    return folder


def _level(family: Family, name: str, divided: bool) -> float:
    """About what a vector of a sample is: gains, and numbers that multiply a layer's output, are drawn around 1.

    Where nothing divides the scores, keys under a norm are smaller instead, as they are in models that were trained.
    """
    try:
        pattern = family.find(family.full_name(name, family.prefix))[1]
    except PatternError:  # a class may have other names for its tensors than its files
        return float(name.endswith("weight"))
    keys = any(atom.stand == "gain" and family.side(atom.role) == "k" for atom in pattern.atoms())
    if keys and not divided:
        return 0.3
    return float(name.endswith("weight") or family.passes(pattern))
