"""Writing safetensors: what the library and transformers read back, and pieces that do not make up a tensor."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from growformer.checkpoint import (
    TensorFiles,
    TensorSpec,
    dtype_name,
    parse_size,
    split_shards,
    torch_dtype,
    write_folder,
)
from growformer.errors import RequestError, SourceError, TargetError

LARGE = 10**9


def some_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {
        "odd": torch.randn(3, generator=draw).bfloat16(),
        "matrix": torch.randn(5, 7, generator=draw),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "cube": torch.randn(2, 3, 4, generator=draw).half(),
        "empty": torch.zeros(0, 6),
        "thin": torch.zeros(4, 0),
        "ids": torch.arange(11),
        "mask": torch.tensor([True, False, True]),
        'name with \u00fc and "quotes"': torch.randn(2, generator=draw),
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]


def in_rows(tensors: dict[str, torch.Tensor], rows: int) -> Callable[[TensorSpec], Iterator[torch.Tensor]]:
    def produce(spec: TensorSpec) -> Iterator[torch.Tensor]:
        tensor = tensors[spec.name]
        yield from (tensor[i : i + rows] for i in range(0, len(tensor), rows)) if tensor.ndim else [tensor]

    return produce


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_one_file_round_trip(tmp_path: Path, rows: int) -> None:
    tensors = some_tensors()
    written: list[int] = []
    paths = write_folder(tmp_path, specs_of(tensors), in_rows(tensors, rows), LARGE, written.append)
    assert paths == [tmp_path / "model.safetensors"] == list(tmp_path.iterdir())
    assert sum(written) == sum(t.nbytes for t in tensors.values())
    theirs = load_file(paths[0])
    with TensorFiles.open(tmp_path) as files, safe_open(paths[0], "pt") as opened:
        assert set(theirs) == set(files) == set(tensors)
        assert opened.metadata() == files.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            for got in (theirs[name], files.read(name)):
                assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor)
            assert files[name].start % tensor.element_size() == 0, "an unaligned tensor cannot be mapped"
    length = int.from_bytes(paths[0].read_bytes()[:8], "little")
    assert length % 8 == 0


def test_shards_round_trip(tmp_path: Path) -> None:
    tensors = some_tensors()
    paths = write_folder(tmp_path, specs_of(tensors), in_rows(tensors, 2), 100)
    *shards, index_path = paths
    assert len(shards) > 1 and index_path.name == "model.safetensors.index.json"
    count = len(shards)
    assert [p.name for p in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads(index_path.read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    joined: dict[str, torch.Tensor] = {}
    for path in shards:
        found = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(found)
        joined |= found
    with TensorFiles.open(tmp_path) as files:
        for name, tensor in tensors.items():
            assert torch.equal(joined[name], tensor) and torch.equal(files.read(name), tensor)
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=19, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, head_dim=6
    )
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    config.save_pretrained(tmp_path)
    write_folder(tmp_path, specs_of(state), in_rows(state, 5), parse_size("2KB"))
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_pieces_need_not_be_contiguous_or_detached(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    write_folder(tmp_path, [TensorSpec("w", "F32", (4, 3))], lambda _: [weight.T], LARGE)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], weight.detach().T)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([], r"pieces of 0 rows in all, its shape \(3, 2\) has 3"),
        ([torch.zeros(2, 2)], "pieces of 2 rows in all"),
        ([torch.zeros(2, 2), torch.zeros(2, 2)], r"a piece of shape \(2, 2\) and torch.float32 after 2 rows"),
        ([torch.zeros(3, 3)], r"shape \(3, 3\)"),
        ([torch.zeros(6)], r"shape \(6,\)"),
        ([torch.zeros(3, 2, 1)], r"shape \(3, 2, 1\)"),
        ([torch.zeros(3, 2).half()], "torch.float16 after 0 rows; expected rows of .* and torch.float32"),
    ],
)
def test_pieces_that_do_not_make_up_the_tensor(tmp_path: Path, pieces: list[torch.Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^w: .*{reason}"):
        write_folder(tmp_path, [TensorSpec("w", "F32", (3, 2))], lambda _: pieces, LARGE)


def test_a_scalar_is_one_piece(tmp_path: Path) -> None:
    def produce(count: int) -> Callable[[TensorSpec], list[torch.Tensor]]:
        return lambda _: [torch.tensor(1.0)] * count

    for count in (0, 2):
        with pytest.raises(ValueError, match=r"^s: "):
            write_folder(tmp_path, [TensorSpec("s", "F32", ())], produce(count), LARGE)
        (tmp_path / "model.safetensors").unlink()
    write_folder(tmp_path, [TensorSpec("s", "F32", ())], produce(1), LARGE)


def test_names_must_be_there_and_differ(tmp_path: Path) -> None:
    spec = TensorSpec("w", "F32", (1,))
    for specs in ([], [spec, spec], [TensorSpec("__metadata__", "F32", (1,))]):
        with pytest.raises(ValueError, match="tensor names"):
            write_folder(tmp_path, specs, lambda _: [torch.zeros(1)], LARGE)
    assert not list(tmp_path.iterdir())
    write_folder(tmp_path, [spec], lambda _: [torch.zeros(1)], LARGE)


def test_dtypes_have_two_names() -> None:
    for name in ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "BOOL"):
        assert dtype_name(torch_dtype(name)) == name
    with pytest.raises(ValueError, match="uint8 is not written"):
        dtype_name(torch.uint8)
    with pytest.raises(ValueError, match="w: F8_E4M3 is not written"):
        TensorSpec("w", "F8_E4M3", (1,))
    with pytest.raises(SourceError, match="U8, it is quantised"):
        torch_dtype("U8")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(TargetError, match=r"model.safetensors: cannot be written: File exists"):
        write_folder(tmp_path, [TensorSpec("w", "F32", (1,))], lambda _: [torch.zeros(1)], LARGE)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_full_disk_is_the_targets_error_and_a_broken_source_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: TensorSpec) -> Iterable[torch.Tensor]:
        raise OSError(errno.EIO, "the source's disk")
        yield

    spec = TensorSpec("w", "F32", (1,))
    with pytest.raises(OSError, match="the source's disk"):
        write_folder(tmp_path, [spec], broken, LARGE)
    (tmp_path / "model.safetensors").unlink()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TargetError, match="No space left on device"):
        write_folder(tmp_path, [spec], lambda _: [torch.zeros(1)], LARGE)


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system moves at most 2 GB a call; here, 5 bytes."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data[:5]), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:5]], at))
    tensor = torch.randn(6, 3)
    write_folder(tmp_path, specs_of({"w": tensor}), in_rows({"w": tensor}, 4), LARGE)
    with TensorFiles.open(tmp_path) as files:
        assert torch.equal(files.read("w"), tensor)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12), limit=st.integers(1, 20))
def test_shards_are_split_as_transformers_splits_them(sizes: list[int], limit: int) -> None:
    state = {f"t{i}": torch.zeros(n, dtype=torch.bool) for i, n in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit).filename_to_tensors
    ours = split_shards(specs_of(state), limit)
    assert [[spec.name for spec in shard] for shard in ours] == list(theirs.values())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("512MiB", 2**29),
        ("1.5 gb", 1_500_000_000),
        ("3", 3),
        (7, 7),
        ("9007199254740993B", 2**53 + 1),
        (" 2tib ", 2**41),
        ("1KB", 1000),
    ],
)
def test_sizes(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "0", 0, -1, "-5GB", "5XB", "5 G B", "1e3", "0.1B", "nan", "5GB5", True, "\u0663GB"]
)
def test_sizes_that_are_none(text: int | str) -> None:
    with pytest.raises(RequestError, match="is no size in bytes"):
        parse_size(text)
