"""What reading a hostile folder may do: refuse it in words, or read it as the safetensors library does.

An accepted folder is read in full and compared, file by file and tensor by tensor. What the reader opens is watched by
an audit hook, which sees every open of this process, whoever asks for it.
"""

import ast
import contextlib
import inspect
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from growformer.checkpoint import TensorFiles, TensorInfo, _header, folder, safetensors_io
from growformer.errors import SourceError
from tests.checkpoint.hostile import INDEX, SINGLE, clear, make

READING = (_header, folder, safetensors_io)
FORBIDDEN = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
FORBIDDEN |= {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "import",
    "exec",
}
Line = tuple[str, int]


class Broken(AssertionError):
    """The reader did what it must not."""


class Watch:
    """An audit hook, for as long as it is on: nothing outside a folder is opened, and nothing anywhere is changed.

    It raises in the place of the call it objects to, so a pipe, say, is not waited for; and again at the end, in case
    the reader hid that.
    """

    def __init__(self) -> None:
        self.root: str | None = None
        self.faults: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by Python, for good: a hook cannot be taken off."""
        if self.root is None or (event != "open" and event not in FORBIDDEN):
            return
        what, flags = arguments[0], arguments[2] if event == "open" else 0
        if event != "open" or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            self.faults.append(f"{event} of {what!r}, flags {flags:o}")
        elif not os.path.realpath(what).startswith(self.root + os.sep):
            self.faults.append(f"opens {what!r}, outside its folder")
        elif os.path.exists(what) and not os.path.isfile(what):
            self.faults.append(f"opens {what!r}, no regular file")
        else:
            return
        raise Broken(self.faults[-1])

    @contextlib.contextmanager
    def stays(self, inside: Path) -> Iterator[None]:
        """Broken if the body opens anything outside a folder, or anything to write, or changes or runs anything."""
        self.root = os.path.realpath(inside)
        self.faults.clear()
        try:
            yield
        finally:
            self.root = None
        if self.faults:
            raise Broken(self.faults[0])


def refusals() -> dict[Line, str]:
    """Every `raise SourceError` of the reading code, by file and first line."""
    found = {}
    for module in READING:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Raise) and is_refusal(node):
                found[module.__name__, node.lineno] = ast.unparse(node)
    return found


def is_refusal(node: ast.AST) -> bool:
    """Whether it is a `raise SourceError(...)`."""
    return (
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func).endswith("SourceError")
    )


def lines(error: BaseException | None) -> set[Line]:
    """Where an error, and those it came from, were raised."""
    found: set[Line] = set()
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None:
            found.add((trace.tb_frame.f_globals["__name__"], trace.tb_lineno))
        error = error.__cause__ or error.__context__
    return found


def examine(model: Path, watch: Watch) -> set[Line] | None:
    """Open the folder and, if that is granted, everything in it.

    Returns:
        The lines that refused; None for a folder that was accepted.

    Raises:
        Broken: it is neither refused in words nor read right.
    """
    refused: set[Line] = set()
    try:
        with watch.stays(model), TensorFiles.open(model) as files:
            got = {name: read(files, name, refused) for name in files}
            metadata, infos = files.metadata, dict(files)
    except SourceError as error:
        message = str(error)
        if not message.startswith(str(model)) or not message.isprintable() or len(message) > len(str(model)) + 3000:
            raise Broken(f"a poor message: {message[:500]!r}") from error
        return lines(error)
    except Broken:
        raise
    except BaseException as error:
        raise Broken(f"{type(error).__name__}: {error}"[:500]) from error
    agree(model, files, infos, got, metadata)
    return refused or None


def read(files: TensorFiles, name: str, refused: set[Line]) -> torch.Tensor | None:
    try:
        return files.read(name)
    except SourceError as error:
        if f"tensor {name!r}: stored as {files[name].dtype}" not in str(error):
            raise
        refused |= lines(error)
        return None


def agree(
    model: Path,
    files: TensorFiles,
    infos: dict[str, TensorInfo],
    got: dict[str, torch.Tensor | None],
    metadata: dict[str, str],
) -> None:
    """Broken unless the index, the sizes of the files and the safetensors library say what the reader said."""
    if not (model / SINGLE).exists():
        index = json.loads((model / INDEX).read_bytes())["weight_map"]
        if {name: model / place for name, place in index.items()} != {n: info.file for n, info in infos.items()}:
            raise Broken(f"the index says {index}, the reader {infos}")
    theirs_metadata: dict[str, str] = {}
    for path in files.files:
        mine = {name: info for name, info in infos.items() if info.file == path}
        head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        if head + sum(info.stop - info.start for info in mine.values()) != path.stat().st_size:
            raise Broken(f"the tensors do not make up {path.name}: {mine}")
        try:
            with safe_open(path, "pt") as theirs:
                if set(theirs.keys()) != set(mine):
                    raise Broken(f"tensors {sorted(mine)}, the library has {sorted(theirs.keys())}")
                theirs_metadata = dict(theirs.metadata() or {}) | theirs_metadata
                for name, info in mine.items():
                    part = theirs.get_slice(name)
                    if (info.dtype, list(info.shape)) != (part.get_dtype(), part.get_shape()):
                        raise Broken(f"{info}, the library has {part.get_dtype()} {part.get_shape()}")
                    tensor = got[name]
                    if tensor is not None:
                        same(tensor, theirs.get_tensor(name))
        except SafetensorError as error:
            raise Broken(f"accepted, and the library refuses it: {error}") from error
    if metadata != theirs_metadata:
        raise Broken(f"metadata {metadata}, the library has {theirs_metadata}")


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bytes_of(a), bytes_of(b)):
        raise Broken(f"{a} is read where the library reads {b}")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def is_json(text: bytes | None) -> bool:
    if text is None:
        return False
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


def fuzz(model: Path, watch: Watch, cases: int, seed: int) -> Iterator[tuple[str, bytes | None, set[Line] | None]]:
    """Draw and examine cases; yields what was changed, the JSON text of the case, and the lines that refused it.

    Raises:
        Broken: as `examine`, naming the case.
    """
    rng = random.Random(seed)
    for i in range(cases):
        clear(model)
        case = make(rng, model)
        try:
            yield *case, examine(model, watch)
        except Broken as error:
            raise Broken(f"case {i} of seed {seed}, {case.field}, {(case.text or b'')[:500]!r}: {error}") from error
