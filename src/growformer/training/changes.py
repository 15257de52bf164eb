"""Changes that can be taken back: a growth in a live run is made whole, or not at all."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

_ABSENT = object()


class Changes:
    """A context in which every change is written down, and taken back in reverse order if an error leaves it."""

    def __init__(self) -> None:
        self._undo = ExitStack()  # goes on to the last of them, whatever fails on the way

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._undo.pop_all()
        else:
            self._undo.close()

    def put(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """mapping[key] = value."""
        before = mapping.get(key, _ABSENT)
        if before is _ABSENT:
            self._undo.callback(mapping.pop, key, None)
        else:
            self._undo.callback(mapping.__setitem__, key, before)
        mapping[key] = value

    def drop(self, mapping: MutableMapping[Any, Any], key: Any) -> None:
        """Take a key out of a mapping, if it is there."""
        before = dict(mapping)
        self._undo.callback(_refill, mapping, before)
        mapping.pop(key, None)

    def refill(self, mapping: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
        """Give a mapping, which stays the same object, another content and order."""
        before = dict(mapping)
        self._undo.callback(_refill, mapping, before)
        _refill(mapping, content)

    def relist(self, items: list[Any], content: list[Any]) -> None:
        """Give a list, which stays the same object, another content."""
        before = list(items)
        self._undo.callback(items.__setitem__, slice(None), before)
        items[:] = content

    def fill(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Give a parameter, which stays the same object, other values."""
        before = parameter.detach().clone()
        self._undo.callback(parameter.data.copy_, before)
        parameter.data.copy_(values)

    def swap(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Exchange what two tensors are; every reference to `old` then sees what was `new`."""
        torch.utils.swap_tensors(old, new)
        self._undo.callback(torch.utils.swap_tensors, old, new)


def _refill(mapping: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
    mapping.clear()
    mapping.update(content)
