"""Writing safetensors folders larger than memory, by several threads, so that a killed run can go on.

All shapes are known before the first byte, so every file gets its header and its size first; rows then go to their
offsets, in any order.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from growformer.checkpoint._header import TensorSpec, lay_out, torch_dtype
from growformer.checkpoint.folder import target_errors
from growformer.checkpoint.safetensors_io import INDEX, SINGLE
from growformer.errors import RequestError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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


@dataclass(frozen=True)
class OpenFile:
    """A file in the making: its descriptor, where its header ends, and its size."""

    path: Path
    descriptor: int
    begin: int
    size: int


class FolderWriter:
    """The safetensors files of one folder, open for writing rows at their offsets by any number of threads.

    Use it as a context manager.

    Args:
        folder: an existing folder.
        specs: the tensors, in the order in which shards are filled.
        max_shard_bytes: limit of a file's tensors in bytes.
        resume: keep files that are there already with the very same header and size (`kept`), make others anew, and
            remove those of a run that cut its shards elsewhere; otherwise no file is overwritten.

    Raises:
        ValueError: no tensors, or a name given twice.
        TargetError: the folder cannot be written, or holds such a file.
    """

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], max_shard_bytes: int, *, resume: bool = False
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) != len(names) or "__metadata__" in names:
            raise ValueError(f"tensor names must be there, differ, and not be __metadata__: {names}")
        shards = split_shards(specs, max_shard_bytes)
        count = len(shards)
        files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.folder, self.specs, self.shards = folder, list(specs), dict(zip(files, shards, strict=True))
        self.resume, self.kept = resume, set[str]()
        """Names of the tensors whose file was there already."""
        self.files: dict[Path, OpenFile] = {}
        """The safetensors files, once they are open."""
        self._places: dict[str, tuple[int, Path, int]] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "FolderWriter":
        with contextlib.ExitStack() as undo:
            for stale in self.folder.glob("model*.safetensors*") if self.resume else ():
                with target_errors(stale):
                    if stale.name not in self.shards:
                        stale.unlink()
            self._write_index()
            for file, shard in self.shards.items():
                path = self.folder / file
                head, begins, size = lay_out(shard)
                with target_errors(path):
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (0 if self.resume else os.O_EXCL), 0o666)
                    undo.callback(os.close, descriptor)
                    if os.fstat(descriptor).st_size == size and os.pread(descriptor, len(head), 0) == head:
                        self.kept |= {spec.name for spec in shard}
                    else:
                        os.ftruncate(descriptor, 0)
                        os.ftruncate(descriptor, size)
                        _pwrite(descriptor, memoryview(head), 0)
                self._places |= {name: (descriptor, path, at) for name, at in begins.items()}
                self.files[path] = OpenFile(path, descriptor, len(head), size)
            self._closing = undo.pop_all()
        return self

    def write(self, spec: TensorSpec, row: int, data: memoryview) -> None:
        """Write whole rows of a tensor, beginning at `row` of its dim 0.

        Raises:
            TargetError: the disk refuses (it is full, say).
        """
        descriptor, path, at = self._places[spec.name]
        with target_errors(path):
            _pwrite(descriptor, data, at + row * _row_bytes(spec))

    def read(self, spec: TensorSpec, row: int, rows: int) -> bytes:
        """What stands in the file at these rows."""
        descriptor, path, at = self._places[spec.name]
        with target_errors(path):
            return os.pread(descriptor, rows * _row_bytes(spec), at + row * _row_bytes(spec))

    def extent(self, spec: TensorSpec, row: int = 0, rows: int | None = None) -> tuple[Path, int, int]:
        """The file of these rows (None: all from `row` on), and where in it their bytes begin and end."""
        _, path, at = self._places[spec.name]
        end = at + spec.nbytes if rows is None else at + (row + rows) * _row_bytes(spec)
        return path, at + row * _row_bytes(spec), end

    def _write_index(self) -> None:
        # Before any tensor, so that whoever opens the folder meanwhile finds them all.
        if len(self.shards) > 1:
            weight_map = {spec.name: file for file, shard in self.shards.items() for spec in shard}
            index = {"metadata": {"total_size": sum(s.nbytes for s in self.specs)}, "weight_map": weight_map}
            with target_errors(self.folder / INDEX):
                (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def finish(self) -> list[Path]:
        """Force everything to disk, and return the files, the index last where there is one."""
        for file in self.files.values():
            with target_errors(file.path):
                os.fsync(file.descriptor)
        return [self.folder / file for file in (*self.shards, *([INDEX] if len(self.shards) > 1 else []))]

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def _row_bytes(spec: TensorSpec) -> int:
    return spec.nbytes // max((spec.shape or (1,))[0], 1)


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
    with FolderWriter(folder, specs, max_shard_bytes) as writer:
        for spec in specs:
            row = 0
            for count, data in _pieces(spec, produce(spec)):
                writer.write(spec, row, data)
                row += count
                if progress is not None:
                    progress(len(data))
        return writer.finish()


def _pieces(spec: TensorSpec, pieces: Iterable["torch.Tensor"]) -> Iterator[tuple[int, memoryview]]:
    """Yield rows and bytes of a tensor's pieces, once each is seen to fit and, at the end, to make up the whole."""
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
        yield count, as_bytes(piece)
    if done != rows:
        raise ValueError(f"{spec.name}: pieces of {done} rows in all, its shape {spec.shape} has {rows}")


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pwrite(descriptor: int, data: memoryview, at: int) -> None:
    while len(data):  # the system moves at most 2 GB a call
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
