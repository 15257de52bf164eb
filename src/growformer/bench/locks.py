"""Locks in a folder that processes, perhaps of several machines, share: a file that only one of them can create."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growformer.checkpoint.folder import target_errors

BEAT = 20.0
"""Seconds after which a holder touches its lock again."""

STALE = 600.0
"""Seconds after which a lock that nobody has touched is taken to be left behind."""


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold a lock for the body, if nobody else does.

    A lock whose process is gone (on this machine), or that has not been touched for ten minutes, is taken over.

    Yields:
        Whether it is held.

    Raises:
        TargetError: the folder cannot be written.
    """
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
    with target_errors(path):
        held = _create(path, mine) or (_abandoned(path) and _take_over(path, mine))
    if not held:
        yield False
        return
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, over), daemon=True)
    beating.start()
    try:
        yield True
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == mine:
                path.unlink()


def _create(path: Path, text: str) -> bool:
    """Make the file, whole, unless it is there: a link to a finished file either appears or fails."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text, encoding="utf-8")
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def _abandoned(path: Path) -> bool:
    try:
        holder, age = json.loads(path.read_text(encoding="utf-8")), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False  # given back in this moment; whoever asks again will get it
    except ValueError:
        return True
    if age > STALE:
        return True
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _take_over(path: Path, text: str) -> bool:
    """Put this holder in the place of one that is gone: of several that try, one succeeds.

    The lock is never absent meanwhile, or another process could create it. Whoever holds the gate looks again, since
    the lock may have been taken over before it did.
    """
    gate = path.with_name(f".{path.name}.gate")
    if not _create(gate, text):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - gate.stat().st_mtime > STALE:  # of a process that was killed in these few lines
                gate.unlink()
        return False
    try:
        if not _abandoned(path):
            return False
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        return True
    finally:
        gate.unlink()


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
