"""Safetensors files larger than memory: rows that are read, blocks that are written.

The library of the same name reads through a mapping, which counts as resident memory, and writes a whole file at
once. All shapes are known before the first byte, so both can be done by offset in bounded memory.
"""

import contextlib
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from growformer.checkpoint._header import (
    DTYPES,
    TensorInfo,
    TensorSpec,
    dtype_name,
    lay_out,
    pread,
    read_header,
    require_growable,
    torch_dtype,
)
from growformer.checkpoint.folder import inside, read_json, target_errors
from growformer.errors import RequestError, SourceError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "TensorFiles",
    "TensorInfo",
    "TensorSpec",
    "dtype_name",
    "parse_size",
    "require_growable",
    "split_shards",
    "torch_dtype",
    "write_folder",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class TensorFiles(Mapping[str, TensorInfo]):
    """The safetensors files of a model folder, as a mapping from tensor name to `TensorInfo`.

    Use it as a context manager: the files stay open (and may be read by several threads) until it is left.
    """

    def __init__(self, infos: dict[str, TensorInfo], files: dict[Path, int], metadata: dict[str, str]) -> None:
        """Take over open file descriptors; use `open`."""
        self._infos, self._descriptors = infos, files
        self.files = list(files)
        """Paths of the safetensors files, in the order of their names."""
        self.metadata = metadata
        """The files' `__metadata__`, joined; the first file that has a key counts."""

    @classmethod
    def open(cls, folder: Path) -> "TensorFiles":
        """Open `model.safetensors`, or without it the shards that `model.safetensors.index.json` names.

        Every header is checked before anything is read: lengths, offsets without overlap or hole, sizes that agree
        with dtype and shape, and an index that agrees with its shards.

        Raises:
            SourceError: no such files, another format, or damage; the message names the file and the reason.
        """
        weight_map = None if os.path.lexists(folder / SINGLE) else _read_index(folder)
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        infos: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        files: dict[Path, int] = {}
        with contextlib.ExitStack() as undo:
            for shard in names:
                path = inside(folder, shard)
                files[path] = _open(path)
                undo.callback(os.close, files[path])
                found, about = read_header(path, files[path])
                if weight_map is not None:
                    _compare(folder, shard, weight_map, found)
                infos |= found
                metadata = about | metadata
            undo.pop_all()
        return cls(infos, files, metadata)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def names(self) -> list[str]:
        """Tensor names, file by file, in the order of their bytes."""
        return list(self._infos)

    def read(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        """Read a tensor, or rows of its dim 0, into memory of its own; nothing else is read.

        Args:
            name: The tensor.
            rows: Rows `start` to `stop` of dim 0, both within the tensor, without a step.

        Returns:
            A tensor of the stored dtype; shape as stored, dim 0 being the rows asked for.

        Raises:
            SourceError: a dtype that is not read, or a file that was cut or changed since it was opened.
            ValueError: rows outside the tensor, or a closed `TensorFiles`.
        """
        import torch

        info = self[name]
        try:
            dtype = torch_dtype(info.dtype)
        except SourceError as error:
            raise SourceError(f"{info.file}: tensor {name!r}: {error}") from None
        shape, start, size = list(info.shape), info.start, info.stop - info.start
        if rows is not None:
            first, last = _bounds(info, rows)
            row = size // max(shape[0], 1)
            start, size, shape[0] = start + first * row, (last - first) * row, last - first
        if info.file not in self._descriptors:
            raise ValueError(f"{info.file}: read after close")
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        buffer = pread(info.file, self._descriptors[info.file], start, size)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bounds(info: TensorInfo, rows: slice) -> tuple[int, int]:
    count = info.shape[0] if info.shape else 0
    first, last = 0 if rows.start is None else rows.start, count if rows.stop is None else rows.stop
    if not info.shape or rows.step not in (None, 1) or not 0 <= first <= last <= count:
        raise ValueError(f"{info.name}: rows {rows} of a tensor of shape {info.shape}")
    return first, last


def _open(path: Path) -> int:
    try:
        # The kind comes first: opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{path}: is no regular file")
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: missing (an incomplete download?)") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        raise SourceError(_no_safetensors(folder))
    path = inside(folder, INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no weight_map from tensor to file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise SourceError(f"{path}: weight_map of {name!r} is no file name: {shard!r:.200}")
    return weight_map


def _compare(folder: Path, shard: str, weight_map: dict[str, str], found: dict[str, TensorInfo]) -> None:
    expected = {name for name, where in weight_map.items() if where == shard}
    for names, reason in (
        (expected - found.keys(), f"{INDEX} places in it, and it does not have"),
        (found.keys() - expected, f"it has, and {INDEX} does not place in it"),
    ):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise SourceError(f"{folder / shard}: {len(names)} tensors that {reason}: {some}")


def _no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is no folder; expected the folder of a model"
    found = sorted(p.name for p in folder.iterdir())
    if "adapter_model.safetensors" in found:
        return f"{folder}: holds an adapter, not a model; merge it into its base model first (PEFT: merge_and_unload)"
    if not any(name.startswith("pytorch_model") and ".bin" in name for name in found):
        return f"{folder}: has neither {SINGLE} nor {INDEX}; found {', '.join(found[:10]) or 'nothing'}"
    name = "AutoModelForCausalLM"
    with contextlib.suppress(SourceError, LookupError, TypeError):
        first = read_json(folder / "config.json")["architectures"][0]
        name = first if isinstance(first, str) and re.fullmatch(r"[A-Za-z]\w*", first) else name
    code = (
        f"import transformers as t; s = {str(folder)!r}; d = s + '-safetensors'; "
        f"t.{name}.from_pretrained(s, dtype='auto').save_pretrained(d); "
        "t.AutoTokenizer.from_pretrained(s).save_pretrained(d)"
    )
    line = f"python -c {shlex.quote(code)}"
    return f"{folder}: holds pickled weights (.bin), which are not read. Convert them first:\n  {line}"


def parse_size(size: int | str) -> int:
    """Return a number of bytes written as "5GB", "200MB" (powers of 1000), "512MiB" (powers of 1024) or a number.

    Raises:
        RequestError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE | re.ASCII)
    count = int(Decimal(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if count < 1:
        units = ", ".join(filter(None, _UNITS))
        raise RequestError(f"{size!r} is no size in bytes; write a number and one of {units}, such as 5GB")
    return count


def split_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Split tensors into files as transformers' `max_shard_size` does: greedily, in the given order.

    A tensor larger than `max_bytes` gets a file of its own, ahead of the file that is being filled, which goes on.
    """
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    room = max_bytes
    for spec in specs:
        if spec.nbytes > max_bytes:
            shards.append([spec])
            continue
        if spec.nbytes > room:
            shards.append(current)
            current, room = [], max_bytes
        current.append(spec)
        room -= spec.nbytes
    return [*shards, current] if current else shards


def write_folder(
    folder: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Iterable["torch.Tensor"]],
    max_shard_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a model's safetensors files, and their index where there are several.

    Each file gets its header and its size first; pieces then go to their offsets, and each file is forced to disk.
    Memory holds one piece at a time.

    Args:
        folder: An existing folder (see `new_folder`); no file in it is overwritten.
        specs: The tensors, in the order in which shards are filled.
        produce: Yields a tensor's rows (slices of dim 0, in order, in the spec's dtype; a scalar as one piece).
        max_shard_bytes: Limit of a file's tensors in bytes.
        progress: Called with the bytes of each piece written.

    Returns:
        The files written, the index last.

    Raises:
        ValueError: no tensors, a name given twice, or pieces that do not make up the tensor.
        TargetError: the folder cannot be written.
    """
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names) or "__metadata__" in names:
        raise ValueError(f"tensor names must be there, differ, and not be __metadata__: {names}")
    shards = split_shards(specs, max_shard_bytes)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, produce, progress)
    if count > 1:
        weight_map = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
        with target_errors(folder / INDEX):
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.append(INDEX)
    return [folder / file for file in files]


def _write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Iterable["torch.Tensor"]],
    progress: Callable[[int], None] | None,
) -> None:
    head, begins, size = lay_out(specs)
    with contextlib.ExitStack() as closing:
        # Only our own calls are guarded: an OSError of `produce` is the source's, not the target's.
        with target_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            closing.callback(os.close, descriptor)
            os.ftruncate(descriptor, size)
            _pwrite(descriptor, memoryview(head), 0)
        for spec in specs:
            at = begins[spec.name]
            for data in _pieces(spec, produce(spec)):
                with target_errors(path):
                    _pwrite(descriptor, data, at)
                at += len(data)
                if progress is not None:
                    progress(len(data))
        with target_errors(path):
            os.fsync(descriptor)


def _pieces(spec: TensorSpec, pieces: Iterable["torch.Tensor"]) -> Iterator[memoryview]:
    """Yield the bytes of a tensor's pieces, once each is seen to fit and, at the end, to have made up the whole."""
    import torch

    dtype = torch_dtype(spec.dtype)
    row = spec.shape[1:]
    rows, done = (spec.shape or (1,))[0], 0
    for piece in pieces:
        count = piece.shape[0] if piece.ndim else 1
        fits = piece.ndim == len(spec.shape) and tuple(piece.shape[1:]) == row and done + count <= rows
        if piece.dtype != dtype or not fits:
            raise ValueError(
                f"{spec.name}: a piece of shape {tuple(piece.shape)} and {piece.dtype} after {done} rows; "
                f"expected rows of {spec.shape} and {dtype}"
            )
        done += count
        yield piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    if done != rows:
        raise ValueError(f"{spec.name}: pieces of {done} rows in all, its shape {spec.shape} has {rows}")


def _pwrite(descriptor: int, data: memoryview, at: int) -> None:
    while len(data):  # the system moves at most 2 GB a call
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
