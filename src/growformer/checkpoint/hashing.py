"""SHA-256 of large files beside other work: of those that are there, and of those that are being written."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from growformer.algebra.scratch import Scratch
from growformer.checkpoint._header import pread_into
from growformer.checkpoint.folder import target_errors
from growformer.checkpoint.writer import OpenFile

CHUNK = 4 << 20
"""Bytes that are read and hashed at once."""

FLUSH = 256 << 20
"""Bytes after which what is written is forced to disk, so that the disk is at work from the beginning."""


class _Stopped(Exception):
    """Nobody wants the hash any more."""


class Hashes:
    """SHA-256 of whole files, one after another, in a thread of its own; leaving the context ends it at once."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hashes")
        self._found: dict[Path, Future[str]] = {path: self._pool.submit(self._hash, path) for path in paths}

    def _hash(self, path: Path) -> str:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            return _sha256(path, descriptor, size, self._go_on)
        finally:
            os.close(descriptor)

    def _go_on(self, end: int) -> None:
        if self._stop.is_set():
            raise _Stopped

    def result(self) -> dict[Path, str]:
        """The hashes, waited for.

        Raises:
            SourceError: a file was cut meanwhile.
        """
        return {path: future.result() for path, future in self._found.items()}

    def __enter__(self) -> Hashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _sha256(path: Path, descriptor: int, size: int, until: Callable[[int], object]) -> str:
    """SHA-256 of a file; `until` is called before each chunk with the place where it ends."""
    found, buffer, at = hashlib.sha256(), Scratch().array("chunk", (CHUNK,), "uint8").data, 0
    while at < size:
        part = buffer[: min(CHUNK, size - at)]
        until(at + len(part))
        pread_into(path, descriptor, at, part)
        found.update(part)
        at += len(part)
    return found.hexdigest()


class Trail:
    """What follows the writers of files: their hashes, and the early way to disk.

    Bytes may be written in any order; they are hashed in that of the file, as far as it has no hole. Every `FLUSH`
    bytes the files are forced to disk, and the page cache lets go of what has been hashed and released: a run needs no
    more of the machine's memory than it was given, and does not push out what others keep there.

    Args:
        files: the files, in the order in which they fill.
    """

    def __init__(self, files: Iterable[OpenFile]) -> None:
        self._files = list(files)
        self._written = {file.path: _Frontier(file.begin) for file in self._files}
        self._released = {file.path: _Frontier(file.begin) for file in self._files}
        self._hashed = {file.path: 0 for file in self._files}
        self._dropped = {file.path: 0 for file in self._files}
        self._news = threading.Condition()
        self._stopped, self._fresh = False, 0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="trail")
        self._hashes = self._pool.submit(self._hash_all)
        self._flushes = self._pool.submit(self._flush_all)

    def written(self, path: Path, start: int, stop: int) -> None:
        """Say that these bytes stand, and will not change."""
        with self._news:
            self._written[path].add(start, stop)
            self._fresh += stop - start
            self._news.notify_all()

    def released(self, path: Path, start: int, stop: int) -> None:
        """Say that nobody is about to read these bytes again."""
        with self._news:
            self._released[path].add(start, stop)

    def result(self) -> dict[Path, str]:
        """The hash of each file, waited for; all bytes must have been written.

        Raises:
            TargetError: a file could not be forced to disk (the system says so once, and it was said here).
        """
        found = self._hashes.result()
        self._stop()
        self._flushes.result()
        return found

    def _stop(self) -> None:
        with self._news:
            self._stopped = True
            self._news.notify_all()

    def _hash_all(self) -> dict[Path, str]:
        return {file.path: self._hash(file) for file in self._files}

    def _hash(self, file: OpenFile) -> str:
        def until(end: int) -> None:
            with self._news:
                self._hashed[file.path] = end - CHUNK
                self._news.wait_for(lambda: self._stopped or self._written[file.path].at >= end)
                if self._stopped:
                    raise _Stopped

        found = _sha256(file.path, file.descriptor, file.size, until)
        self._hashed[file.path] = file.size
        return found

    def _flush_all(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._stopped or self._fresh >= FLUSH)
                if self._stopped:
                    return
                self._fresh = 0
            for file in self._files:
                self._flush(file)

    def _flush(self, file: OpenFile) -> None:
        done = self._dropped[file.path]
        end = min(self._hashed[file.path], self._released[file.path].at, self._written[file.path].at)
        if done < file.size and self._written[file.path].at > file.begin:
            with target_errors(file.path):
                os.fdatasync(file.descriptor)
            if end > done and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.descriptor, done, end - done, os.POSIX_FADV_DONTNEED)
                self._dropped[file.path] = end

    def __enter__(self) -> Trail:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._pool.shutdown()


class _Frontier:
    """Up to where a file has no hole."""

    def __init__(self, at: int) -> None:
        self.at = at
        self._beyond: dict[int, int] = {}

    def add(self, start: int, stop: int) -> None:
        if start < stop:
            self._beyond[start] = stop
        while self.at in self._beyond:
            self.at = self._beyond.pop(self.at)
