"""Locks: one holder, and none left behind for ever."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from growformer.bench import locks
from growformer.bench.locks import lock


def test_one_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with lock(path) as mine:
        assert mine and json.loads(path.read_text())["pid"] == os.getpid()
        with lock(path) as other:
            assert not other
        assert path.exists()
    assert list(tmp_path.iterdir()) == []
    with lock(path) as again:
        assert again


def test_it_is_given_back_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lock(tmp_path / "a.lock"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def held_by(path: Path, host: str, pid: int, age: float = 0.0) -> None:
    """A lock of somebody else."""
    path.write_text(json.dumps({"host": host, "pid": pid, "id": "x"}))
    os.utime(path, (time.time() - age,) * 2)


def test_that_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = tmp_path / "a.lock"
    held_by(path, socket.gethostname(), gone.pid)
    with lock(path) as mine:
        assert mine
    held_by(path, socket.gethostname(), os.getppid())
    with lock(path) as mine:
        assert not mine


def test_that_of_another_machine_is_taken_over_once_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    held_by(path, "elsewhere", 1, age=locks.STALE / 2)
    with lock(path) as mine:
        assert not mine
    held_by(path, "elsewhere", 1, age=locks.STALE * 2)
    with lock(path) as mine:
        assert mine
    path.write_text("no JSON")
    with lock(path) as mine:
        assert mine


def test_a_holder_keeps_it_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    path = tmp_path / "a.lock"
    with lock(path) as mine:
        assert mine
        os.utime(path, (0, 0))
        until = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


def test_of_many_that_take_it_over_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    for _ in range(20):
        held_by(path, "elsewhere", 1, age=locks.STALE * 2)
        got: list[bool] = []
        ready, done = threading.Barrier(6), threading.Barrier(6)

        def take(ready: threading.Barrier = ready, done: threading.Barrier = done, got: list[bool] = got) -> None:
            ready.wait()
            with lock(path) as mine:
                got.append(mine)
                done.wait()

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(got) == 1
    assert list(tmp_path.iterdir()) == []
