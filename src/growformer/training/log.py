"""The log of a run: one JSON object a line; a run that resumes goes on behind its checkpoint's last line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from growformer.checkpoint.folder import target_errors
from growformer.errors import SourceError


class Log:
    """An open log.

    Args:
        path: the file.
        length: bytes of it that belong to the run so far; what a killed run wrote after them is cut off.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        with target_errors(path):
            self._file = path.open("ab")
            if self._file.tell() < length:
                raise SourceError(f"{path}: has {self._file.tell()} bytes, and its checkpoint knows of {length}")
            self._file.truncate(length)
            self._file.seek(length)

    def write(self, kind: str, **values: Any) -> None:
        """Add a line."""
        with target_errors(self.path):
            self._file.write((json.dumps({"kind": kind, **values}) + "\n").encode())
            self._file.flush()

    def length(self) -> int:
        """Bytes of it, all of them on disk."""
        with target_errors(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def growth_line(
    step: int,
    to: Mapping[str, int],
    parameters: Sequence[int],
    bits_per_byte: tuple[float, float],
    proof: Mapping[str, Any] | None,
    changes: Sequence[str] = (),
) -> str:
    """What is said of a growth to people.

    Args:
        step: after which it came.
        to: the new sizes.
        parameters: how many there were and are.
        bits_per_byte: held out, before and after.
        proof: as JSON; None: there was none.
        changes: what makes another function of the model.
    """
    sizes = ", ".join(f"{name}={size}" for name, size in to.items())
    said = f"another function, as asked for ({changes[0]})" if changes else "not proved"
    if proof is not None:
        measured = proof["measured"]
        said = (
            f"proved: logits in float64 differ by {measured['algebra']['relative']:.1e}; "
            f"{sum(measured['alive']['dead'].values())} of {measured['alive']['new_entries']:,} new entries dead"
        )
    return (
        f"Step {step:,}: grown to {sizes} ({parameters[0]:,} -> {parameters[1]:,} parameters)\n"
        f"    held out {bits_per_byte[0]:.6f} -> {bits_per_byte[1]:.6f} bits per byte; {said}"
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """All lines of a log.

    Raises:
        SourceError: it cannot be read, or holds something else.
    """
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"{path}: cannot be read as a log: {error}") from error
