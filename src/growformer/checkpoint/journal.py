"""The journal of a run: which rows of which tensor are written, with a checksum, so that a killed run can go on."""

import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growformer.checkpoint.folder import target_errors

JOURNAL = ".growformer-journal"

Done = Mapping[tuple[str, int, int], int]
"""Checksum by (tensor, first row, last row + 1)."""


class Journal:
    """A file of one JSON line for what the run is, and one for each finished block.

    A line is appended after its block is written, by one `write` call; a line that a crash cut short counts as none.

    Args:
        folder: the unfinished output.
        run: everything that the output's bytes depend on; a journal of another run is thrown away.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.done: Done = {}
        first = json.dumps(run, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        if lines and lines[0] == first:
            self.done = dict(entry for line in lines[1:-1] if (entry := _entry(line)) is not None)
        with target_errors(self.path):
            # Cut to its whole lines, so that the next one begins on a line of its own.
            kept = [first, *(_line(*key, crc) for key, crc in self.done.items())]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._lock = threading.Lock()

    def add(self, name: str, start: int, stop: int, crc: int) -> None:
        """Say that a block is written."""
        with self._lock, target_errors(self.path):
            os.write(self._descriptor, (_line(name, start, stop, crc) + "\n").encode())

    def close(self, *, remove: bool) -> None:
        """Close the journal, and take it away once the output is whole."""
        os.close(self._descriptor)
        if remove:
            self.path.unlink()


def checksum(data: "bytes | memoryview") -> int:
    """CRC-32 of a block: it guards against blocks that a crash left unwritten, not against an adversary."""
    return zlib.crc32(data)


def _line(name: str, start: int, stop: int, crc: int) -> str:
    return json.dumps([name, start, stop, crc])


def _entry(line: str) -> tuple[tuple[str, int, int], int] | None:
    try:
        name, start, stop, crc = json.loads(line)
    except ValueError:
        return None
    return (name, start, stop), crc
