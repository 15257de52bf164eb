"""Hashes of files that are there and of files that are being written, and the early way to disk."""

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from growformer.checkpoint import hashing
from growformer.checkpoint.hashing import Hashes, Trail
from growformer.checkpoint.writer import OpenFile
from growformer.errors import SourceError, TargetError

BEGIN = 10


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK", 1000)
    monkeypatch.setattr(hashing, "FLUSH", 3000)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_that_are_there(tmp_path: Path) -> None:
    paths = [tmp_path / str(size) for size in (0, 1, 999, 1000, 1001, 5000)]
    for path in paths:
        path.write_bytes(random.Random(path.name).randbytes(int(path.name)))
    with Hashes(paths) as hashes:
        found = hashes.result()
    assert found == {path: digest(path) for path in paths}
    assert len(set(found.values())) == len(paths)


def test_leaving_does_not_wait_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    plain, begun = hashing.pread_into, threading.Event()

    def slow(*args: object) -> None:
        begun.set()
        time.sleep(0.05)
        plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "pread_into", slow)
    started = time.monotonic()
    with Hashes([tmp_path / "large"]):
        begun.wait(10)
    assert time.monotonic() - started < 10 < 1049 * 0.05  # what all of its chunks would have taken


def test_a_file_that_is_cut_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut"
    path.write_bytes(bytes(5000))
    plain = hashing.pread_into

    def cutting(*args: object) -> None:
        os.truncate(path, 1500)
        plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "pread_into", cutting)
    with Hashes([path]) as hashes, pytest.raises(SourceError, match="it was cut"):
        hashes.result()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[OpenFile]]:
    """Two files with nothing in them but a head."""
    out = []
    for name, size in (("a", 20_000), ("b", 7_001)):
        descriptor = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, b"h" * BEGIN, 0)
        out.append(OpenFile(tmp_path / name, descriptor, BEGIN, size))
    yield out
    for file in out:
        os.close(file.descriptor)


def blocks(files: list[OpenFile], seed: int) -> list[tuple[OpenFile, int, int]]:
    """All bytes behind the heads in blocks of random sizes, empty ones among them, in random order."""
    rng, out = random.Random(seed), []
    for file in files:
        at = file.begin
        while at < file.size:
            end = min(file.size, at + rng.choice((0, 1, 700, 2500)))
            out.append((file, at, end))
            at = end
    rng.shuffle(out)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_files_that_are_being_written_in_any_order(files: list[OpenFile], seed: int) -> None:
    rng = random.Random(seed)
    with Trail(files) as trail:
        for file, start, stop in blocks(files, seed):
            os.pwrite(file.descriptor, rng.randbytes(stop - start), start)
            trail.written(file.path, start, stop)
            trail.released(file.path, start, stop)
        found = trail.result()
    assert found == {file.path: digest(file.path) for file in files}
    # The control: the bytes are random, so that a hash of what was there before would differ.
    assert files[0].path.read_bytes()[BEGIN:].count(0) < files[0].size / 10


def test_only_what_is_hashed_and_released_is_dropped_and_only_once_it_is_on_disk(
    files: list[OpenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, calls = files[0], list[tuple[str, int, int]]()
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append(("sync", fd, 0)))
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, count, how: calls.append(("drop", at, at + count)))
    with Trail([file]) as trail:
        trail.written(file.path, BEGIN, 9000)
        trail.released(file.path, BEGIN, 4000)
        trail.released(file.path, 6000, 9000)
        deadline = time.monotonic() + 10
        while not calls and time.monotonic() < deadline:
            time.sleep(0.001)
        trail.written(file.path, 9000, file.size)
        trail.result()
    assert calls[0][0] == "sync"
    ends = [end for what, _, end in calls if what == "drop"]
    assert all(end <= 4000 for end in ends)


def test_a_disk_that_fails_is_said_once_and_not_lost(files: list[OpenFile], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()

    def fails(descriptor: int) -> None:
        tried.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails)
    with Trail(files[:1]) as trail:
        trail.written(files[0].path, BEGIN, files[0].size)
        tried.wait(10)
        with pytest.raises(TargetError, match="cannot be written"):
            trail.result()


def test_leaving_early_ends_the_wait_for_bytes_that_never_come(files: list[OpenFile]) -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Trail(files) as trail:
        trail.written(files[0].path, BEGIN, 50)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10
