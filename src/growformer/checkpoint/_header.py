"""The safetensors format: dtypes, headers read with suspicion, headers laid out for writing.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, offsets into the
data), and the data without gaps (the README of huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.checkpoint.folder import parse_json, shown
from growformer.errors import SourceError

if TYPE_CHECKING:
    import torch

DTYPES = ("F64", "F32", "BF16", "F16")
"""Names of the dtypes whose tensors can grow."""

_MAX_HEADER = 100_000_000
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_TORCH = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TORCH |= {"I64": "int64", "I32": "int32", "I16": "int16", "BOOL": "bool"}
_MAX_DIMS = 64


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk: its dtype by the format's name, and its bytes `start` to `stop` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; ValueError for a dtype that is not."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _TORCH:
            raise ValueError(f"{self.name}: {self.dtype} is not written; dtypes that are: {', '.join(_TORCH)}")

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def torch_dtype(name: str) -> "torch.dtype":
    """Return the torch dtype of a format's dtype name.

    Raises:
        SourceError: a dtype that is not read, such as a quantised one.
    """
    import torch

    if name not in _TORCH:
        raise SourceError(f"{_unread(name)}; dtypes that are read: {', '.join(_TORCH)}")
    found: torch.dtype = getattr(torch, _TORCH[name])
    return found


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the format's name of a torch dtype; ValueError for one that is not written."""
    for name, torch_name in _TORCH.items():
        if str(dtype) == f"torch.{torch_name}":
            return name
    raise ValueError(f"{dtype} is not written; dtypes that are: {', '.join(_TORCH)}")


def require_growable(info: TensorInfo) -> None:
    """Refuse a tensor whose dtype cannot grow: quantised weights, and integers or masks that are no weights.

    Raises:
        SourceError: the dtype is none of `DTYPES`.
    """
    if info.dtype not in DTYPES:
        raise SourceError(
            f"{info.file}: tensor {info.name!r}: {_unread(info.dtype)}; dtypes that grow: {', '.join(DTYPES)}"
        )


def _unread(dtype: str) -> str:
    if dtype in ("I8", "U8") or dtype[:2] in ("F8", "F6", "F4"):
        return f"stored as {dtype}, it is quantised, and must be dequantised first"
    return f"stored as {dtype}, it holds no floating-point weights (packed integers must be dequantised first)"


def pread(path: Path, descriptor: int, start: int, size: int) -> bytearray:
    buffer = bytearray(size)
    pread_into(path, descriptor, start, memoryview(buffer))
    return buffer


def pread_into(path: Path, descriptor: int, start: int, view: memoryview) -> None:
    size, done = len(view), 0
    while done < size:  # the system moves at most 2 GB a call
        try:
            count = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise SourceError(f"{path}: ends at byte {start + done}, expected {size - done} more; it was cut")
        done += count


def read_header(path: Path, descriptor: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    total = os.fstat(descriptor).st_size
    if total < 8:
        raise SourceError(f"{path}: {total} bytes, too short for a safetensors file")
    length = int.from_bytes(pread(path, descriptor, 0, 8), "little")
    if length > min(_MAX_HEADER, total - 8):
        raise SourceError(
            f"{path}: its first 8 bytes ask for a header of {length} bytes, in a file of {total} (and at most "
            f"{_MAX_HEADER}): cut, or no safetensors file"
        )
    text = pread(path, descriptor, 8, length)
    if text[:1] != b"{":
        raise SourceError(f"{path}: its header does not begin with '{{': no safetensors file")
    header = parse_json(bytes(text), path)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise SourceError(f"{path}: __metadata__ is no table of strings")
    found = [_entry(path, 8 + length, name, entry) for name, entry in header.items()]
    end = 8 + length
    infos = {}
    for info in sorted(found, key=lambda info: (info.start, info.stop)):
        if info.start != end:
            kind = "overlaps the one before it" if info.start < end else "leaves a hole before it"
            where = f"{path}: tensor {shown(info.name)}"
            raise SourceError(f"{where} begins at byte {info.start}, expected {end}: it {kind}")
        end, infos[info.name] = info.stop, info
    if end != total:
        kind = "the file was cut" if end > total else "bytes that no tensor owns"
        raise SourceError(f"{path}: its tensors end at byte {end}, the file at {total}: {kind}")
    return infos, about


def _entry(path: Path, data: int, name: str, entry: Any) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SourceError(f"{where}: its entry is not dtype, shape and data_offsets: {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise SourceError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(_BITS)}")
    for numbers, what in ((shape, "shape"), (offsets, "data_offsets")):
        # type(), for JSON's true is an int to isinstance
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise SourceError(f"{where}: {what} is no list of sizes: {shown(numbers)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(f"{where}: data_offsets are no begin and end: {shown(offsets)}")
    if len(shape) > _MAX_DIMS:  # before the product, which a long list of large numbers makes endless
        raise SourceError(f"{where}: {len(shape)} dims, at most {_MAX_DIMS} make a tensor")
    if math.prod(filter(None, shape)) * _BITS[dtype] >= 2**63:  # strides, which a dim of 0 does not make small
        raise SourceError(f"{where}: {dtype} of shape {shown(shape)}: no machine counts so far")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise SourceError(
            f"{where}: {dtype} of shape {shape} takes {bits} bits, its offsets {offsets} hold "
            f"{8 * (offsets[1] - offsets[0])}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data + offsets[0], data + offsets[1])


def lay_out(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Return a file's head (length and header), where in the file each tensor begins, and the size of the file.

    Wider dtypes come first, as in the safetensors library, so that every tensor begins at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in sorted(specs, key=lambda spec: -_BITS[spec.dtype]):
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    begins = {spec.name: len(head) + header[spec.name]["data_offsets"][0] for spec in specs}
    return head, begins, len(head) + end
