"""Safetensors files larger than memory: rows that are read, blocks that are written.

The library of the same name reads through a mapping, which counts as resident memory, and writes a whole file at
once. All shapes are known before the first byte, so both can be done by offset in bounded memory.
"""

import contextlib
import os
import re
import shlex
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from growformer.algebra.scratch import Scratch
from growformer.checkpoint._header import (
    DTYPES,
    TensorInfo,
    TensorSpec,
    dtype_name,
    pread_into,
    read_header,
    require_growable,
    torch_dtype,
)
from growformer.checkpoint.folder import inside, read_json, shown
from growformer.errors import SourceError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "RowReader",
    "TensorFiles",
    "TensorInfo",
    "TensorSpec",
    "dtype_name",
    "require_growable",
    "torch_dtype",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


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

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None) -> "torch.Tensor":
        """Read a tensor, or rows of its dim 0; nothing else is read.

        Args:
            name: The tensor.
            rows: Rows `start` to `stop` of dim 0, both within the tensor, without a step.
            scratch: Memory that the thread's next read overwrites; None: the tensor gets memory of its own.

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
        buffer = (scratch or Scratch()).array("read", (size,), "uint8")
        pread_into(info.file, self._descriptors[info.file], start, buffer.data)
        return torch.from_numpy(buffer).view(dtype).reshape(shape)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RowReader(threading.local):
    """Reads rows of `TensorFiles` that do not change; what it returned is overwritten when its thread reads again.

    Each thread has memory of its own, and rows that lie in it already are not read a second time.
    """

    def __init__(self, files: TensorFiles) -> None:
        self._files, self._scratch = files, Scratch()
        self._name, self._first = "", 0
        self._rows: torch.Tensor | None = None

    def read(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        """As `TensorFiles.read`; without `rows`, into memory of its own."""
        if rows is None:
            return self._files.read(name)
        first, last = _bounds(self._files[name], rows)
        held = self._rows
        if held is None or self._name != name or not self._first <= first <= last <= self._first + len(held):
            self._rows = None  # for a read that fails leaves nothing to go by
            self._rows = held = self._files.read(name, rows, self._scratch)
            self._name, self._first = name, first
        return held[first - self._first : last - self._first]


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
    if not os.path.lexists(folder / INDEX):
        raise SourceError(_no_safetensors(folder))
    path = inside(folder, INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no weight_map from tensor to file")
    for name, shard in weight_map.items():
        # Printable, for a terminal obeys what it cannot print; and no longer than names of files are.
        if not isinstance(shard, str) or not shard.isprintable() or len(shard) > 255:
            raise SourceError(f"{path}: weight_map of {shown(name)} is no file name: {shown(shard)}")
    return weight_map


def _compare(folder: Path, shard: str, weight_map: dict[str, str], found: dict[str, TensorInfo]) -> None:
    expected = {name for name, where in weight_map.items() if where == shard}
    for names, reason in (
        (expected - found.keys(), f"{INDEX} places in it, and it does not have"),
        (found.keys() - expected, f"it has, and {INDEX} does not place in it"),
    ):
        if names:
            some = ", ".join(map(shown, sorted(names)[:5]))
            raise SourceError(f"{folder / shard}: {len(names)} tensors that {reason}: {some}")


def _no_safetensors(folder: Path) -> str:
    if not os.path.isdir(folder):
        return f"{folder}: is no folder; expected the folder of a model"
    try:
        found = sorted(name if name.isprintable() else shown(name) for name in os.listdir(folder))
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror}"
    if "adapter_model.safetensors" in found:
        return f"{folder}: holds an adapter, not a model; merge it into its base model first (PEFT: merge_and_unload)"
    if not any(name.startswith("pytorch_model") and ".bin" in name for name in found):
        return f"{folder}: has neither {SINGLE} nor {INDEX}; found {', '.join(found[:10]) or 'nothing'}"
    name = "AutoModelForCausalLM"
    with contextlib.suppress(SourceError, LookupError, TypeError):
        first = read_json(inside(folder, "config.json"))["architectures"][0]
        name = first if isinstance(first, str) and re.fullmatch(r"[A-Za-z]\w*", first) else name
    code = (
        f"import transformers as t; s = {str(folder)!r}; d = s + '-safetensors'; "
        f"t.{name}.from_pretrained(s, dtype='auto').save_pretrained(d); "
        "t.AutoTokenizer.from_pretrained(s).save_pretrained(d)"
    )
    line = f"python -c {shlex.quote(code)}"
    return f"{folder}: holds pickled weights (.bin), which are not read. Convert them first:\n  {line}"
