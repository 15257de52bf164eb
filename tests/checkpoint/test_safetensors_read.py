"""Reading safetensors: agreement with the safetensors library, and a refusal for every way to be damaged."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from growformer.checkpoint import RowReader, TensorFiles, TensorInfo, require_growable
from growformer.errors import SourceError

INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {
        "b.odd": torch.randn(3, generator=draw).bfloat16(),
        "a.matrix": torch.randn(5, 7, generator=draw),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "cube": torch.randn(2, 3, 4, generator=draw).half(),
        "empty": torch.zeros(0, 6),
        "ids": torch.arange(11),
        "mask": torch.tensor([True, False, True]),
        "short": torch.arange(4, dtype=torch.int16),
        "int": torch.arange(4, dtype=torch.int32),
    }


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "x"})
    with TensorFiles.open(tmp_path) as files:
        assert set(files) == set(files.names) == set(tensors) and len(files) == len(tensors)
        assert files.metadata == {"format": "pt", "note": "x"}
        assert files.files == [tmp_path / "model.safetensors"]
        for name, tensor in tensors.items():
            got = files.read(name)
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
            assert files[name].shape == tuple(tensor.shape)


def test_reads_only_the_rows_asked_for(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files:
        for rows in (slice(1, 3), slice(None, 2), slice(4, None), slice(5, 5), slice(None)):
            got = files.read("a.matrix", rows)
            assert torch.equal(got, tensors["a.matrix"][rows])
            assert got.untyped_storage().nbytes() == got.numel() * 4
        assert files.read("empty", slice(0, 0)).shape == (0, 6)
        got = files.read("a.matrix")
        got.zero_()  # memory of its own: the file is untouched
        assert torch.equal(files.read("a.matrix"), tensors["a.matrix"])


@pytest.mark.parametrize("rows", [slice(0, 6), slice(-1, None), slice(3, 2), slice(0, 4, 2)])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, rows: slice) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files:
        with pytest.raises(ValueError, match=r"a.matrix: rows slice.*shape \(5, 7\)"):
            files.read("a.matrix", rows)
        with pytest.raises(ValueError, match="scalar: rows"):
            files.read("scalar", slice(0, 0))


def test_a_row_reader_reads_the_same_into_memory_of_its_thread(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files, ThreadPoolExecutor(1) as other:
        reader = RowReader(files)
        for rows in (slice(1, 4), slice(2, 3), slice(0, 5), slice(5, 5)):
            for name in ("a.matrix", "ids"):
                assert torch.equal(reader.read(name, rows), tensors[name][rows]), (name, rows)
        held = reader.read("a.matrix", slice(0, 5))
        assert torch.equal(reader.read("a.matrix", slice(2, 4)), held[2:4])
        # Another thread's reads, and whole tensors, leave it alone; this thread's next read does not.
        assert torch.equal(other.submit(reader.read, "ids", slice(0, 11)).result(), tensors["ids"])
        assert torch.equal(reader.read("scalar"), tensors["scalar"])
        assert torch.equal(held, tensors["a.matrix"])
        reader.read("ids", slice(0, 11))
        assert not torch.equal(held, tensors["a.matrix"])
        with pytest.raises(ValueError, match="rows"):
            reader.read("ids", slice(0, 12))


def test_closed_files_are_not_read(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    assert torch.equal(files.read("ids"), torch.arange(11))
    files.close()
    files.close()
    with pytest.raises(ValueError, match="read after close"):
        files.read("ids")


def test_a_file_cut_while_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randn(100)}, path)
    with TensorFiles.open(tmp_path) as files:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(SourceError, match=r"model.safetensors: ends at byte \d+, expected 4 more"):
            files.read("w")


HOSTILE = {
    "empty file": (b"", "0 bytes, too short"),
    "header longer than the file": ((99).to_bytes(8, "little") + b"{}", "header of 99 bytes, in a file of 10"),
    "absurd length": ((2**63).to_bytes(8, "little") + b"{}", f"header of {2**63} bytes"),
    "no header": ((0).to_bytes(8, "little"), "does not begin with"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    data, reason = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(SourceError, match=rf"model.safetensors: .*{reason}"):
        TensorFiles.open(tmp_path)


def test_a_header_over_100_mb_is_refused_though_the_file_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 100_000_100)  # sparse: takes no disk
    with pytest.raises(SourceError, match="at most 100000000"):
        TensorFiles.open(tmp_path)


PAIR = {"w": entry(), "v": entry(offsets=(8, 16))}
HEADERS: dict[str, tuple[Any, str]] = {
    "leading space": (b" {}", "does not begin with"),
    "a list": (b"[]", "does not begin with"),
    "not json": (b"{w}", "not readable as JSON"),
    "trailing junk": (b"{}x", "not readable as JSON"),
    "not utf-8": (b'{"\xff": 1}', "not readable as JSON"),
    "deep": (b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not readable as JSON"),
    "long number": (b'{"w":' + b"1" * 5000 + b"}", "not readable as JSON"),
    "duplicate": (b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}", "twice"),
    "metadata list": ({"__metadata__": [], **PAIR}, "__metadata__ is no table of strings"),
    "metadata number": ({"__metadata__": {"a": 1}, **PAIR}, "__metadata__ is no table of strings"),
    "entry is a list": ({"w": [], "v": PAIR["v"]}, "its entry is not dtype"),
    "missing key": ({"w": {"dtype": "F32", "shape": [2]}}, "its entry is not dtype"),
    "further key": ({"w": {**entry(), "x": 1}}, "its entry is not dtype"),
    "unknown dtype": ({"w": entry("F31"), "v": PAIR["v"]}, "unknown dtype 'F31'"),
    "dtype list": ({"w": {**entry(), "dtype": []}}, "unknown dtype"),
    "negative dim": ({"w": entry(shape=[-2]), "v": PAIR["v"]}, "shape is no list of sizes"),
    "fractional dim": ({"w": entry(shape=[2.0]), "v": PAIR["v"]}, "shape is no list of sizes"),
    "true as a dim": ({"w": entry(shape=[2, True]), "v": PAIR["v"]}, "shape is no list of sizes"),
    "huge dim": ({"w": entry(shape=[2**63]), "v": PAIR["v"]}, "shape is no list of sizes"),
    "shape string": ({"w": entry(shape="2"), "v": PAIR["v"]}, "shape is no list of sizes"),
    "many dims": ({"w": entry(shape=[2**62] * 65), "v": PAIR["v"]}, "65 dims"),
    "large product": ({"w": entry(shape=[2**62] * 64), "v": PAIR["v"]}, "no machine counts so far"),
    "negative offset": ({"w": entry(offsets=[-8, 0]), "v": PAIR["v"]}, "data_offsets is no list of sizes"),
    "one offset": ({"w": entry(offsets=[0])}, "no begin and end"),
    "backwards": ({"w": entry(offsets=[8, 0]), "v": PAIR["v"]}, "no begin and end"),
    "size": (
        {"w": entry(shape=[3]), "v": PAIR["v"]},
        r"shape \[3\] takes 96 bits, its offsets \[0, 8\] hold 64",
    ),
    "part of a byte": ({"w": entry("F4", [3], [0, 2]), "v": entry("U8", [14], [2, 16])}, "takes 12 bits"),
    "overlap": ({"w": entry(offsets=[0, 8]), "v": entry(offsets=[4, 12])}, "overlaps the one before it"),
    "same bytes": ({"w": entry(offsets=[0, 8]), "v": entry(offsets=[0, 8])}, "overlaps the one before it"),
    "hole": ({"w": entry(offsets=[0, 4], shape=[1]), "v": entry(offsets=[8, 16])}, "leaves a hole before it"),
    "hole at the start": ({"v": entry(offsets=[8, 16])}, "leaves a hole before it"),
    "outside": ({**PAIR, "u": entry(offsets=[16, 24])}, "the file was cut"),
    "unowned": ({"w": entry()}, "bytes that no tensor owns"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    header, reason = HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(SourceError, match=rf"model.safetensors: .*{reason}"):
        TensorFiles.open(tmp_path)


def test_the_header_that_those_are_changed_from_is_fine(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"__metadata__": {}, "v": PAIR["v"], "w": PAIR["w"]}, bytes(16))
    with TensorFiles.open(tmp_path) as files:
        assert files.names == ["w", "v"]  # by place in the file, whatever the header's order


@given(st.data())
def test_whatever_is_accepted_the_library_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flip bytes of a good file: it is refused, or both readers see the same tensors."""
    folder = tmp_path_factory.mktemp("flip")
    path = folder / "model.safetensors"
    save_file({"w": torch.arange(6.0).reshape(2, 3), "v": torch.arange(4).bfloat16()}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(
            st.sampled_from(list(b'0123456789"{}[],: FBU\x00\xff'))
        )
    path.write_bytes(raw)
    try:
        files = TensorFiles.open(folder)
    except SourceError:
        return
    with files, safe_open(path, "pt") as theirs:
        assert set(files) == set(theirs.keys())
        for name, info in files.items():
            if info.dtype in ("F32", "BF16", "F16"):
                got, expected = files.read(name), theirs.get_tensor(name)
                assert got.dtype == expected.dtype and got.shape == expected.shape
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_the_library_refuses_damage_too(tmp_path: Path) -> None:
    """The control of the test above: its second reader does see damage."""
    write_raw(tmp_path / "model.safetensors", HEADERS["overlap"][0], bytes(16))
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "model.safetensors", "pt")


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "F8_E8M0"])
def test_quantised_tensors_are_listed_but_not_read(tmp_path: Path, dtype: str) -> None:
    write_raw(tmp_path / "model.safetensors", {"w": entry(dtype, [16], [0, 16])}, bytes(16))
    with TensorFiles.open(tmp_path) as files:
        for attempt in (lambda: files.read("w"), lambda: require_growable(files["w"])):
            with pytest.raises(SourceError, match=f"'w': stored as {dtype}, it is quantised.*dequantised first"):
                attempt()


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
def test_floating_point_grows_and_integers_do_not(dtype: str) -> None:
    require_growable(TensorInfo("w", dtype, (2,), Path("m"), 0, 0))
    with pytest.raises(SourceError, match="I32, it holds no floating-point weights"):
        require_growable(TensorInfo("w", "I32", (2,), Path("m"), 0, 0))


def make_shards(folder: Path) -> dict[str, Any]:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, folder / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_reads_shards(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with TensorFiles.open(tmp_path) as files:
        assert files.names == ["a", "b", "c"]
        assert [path.name for path in files.files] == ["one.safetensors", "two.safetensors"]
        assert torch.equal(files.read("c", slice(1, 3)), torch.full((2,), 2.0))
        assert files["c"].file == tmp_path / "two.safetensors"


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in from_pretrained: what grows is what stock transformers loads."""
    make_shards(tmp_path)
    save_file({"z": torch.ones(2)}, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files:
        assert files.names == ["z"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"c": "gone.safetensors"}, "gone.safetensors: missing"),
        ({"d": "two.safetensors"}, "two.safetensors: 1 tensors that .*index.json places in it.*: 'd'"),
        ({"b": "two.safetensors"}, "one.safetensors: 1 tensors that it has.*: 'b'"),
        ({"c": "../two.safetensors"}, "'../two.safetensors' does not name a file inside"),
        ({"c": "x/../../two.safetensors"}, "does not name a file inside"),
        ({"c": "..\\two.safetensors"}, "does not name a file inside"),
        ({"c": "/etc/hostname"}, "does not name a file inside"),
        ({"c": "C:two.safetensors"}, "does not name a file inside"),
        ({"c": "two\0.safetensors"}, "weight_map of 'c' is no file name"),
        ({"c": "two\33[2J.safetensors"}, "weight_map of 'c' is no file name"),
        ({"c": ""}, "does not name a file inside"),
        ({"c": "."}, "does not name a file inside"),
        ({"c": 5}, "weight_map of 'c' is no file name"),
    ],
)
def test_indices_that_lie(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    index = make_shards(tmp_path)
    index["weight_map"] |= change
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=reason):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", '{"a":1,"a":1}'])
def test_damaged_indices(tmp_path: Path, text: str) -> None:
    make_shards(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(SourceError, match=INDEX):
        TensorFiles.open(tmp_path)


def test_a_refusal_leaves_no_file_open(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(SourceError, match="too short"):
        TensorFiles.open(tmp_path)
    assert len(before) == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    save_file({"a": torch.ones(2)}, outside / "w.safetensors")
    (folder / "model.safetensors").symlink_to(outside / "w.safetensors")
    with pytest.raises(SourceError, match="outside its folder, and is not followed"):
        TensorFiles.open(folder)


def test_a_hub_cache_snapshot_is_links_into_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    with TensorFiles.open(snapshot) as files:
        assert torch.equal(files.read("a"), torch.ones(2))
    (snapshot / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere")
    (snapshot / "model.safetensors").symlink_to(Path("../../../elsewhere"))
    with pytest.raises(SourceError, match="is not followed"):
        TensorFiles.open(snapshot)
    plain = tmp_path / "models--x--y" / "plain" / "abc"  # the same link where no cache keeps it
    plain.mkdir(parents=True)
    (plain / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    with pytest.raises(SourceError, match="is not followed"):
        TensorFiles.open(plain)


def test_links_that_loop_or_dangle(tmp_path: Path) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to(link)
    with pytest.raises(SourceError, match=r"cannot be (followed|read)"):
        TensorFiles.open(tmp_path)
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match="missing"):
        TensorFiles.open(tmp_path)


def test_pipes_and_folders_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(SourceError, match="no regular file"):
        TensorFiles.open(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SourceError, match="no regular file"):
        TensorFiles.open(tmp_path)


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, growformer.checkpoint; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    path = os.pathsep.join(["src", *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    torch_too = f"import torch; {code}"
    assert subprocess.run([sys.executable, "-c", torch_too], env=environment, check=False).returncode == 1
