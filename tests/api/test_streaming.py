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
from growformer.checkpoint import FolderWriter, Receipt, TensorFiles, TensorSpec, sha256
from growformer.checkpoint.journal import JOURNAL, Journal, checksum
from growformer.errors import ChangedError, SourceError, TargetError
from growformer.planning import Applier, Plan, apply
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


def test_a_resumed_run_may_cut_its_shards_elsewhere(
    src: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    _expand(src, whole, max_shard_size="500KB")
    partial = tmp_path / ".out.partial"

    def lines() -> int:
        journal = partial / JOURNAL
        return journal.read_text().count("\n") if journal.is_file() else 0

    plain = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, *block: (plain(self, *block), time.sleep(0.002)))
    forked(lambda: _expand(src, out, max_shard_size="100KB"), lambda: lines() > 20)
    left = {path.name for path in partial.glob("*.safetensors")}
    monkeypatch.undo()
    _expand(src, out, max_shard_size="500KB", resume=True)
    files = {path.name: sha256(path) for path in out.glob("*.safetensors")}
    assert left and not left & set(files)
    assert files == {path.name: sha256(path) for path in whole.glob("*.safetensors")}
    hashes = Receipt.read(out).target["files"]
    assert {name: hashes[name] for name in files} == files


def test_a_byte_that_goes_wrong_on_its_way_to_disk_is_found(
    src: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, damaged = FolderWriter.write, list[str]()

    def damaging(self: FolderWriter, spec: TensorSpec, row: int, data: memoryview) -> None:
        data = memoryview(bytearray(data))
        if not damaged and spec.name.endswith("layers.0.mlp.up_proj.weight"):
            damaged.append(spec.name)
            data[0] ^= 1
        plain(self, spec, row, data)

    monkeypatch.setattr(FolderWriter, "write", damaging)
    with pytest.raises(ChangedError, match=r"layers\.0\.mlp\.up_proj\.weight\[\d+, 0\]: found"):
        _expand(src, tmp_path / "out")
    assert damaged
    assert list(tmp_path.iterdir()) == []


def test_figures_are_those_of_numpy_to_the_last_bit(src: Path) -> None:
    tensors = tensors_of(src)
    made = api.plan(src, **REQUEST)
    applier = Applier(made, lambda name, rows: tensors[name] if rows is None else tensors[name][rows])
    kinds = dict(applier.measured())
    assert set(kinds.values()) == {"normal", "mean"}
    for name, kind in kinds.items():
        values = tensors[name].double().numpy()
        assert values.size <= 1 << 20, "one piece, or the sums would be those of its pieces"
        assert applier.measure(name, kind) == (values.mean() if kind == "mean" else values.var() ** 0.5), name


def test_the_hashes_of_the_receipt_are_those_of_the_files(src: Path, tmp_path: Path, small_blocks: None) -> None:
    _expand(src, tmp_path / "out", max_shard_size="300KB", threads=3)
    receipt = Receipt.read(tmp_path / "out")
    assert receipt.check_files(tmp_path / "out", "target") == receipt.check_files(src, "source") == []
    assert len([name for name in receipt.target["files"] if name.endswith(".safetensors")]) > 3


def test_cores_are_counted_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert streaming.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert streaming.cores() == streaming.threads_of(None) == 3
    assert streaming.threads_of(5) == 5


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
