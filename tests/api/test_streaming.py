"""Streaming: the same bits whatever the threads, the memory and the shards, and after being killed at any moment."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer import api
from growformer.api import streaming
from growformer.api.streaming import block_bytes, stream
from growformer.checkpoint import TensorFiles, TensorSpec, sha256
from growformer.checkpoint.journal import JOURNAL, Journal, checksum
from growformer.errors import SourceError, TargetError
from growformer.planning import Plan, apply
from tests.api.forked import forked
from tests.tiny import save

REQUEST = {
    "hidden_size": 72,
    "intermediate_size": 141,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 40,
    "num_hidden_layers": 5,
}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of two shards and two dtypes: what lies in which file, and how, must not matter."""
    folder = save(tmp_path_factory.mktemp("stream") / "src", "llama-tied-bias", dtype="bfloat16", vocab_size=3001)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: x.float() if x.dim() == 1 else x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ROW_BYTES", 1)
    monkeypatch.setattr(streaming, "BLOCK", 1 << 12)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles.open(folder) as files:
        return {name: files.read(name) for name in files}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and bool((a[k] == b[k]).all()) for k in a)


def test_same_bits_for_all_threads_shards_and_memory(src: Path, tmp_path: Path, small_blocks: None) -> None:
    made = api.plan(src, **REQUEST)
    memory = apply(made, tensors_of(src))
    assert {str(x.dtype) for x in memory.values()} == {"torch.bfloat16", "torch.float32"}
    for i, (threads, shard, room) in enumerate(
        [(1, "50GB", "1GiB"), (2, "300KB", "1GiB"), (8, "100KB", "1GiB"), (8, "50GB", "1kB"), (3, "1kB", "64KiB")]
    ):
        out = tmp_path / str(i)
        options: dict[str, Any] = {"threads": threads, "max_shard_size": shard, "memory": room}
        api.expand_checkpoint(src, out, prove_level="structure", **options, **REQUEST)
        assert same(memory, tensors_of(out)), (threads, shard, room)
        assert not list(out.glob(".*"))
    # The control: another seed is another file.
    api.expand_checkpoint(src, tmp_path / "seed", prove_level="structure", seed=1, **REQUEST)
    assert not same(memory, tensors_of(tmp_path / "seed"))


def test_blocks_stay_within_the_memory() -> None:
    for memory in (1 << 28, 1 << 29, 1 << 30):
        for threads in (1, 2, 8):
            assert streaming.BUSY * threads * block_bytes(memory, threads) <= memory
    assert block_bytes(1, 8) == streaming.ROW_BYTES


def _expand(src: Path, out: Path, **options: Any) -> None:
    api.expand_checkpoint(src, out, prove_level="structure", **options, **REQUEST)


def test_killed_and_resumed_gives_the_same_bits(
    src: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _expand(src, tmp_path / "whole")
    wanted = sha256(tmp_path / "whole" / "model.safetensors")
    plain = Journal.add

    def slowly(self: Journal, *block: Any) -> None:
        plain(self, *block)
        time.sleep(0.002)

    monkeypatch.setattr(Journal, "add", slowly)
    partials = 0
    for i in range(6):
        out = tmp_path / f"killed{i}"
        partial = tmp_path / f".killed{i}.partial"

        def lines(journal: Path = partial / JOURNAL) -> int:
            return journal.read_text().count("\n") if journal.is_file() else 0

        status = forked(lambda out=out: _expand(src, out, threads=2), lambda i=i, lines=lines: lines() > 1 + 25 * i)
        assert os.WIFSIGNALED(status), status
        assert not out.exists()
        assert not (partial / "config.json").exists()
        partials += partial.exists()
        with pytest.raises(TargetError, match="--resume goes on with it"):
            _expand(src, out)
        again = forked(lambda out=out: _expand(src, out, resume=True), lambda: False)
        assert os.waitstatus_to_exitcode(again) == 0
        assert sha256(out / "model.safetensors") == wanted
        assert not partial.exists()
    assert partials == 6


def _stream(src: Path, folder: Path, made: Plan, written: list[int]) -> None:
    with TensorFiles.open(src) as files:
        specs = [TensorSpec(t.name, files[t.source or t.fill.like or ""].dtype, t.shape) for t in made.tensors]
        options: dict[str, Any] = {"max_shard_bytes": 10**9, "memory": 1 << 20, "threads": 2}
        stream(made, files, folder, specs, progress=written.append, **options)


def test_finished_blocks_are_kept_and_damaged_ones_made_again(
    src: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = api.plan(src, **REQUEST)
    # A run that ends before it takes its journal away.
    close = Journal.close
    monkeypatch.setattr(Journal, "close", lambda self, *, remove: close(self, remove=False))
    _stream(src, tmp_path, made, [])
    weights = tmp_path / "model.safetensors"
    wanted = sha256(weights)
    blocks = (tmp_path / JOURNAL).read_text().count("\n") - 1
    added: list[str] = []
    plain = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, name, *rest: (added.append(name), plain(self, name, *rest)))
    _stream(src, tmp_path, made, [])
    assert added == []
    # One byte of one block damaged, and a journal cut in the middle of its last line.
    with weights.open("r+b") as file:
        file.seek(-7, 2)
        file.write(b"\x55")
    with (tmp_path / JOURNAL).open("r+b") as file:
        file.truncate((tmp_path / JOURNAL).stat().st_size - 3)
    _stream(src, tmp_path, made, [])
    assert 1 <= len(added) <= 2 < blocks
    assert sha256(weights) == wanted
    # A journal of another plan counts for nothing.
    added.clear()
    _stream(src, tmp_path, api.plan(src, seed=1, **REQUEST), [])
    assert len(added) == blocks
    assert sha256(weights) != wanted


def test_two_runs_do_not_write_one_folder(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from growformer.api import folders

    def meanwhile(*args: Any, **options: Any) -> dict[str, float]:
        with pytest.raises(TargetError, match="another run is writing it at this moment"):
            _expand(src, tmp_path / "out", resume=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "stream", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        _expand(src, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_meanwhile_is_refused(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    moving = Path(shutil.copytree(src, tmp_path / "src"))
    plain = Journal.add

    def touch(self: Journal, *block: Any) -> None:
        plain(self, *block)
        os.utime(moving / "model.safetensors")

    monkeypatch.setattr(Journal, "add", touch)
    with pytest.raises(SourceError, match="changed while they were read"):
        _expand(moving, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_full_disk_is_one_error_and_nothing_is_left(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TargetError, match="No space left on device"):
        _expand(src, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checksums_tell_blocks_apart() -> None:
    assert checksum(b"abc") == checksum(memoryview(b"abc")) != checksum(b"abd")
