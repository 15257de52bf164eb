"""Text that every Python ships: the standard library's own source, as bytes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from growformer.errors import SourceError

SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "__pycache__"})
"""Folders left out: tests (often not installed), what users installed, and what some systems package apart."""

SHARE = 10
"""One file in so many is held out."""


@dataclass(frozen=True)
class Text:
    """Text split by file.

    Attributes:
        train, held_out: uint8 [byte], the files of each part one after the other.
        files: how many files each part has.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    files: tuple[int, int]


def is_held_out(name: str) -> bool:
    """Whether the file of this name is held out: by a hash of the name, so the same on every machine and release."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % SHARE == 0


def library_text(root: Path | None = None) -> Text:
    """The source text of Python's standard library, split into training files and held-out files.

    Args:
        root: the folder to read `*.py` files from, with its subfolders; None: this Python's standard library.

    Raises:
        SourceError: one of the two parts is empty.
    """
    root = root or Path(os.__file__).parent
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(found):
        if SKIP.isdisjoint(name.split("/")) and found[name].is_file():
            parts[is_held_out(name)].append(found[name].read_bytes())
    if not all(parts):
        raise SourceError(
            f"{root}: {len(parts[0])} training and {len(parts[1])} held-out files of Python source; the demo needs "
            "both (a Python whose standard library is packed into an archive has none)"
        )
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return Text(train, held_out, (len(parts[0]), len(parts[1])))


def windows(data: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Pieces of the text.

    Args:
        data: uint8 [byte].
        starts: int64 [sequence], the first byte of each piece.
        length: bytes of a piece.

    Returns:
        int64 [sequence, position].
    """
    return data[starts[:, None] + torch.arange(length)].long()


def spread(data: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` pieces of `length` bytes spread evenly over the text: int64 [sequence, position]."""
    starts = torch.linspace(0, len(data) - length, count, dtype=torch.float64).long()
    return windows(data, starts, length)
