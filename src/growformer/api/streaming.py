"""Run a plan from files to files: bounded memory, several threads, and a journal to go on by."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra.scratch import Scratch
from growformer.checkpoint import FolderWriter, RowReader, TensorFiles, TensorSpec
from growformer.checkpoint.hashing import Trail
from growformer.checkpoint.journal import Journal, checksum
from growformer.checkpoint.writer import as_bytes
from growformer.errors import RequestError, SourceError
from growformer.planning import Applier, Plan, TensorPlan

if TYPE_CHECKING:
    import torch

BUSY = 8
"""A block in the making takes at most this many times its bytes in float32: draws, float64 products, the result."""

BLOCK = 16 << 20
"""Bytes (as float32) of the largest block: larger ones gain nothing and make a killed run repeat more."""

ROW_BYTES = 1 << 20
"""The least that a block is given, whatever the memory."""


def threads_of(threads: int | None) -> int:
    """How many threads to use; None: one for each core, at most 8.

    Raises:
        RequestError: less than one.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"threads={threads}: at least one thread has to do the work")
    return threads or min(8, cores())


def cores() -> int:
    """The cores that this process may use, as far as the system says."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def block_bytes(memory: int, threads: int) -> int:
    """Bytes (as float32) of a block, so that all threads together stay within `memory`."""
    return max(ROW_BYTES, min(BLOCK, memory // (BUSY * threads)))


def fingerprint(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of every file of a source: what tells that it changed under a run."""
    out = {}
    for path in files:
        stat = path.stat()
        out[path.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return out


@dataclass(frozen=True)
class Streamed:
    """What `stream` found on its way.

    Attributes:
        figures: what fills measured, by source tensor.
        hashes: SHA-256 of each file written.
    """

    figures: dict[str, float]
    hashes: dict[Path, str]


def stream(
    plan: Plan,
    files: TensorFiles,
    folder: Path,
    specs: list[TensorSpec],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int,
    memory: int,
    threads: int,
    progress: Callable[[int], None],
    before: Mapping[str, list[int]] | None = None,
    look: Callable[[], Callable[[str], None]] | None = None,
) -> Streamed:
    """Write the target of a plan.

    Args:
        plan: the plan.
        files: the source, open.
        folder: where to write; blocks that a journal in it vouches for are kept.
        specs: the target's tensors with their storage dtypes, in the plan's order.
        dtype: storage dtype of every tensor, as the specs have it; None where each keeps its source's.
        max_shard_bytes: limit of a file's tensors in bytes.
        memory: bytes that the blocks in the making may take together.
        threads: how many work at once.
        progress: told the bytes of each finished block.
        before: the source's `fingerprint` when it was first looked at; None: now.
        look: called once the files are there, empty; what it returns is told the name of each tensor that stands in
            them, in several threads, and may read it before the page cache lets go of it.

    Returns:
        What was found on the way.

    Raises:
        SourceError: the source changed meanwhile, or cannot be read.
        TargetError: the disk refuses.
    """
    stored = {spec.name: spec for spec in specs}
    before = fingerprint(files.files) if before is None else before
    said = hashlib.sha256(plan.dumps().encode()).hexdigest()
    run = {"plan": said, "source": before, "shard": max_shard_bytes, "dtypes": [spec.dtype for spec in specs]}
    applier, scratch = Applier(plan, RowReader(files).read, dtype), Scratch()
    work = _Work(plan, applier, block_bytes(memory, threads))
    with _one_torch_thread(), FolderWriter(folder, specs, max_shard_bytes, resume=True) as writer:
        journal = Journal(folder, run)
        whole = False
        try:
            with Trail(writer.files.values()) as trail, ThreadPoolExecutor(threads) as pool:
                looked = look() if look is not None else None

                def block(tensor: TensorPlan, start: int, stop: int) -> int:
                    spec = stored[tensor.name]
                    known = journal.done.get((tensor.name, start, stop))
                    kept = known is not None and tensor.name in writer.kept
                    if not kept or checksum(writer.read(spec, start, stop - start)) != known:
                        data = as_bytes(applier.piece(tensor, start, stop, scratch))
                        writer.write(spec, start, data)
                        journal.add(tensor.name, start, stop, checksum(data))
                    trail.written(*writer.extent(spec, start, stop - start))
                    if work.last(tensor.name):
                        if looked is not None:
                            looked(tensor.name)
                        trail.released(*writer.extent(spec))
                    return (stop - start) * spec.nbytes // max(spec.shape[0] if spec.shape else 1, 1)

                for count in _all(pool, threads, work.jobs(block)):
                    progress(count)
                if fingerprint(files.files) != before:
                    raise SourceError("the source's files changed while they were read; nothing was kept")
                hashes = trail.result()
            writer.finish()
            whole = True
        finally:
            journal.close(remove=whole)
    return Streamed({name: applier.stds[name] for name, _ in applier.measured()}, hashes)


class _Work:
    """The blocks of a plan in order, and which of them is the last of its tensor."""

    def __init__(self, plan: Plan, applier: Applier, size: int) -> None:
        self._applier = applier
        self._cuts = {tensor.name: list(Applier.cuts(tensor, size)) for tensor in plan.tensors}
        self._left = {name: len(cuts) for name, cuts in self._cuts.items()}
        self._lock = threading.Lock()

    def last(self, name: str) -> bool:
        """Called once a block is written: whether it was its tensor's last."""
        with self._lock:
            self._left[name] -= 1
            return not self._left[name]

    def jobs(self, block: Callable[[TensorPlan, int, int], int]) -> Iterator[tuple[Callable[..., int], Any]]:
        """Every block, and, a tensor ahead of those that wait for it, what measures a figure."""
        wanted = self._applier.measured()
        measured = {name: (name, kind) for name, kind in wanted}
        tensors = self._applier.plan.tensors
        for tensor, after in zip(tensors, (*tensors[1:], None), strict=True):
            for each in (tensor, after):
                need = measured.pop(each.fill.like or "", None) if each is not None else None
                if need is not None:
                    yield self._measure, need
            for cut in self._cuts[tensor.name]:
                yield block, (tensor, *cut)

    def _measure(self, name: str, kind: str) -> int:
        self._applier.measure(name, kind)
        return 0


def _all(
    pool: ThreadPoolExecutor, threads: int, jobs: Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]
) -> Iterator[Any]:
    """Results as they come, with no more jobs waiting than there are threads; the first error ends it."""
    running: set[Future[Any]] = set()
    try:
        for function, arguments in jobs:
            running.add(pool.submit(function, *arguments))
            if len(running) >= 2 * threads:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        for future in running:
            future.cancel()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Parallelism is over blocks; torch's own threads within them would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["block_bytes", "fingerprint", "stream", "threads_of"]
