"""Which module of a grown model is which of the old one: by their parameters, for layers change their places."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from growformer.errors import SourceError


def pair_modules(
    old: torch.nn.Module, new: torch.nn.Module, names: Mapping[str, str], *, once: bool = True
) -> dict[str, str]:
    """Pair the modules of two models.

    Modules are a pair whose parameters are, and so are the modules around them; modules without parameters are paired
    by name within a pair.

    Args:
        old, new: the models.
        names: for parameters of `new`, the parameter of `old` that they continue.
        once: each module of `old` has one partner (otherwise, for what a new layer is like, it may have more).

    Returns:
        By paths in `new`, paths in `old`.

    Raises:
        SourceError: parameters of one module continue those of several.
    """
    pairs: dict[str, str] = {}
    taken: dict[str, str] = {}

    def pair(there: str, here: str) -> None:
        known = pairs.setdefault(there, here)
        back = taken.setdefault(here, there) if once else there
        if known != here or back != there:
            raise SourceError(
                f"{there or 'the model'} would continue both {known or 'the model'} and {here or 'the model'}, and "
                f"{here} would go on in {back} and {there}; grow the saved checkpoint instead"
            )

    for there, here in names.items():
        one, other = _above(there), _above(here)
        while one not in pairs or pairs[one] != other:
            pair(one, other)
            if not one or not other:
                break
            one, other = _above(one), _above(other)
    olds = dict(old.named_modules(remove_duplicate=False))
    for path, _ in new.named_modules(remove_duplicate=False):
        if not path or path in pairs or _above(path) not in pairs:
            continue
        here = _joined(pairs[_above(path)], path.rpartition(".")[2])
        if here in olds and not (once and here in taken):
            pair(path, here)
    return pairs


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
