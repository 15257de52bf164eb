"""Run a plan from files to files: bounded memory, several threads, and a journal to go on by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.checkpoint import FolderWriter, TensorFiles, TensorSpec
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
    return threads or min(8, len(os.sched_getaffinity(0)))


def block_bytes(memory: int, threads: int) -> int:
    """Bytes (as float32) of a block, so that all threads together stay within `memory`."""
    return max(ROW_BYTES, min(BLOCK, memory // (BUSY * threads)))


def fingerprint(files: TensorFiles) -> dict[str, list[int]]:
    """Size and time of change of every file of a source: what tells that it changed under a run."""
    out = {}
    for path in files.files:
        stat = path.stat()
        out[path.name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return out


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
) -> dict[str, float]:
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

    Returns:
        The figures that fills measured, by source tensor.

    Raises:
        SourceError: the source changed meanwhile, or cannot be read.
        TargetError: the disk refuses.
    """
    stored = {spec.name: spec for spec in specs}
    before = fingerprint(files)
    said = hashlib.sha256(plan.dumps().encode()).hexdigest()
    run = {"plan": said, "source": before, "shard": max_shard_bytes, "dtypes": [spec.dtype for spec in specs]}
    size = block_bytes(memory, threads)
    applier = Applier(plan, files.read, dtype)
    with _one_torch_thread(), FolderWriter(folder, specs, max_shard_bytes, resume=True) as writer:
        journal = Journal(folder, run)
        whole = False
        try:
            with ThreadPoolExecutor(threads) as pool:
                for _ in _all(pool, threads, ((applier.measure, need) for need in applier.measured())):
                    pass

                def block(tensor: TensorPlan, start: int, stop: int) -> int:
                    spec = stored[tensor.name]
                    known = journal.done.get((tensor.name, start, stop))
                    if known is not None and tensor.name in writer.kept:
                        there = writer.read(spec, start, stop - start)
                        if checksum(there) == known:
                            return len(there)
                    data = as_bytes(applier.piece(tensor, start, stop))
                    writer.write(spec, start, data)
                    journal.add(tensor.name, start, stop, checksum(data))
                    return len(data)

                jobs = ((block, (t, *cut)) for t in plan.tensors for cut in Applier.cuts(t, size))
                for count in _all(pool, threads, jobs):
                    progress(count)
            if fingerprint(files) != before:
                raise SourceError("the source's files changed while they were read; nothing was kept")
            writer.finish()
            whole = True
        finally:
            journal.close(remove=whole)
    return applier.stds


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
