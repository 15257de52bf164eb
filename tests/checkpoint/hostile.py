"""Model folders with one field changed: the cases of test_fuzz.py.

A case is drawn from a `random.Random`: a valid folder, of one file or of shards, in which one thing is not as it was.
Some changes leave the folder valid, so that acceptance is tested too.
"""

import contextlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OUTSIDE = "outside"
"""Name of a folder beside the model's, whose files are fine and must not be opened."""

# fmt: off
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64, "F4": 4, "F6_E2M3": 6,
}
DTYPES = ["F32", "F16", "BF16", "F64"] * 3 + list(BITS)


class Raw(str):
    """JSON text that goes out as it is."""


class Table(list[tuple[Any, Any]]):
    """A JSON object as pairs, so that a key can be there twice."""


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, 0.5, 1e308,
    Raw("-0"), Raw("1e2"), Raw("1E400"), Raw("NaN"), Raw("-Infinity"), Raw("9" * 5000), Raw("01"), Raw("0x10"),
    "", "2", "F32", "one", "\0", "\33[2J", "é", Raw('"\\ud800"'), Raw('"\\uD83D\\uDE00"'), Raw("'x'"), "x" * 5000,
    [], [0], [-1], [[]], [[0, 8]], [True], [0.0], ["0", "8"], [None], [0, 0], [2**62, 2**62, 0], [2**62] * 64,
    [1] * 64, [1] * 65, [0] * 70, Table(), Table([("a", 1)]), Table([("a", "b")]), Table([("a", "b"), ("a", "b")]),
]
NAMES = [
    "", " ", "__metadata__", "__METADATA__", "dtype", "t0", "../t0", "/t0", "t/0", "t\\0", ".", "..", "\0", "\33[2J",
    "ü" * 7, "名", "😀", "x" * 20_000, Raw('"\\u0074\\u0030"'), Raw('"\\ud800"'), Raw('"\\udc00x"'), Raw("t0"),
    Raw("1"),
]
PLACES: list[Any] = [
    f"../{OUTSIDE}/w.safetensors", f"x/../../{OUTSIDE}/w.safetensors", f"..\\{OUTSIDE}\\w.safetensors", "/etc/passwd",
    f"link/../../{OUTSIDE}/w.safetensors", "link/w.safetensors", "/dev/zero", "/dev/stdin", "/proc/self/mem", "", ".",
    "./", "..", "/", "//", "~", "~/w.safetensors", "C:w.safetensors", "C:\\w", "\\\\host\\share\\w", "a" * 300, "\0",
    "w\0", "w\n", "\33[2J", Raw('"\\ud800"'), Raw('"\\udcff"'), "é", "folder", "pipe", "device", "socket", "dangling",
    "loop", "gone", "one.safetensors", "two.safetensors", "./one.safetensors", "one.safetensors/", "folder/../two", "*",
    "one.safetensors/.", "one.safetensors/x", "One.safetensors", "one.safetensors ", INDEX, SINGLE, "a/" * 3000 + "b",
]
# fmt: on


class Case(NamedTuple):
    """What was changed, and the JSON text that a reader of the folder meets there; None where it meets none."""

    field: str
    text: bytes | None


def dump(value: Any) -> str:
    """JSON text of plain data, `Raw` and `Table`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Table):
        return "{" + ",".join(f"{dump(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def some_file(rng: random.Random, first: int) -> tuple[Table, bytes]:
    """The header and the data of a valid file, whose tensors are t<first>, t<first + 1>, ..."""
    header, end = Table(), 0
    for i in range(first, first + rng.randint(1, 3)):
        dtype, shape = rng.choice(DTYPES), [rng.choice([1, 2, 3, 4, 0]) for _ in range(rng.randint(0, 3))]
        if BITS[dtype] % 8:
            shape.append(4)
        count = 1
        for size in shape:
            count *= size
        begin, end = end, end + count * BITS[dtype] // 8
        header.append((f"t{i}", Table([("dtype", dtype), ("shape", shape), ("data_offsets", [begin, end])])))
    rng.shuffle(header)
    if rng.random() < 0.5:
        header.insert(0, ("__metadata__", Table([("format", "pt"), ("note", "x")])))
    return header, rng.randbytes(end)


def value(rng: random.Random) -> Any:
    """A value that few fields should have."""
    if rng.random() < 0.05:
        depth = rng.choice([3, 100, 500, rng.randint(900, 1000), 5000])
        return Raw(rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]))
    return rng.choice(VALUES)


def put(table: Table, i: int, new: Any) -> None:
    """Give the i-th key a new value."""
    table[i] = (table[i][0], new)


def change_key(rng: random.Random, table: Table, keys: list[Any]) -> str:
    """Rename, drop, double or add a key."""
    if not table:
        table.append((rng.choice(keys), value(rng)))
        return "added"
    i, kind = rng.randrange(len(table)), rng.choice(["renamed", "renamed", "dropped", "doubled", "added"])
    if kind == "renamed":
        table[i] = (rng.choice([*keys, table[0][0]]), table[i][1])
    elif kind == "dropped":
        table.pop(i)
    elif kind == "doubled":
        table.insert(rng.randrange(len(table) + 1), (table[i][0], rng.choice([table[i][1], value(rng)])))
    else:
        table.append((rng.choice(keys), rng.choice([table[i][1], value(rng)])))
    return kind


def change_list(rng: random.Random, numbers: list[Any], others: list[int]) -> Any:
    """A list with one number changed, dropped, added or swapped; or something else than that list."""
    numbers = list(numbers)
    kind = rng.choice(["number", "number", "step", "step", "other", "other", "all", "add", "drop", "swap"])
    i = rng.randrange(len(numbers)) if numbers else 0
    if kind == "all" or (not numbers and kind != "add"):
        return value(rng)
    if kind == "number":
        numbers[i] = value(rng)
    elif kind == "step":
        numbers[i] += rng.choice([-1, 1, 8, -8, 100, -(2**63), 2**63, 2**64])
    elif kind == "other":
        numbers[i] = rng.choice(others)
    elif kind == "add":
        numbers.insert(i, rng.choice([0, 1, 2, 2**62, value(rng)]))
    elif kind == "drop":
        numbers.pop(i)
    else:
        numbers.reverse()
    return numbers


def change_header(rng: random.Random, header: Table, size: int) -> str:
    """Change one field of a header in place."""
    tensors = [i for i, (name, _) in enumerate(header) if name != "__metadata__"]
    i = rng.choice(tensors)
    entry: Table = header[i][1]
    kind = rng.choice(["dtype", "shape", "shape", "offsets", "offsets", "offsets", "entry", "name", "metadata"])
    if kind == "dtype":
        put(entry, 0, rng.choice([*BITS, "f32", "F31", "F32 ", "", "F128", value(rng), value(rng)]))
    elif kind == "shape":
        put(entry, 1, change_list(rng, entry[1][1], [0, 1, 2, 3, 4, 5, 2**62, 2**63 - 1]))
    elif kind == "offsets":
        ends = [end for j in tensors for end in header[j][1][2][1]]
        put(entry, 2, change_list(rng, entry[2][1], [*ends, size, size + 1, size + 4096, 2**63 - 1]))
    elif kind == "entry":
        if rng.random() < 0.3:
            put(header, i, value(rng))
        else:
            kind += " " + change_key(rng, entry, ["dtype", "shape", "data_offsets", "strides", "", Raw("1")])
    elif kind == "name":
        kind += " " + change_key(rng, header, NAMES)
    else:
        about = rng.choice([value(rng), Table([("format", value(rng))]), Table([(rng.choice(NAMES), "x")])])
        if header[0][0] == "__metadata__":
            put(header, 0, about)
        else:
            header.append(("__metadata__", about))
    return f"header: {kind}"


def change_bytes(rng: random.Random, text: bytes) -> tuple[str, bytes]:
    """Change, add or drop one byte, or a few at an end; or replace the whole."""
    raw, at = bytearray(text), rng.randrange(len(text))
    kind = rng.choice(["byte", "byte", "byte", "add", "drop", "before", "after", "cut", "whole"])
    byte = rng.choice([rng.randrange(256), *b'0123456789"{}[],:-. eEFBt\\'])
    if kind == "byte":
        raw[at] = byte
    elif kind == "add":
        raw.insert(at, byte)
    elif kind == "drop":
        del raw[at]
    elif kind == "before":
        raw[:0] = rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"\0", b"["])
    elif kind == "after":
        raw += rng.choice([b" ", b"\n\t ", b"\0", b"{}", b"}", b"x"])
    elif kind == "cut":
        del raw[at:]
    else:
        raw[:] = dump(value(rng)).encode()
    return kind, bytes(raw)


def change_file(rng: random.Random, text: bytes, data: bytes) -> tuple[Case, bytes]:
    """A file of a valid header and its data, changed outside both."""
    head = len(text).to_bytes(8, "little")
    kind = rng.choice(["length", "length", "cut", "longer"])
    if kind == "length":
        near = [len(text) + rng.choice([-1, 1, 8, -8]), len(text) + len(data), 0, 1, 2, 100_000_000, 100_000_001]
        length = rng.choice([*near, 2**63, 2**64 - 1, rng.getrandbits(64), rng.getrandbits(16)])
        head = max(length, 0).to_bytes(8, "little")
        read = (text + data)[:length] if 0 < length <= len(text) + len(data) else None
        return Case("file: length", read), head + text + data
    whole = head + text + data
    if kind == "cut":
        at = rng.choice([rng.randrange(len(whole)), len(whole) - 1, rng.randrange(10), 8 + len(text)])
        return Case("file: cut", text if at >= 8 + len(text) else None), whole[:at]
    return Case("file: longer", text), whole + rng.choice([b"\0", b"x" * 8, rng.randbytes(100)])


def change_index(rng: random.Random, index: Table, files: list[str]) -> str:
    """Change one field of an index in place."""
    places: Table = index[1][1]
    kind = rng.choice(["place"] * 5 + ["type", "type", "name", "name", "map", "top", "metadata"])
    if kind == "place":
        put(places, rng.randrange(len(places)), rng.choice([*PLACES, *files]))
    elif kind == "type":
        put(places, rng.randrange(len(places)), value(rng))
    elif kind == "name":
        kind += " " + change_key(rng, places, NAMES)
    elif kind == "map":
        put(index, 1, rng.choice([value(rng), value(rng), list(files), Table([("t0", files[0])])]))
    elif kind == "top":
        kind += " " + change_key(rng, index, ["weight_map", "metadata", "", "Weight_map"])
    else:
        put(index, 0, value(rng))
    return f"index: {kind}"


def device(path: Path) -> None:
    """A device file, where the user may make one; a folder elsewhere, which is no file either."""
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except OSError:
        path.mkdir()


def socket_file(path: Path) -> None:
    """A socket's file, named by its folder's descriptor, for the path of a socket has room for 100 bytes only."""
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{parent}/{path.name}")
    finally:
        os.close(parent)


def link(path: Path, to: Path | str) -> Path:
    """A link at `path`."""
    path.symlink_to(to)
    return path


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda path, moved: None,
    "folder": lambda path, moved: path.mkdir(),
    "pipe": lambda path, moved: os.mkfifo(path),
    "device": lambda path, moved: device(path),
    "socket": lambda path, moved: socket_file(path),
    "link out": lambda path, moved: path.symlink_to(moved),
    "link to a device": lambda path, moved: path.symlink_to("/dev/zero"),
    "link that climbs": lambda path, moved: path.symlink_to(os.path.relpath(moved, path.parent)),
    "link inside": lambda path, moved: [shutil.copy(moved, path.parent / "inner"), link(path, "inner")],
    "link to a folder": lambda path, moved: path.symlink_to("."),
    "dangling": lambda path, moved: path.symlink_to("gone"),
    "loop": lambda path, moved: path.symlink_to(path.name),
    "name of a link out": lambda path, moved: [link(path.parent / "l", moved), link(path, "l")],
}
"""What may stand in the place of a file, given its path and a good copy of it outside the folder."""


def clear(folder: Path) -> None:
    """Empty a folder."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def make(rng: random.Random, folder: Path) -> Case:
    """Fill an empty folder with a valid model, one thing in it changed; its neighbour `OUTSIDE` must exist."""
    files = [SINGLE] if rng.random() < 0.5 else ["one.safetensors", "two.safetensors"]
    sharded = len(files) > 1
    target = INDEX if sharded and rng.random() < 0.6 else rng.choice(files)
    level = rng.choices(["field", "bytes", "file", "kind"], [66, 17, 9, 8])[0]
    case, places, first = Case("", b""), Table(), 0
    for name in files:
        header, data = some_file(rng, first)
        tensors = [key for key, _ in header if key != "__metadata__"]
        first += len(tensors)
        places += [(key, name) for key in sorted(tensors)]
        field = ""
        if name == target and level == "field":
            field = change_header(rng, header, len(data))
        text = dump(header).encode()
        if name == target and level == "bytes":
            kind, text = change_bytes(rng, text)
            field = f"header: {kind}"
        whole = len(text).to_bytes(8, "little") + text + data
        case = Case(field or case.field, text if name == target else case.text)
        if name == target and level == "file":
            case, whole = change_file(rng, text, data)
        (folder / name).write_bytes(whole)
    if sharded:
        index = Table([("metadata", Table([("total_size", 8)])), ("weight_map", places)])
        changed = target == INDEX and level in ("field", "file")
        field = change_index(rng, index, files) if changed else ""
        text = dump(index).encode()
        if target == INDEX and level == "bytes":
            kind, text = change_bytes(rng, text)
            field = f"index: {kind}"
        case = Case(field, text) if target == INDEX else case
        (folder / INDEX).write_bytes(text)
        if field.startswith("index: place"):
            traps(folder)
    if level == "kind":
        kind = rng.choice(list(KINDS))
        moved = folder.parent / OUTSIDE / target
        os.replace(folder / target, moved)
        KINDS[kind](folder / target, moved)
        case = Case(f"{'index' if target == INDEX else 'file'}: {kind}", case.text)
    return case


def traps(folder: Path) -> None:
    """The things that `PLACES` names."""
    (folder / "folder").mkdir()
    (folder / "two").write_bytes(b"")
    os.mkfifo(folder / "pipe")
    device(folder / "device")
    socket_file(folder / "socket")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    with contextlib.suppress(FileExistsError):
        (folder / "link").symlink_to(folder.parent / OUTSIDE, target_is_directory=True)
