"""Hostile model folders by the thousand: each is refused in words, or read as the safetensors library reads it."""

import ast
import inspect
import json
import os
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from growformer.checkpoint import TensorFiles, TensorInfo, read_config, require_growable
from growformer.checkpoint import _header as headers
from growformer.checkpoint import folder as folders
from growformer.checkpoint import safetensors_io as files
from growformer.errors import SourceError
from tests.checkpoint.hostile import INDEX, OUTSIDE, SINGLE, clear, dump, some_file
from tests.checkpoint.oracle import READING, Broken, Line, Watch, fuzz, is_json, is_refusal, lines, refusals

CASES = 12_000
SEED = 2308
Check = Callable[..., object]


@pytest.fixture(scope="module")
def watch() -> Watch:
    torch.frombuffer(bytearray(4), dtype=torch.float32)  # its imports open files
    return Watch()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / OUTSIDE).mkdir()
    header, data = some_file(random.Random(0), 0)
    text = dump(header).encode()
    (tmp_path / OUTSIDE / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


# What no folder can do by itself, or what is not reached through `TensorFiles.open`.


def a_file(model: Path) -> Path:
    header, data = some_file(random.Random(0), 0)
    text = dump(header).encode()
    (model / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return model / SINGLE


def cut_while_open(model: Path, _: pytest.MonkeyPatch) -> None:
    path = a_file(model)
    with TensorFiles.open(model) as opened:
        os.truncate(path, path.stat().st_size - 1)
        for name in opened:
            opened.read(name)


def disk_that_fails(model: Path, patch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(5, "Input/output error")

    a_file(model)
    patch.setattr(os, "preadv", preadv)
    TensorFiles.open(model)


def folder_that_may_not_be_read(model: Path, patch: pytest.MonkeyPatch) -> None:
    def listdir(*_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    patch.setattr(os, "listdir", listdir)
    TensorFiles.open(model)


def huge_index(model: Path, _: pytest.MonkeyPatch) -> None:
    (model / INDEX).write_bytes(b"{}")
    os.truncate(model / INDEX, 10**12)  # sparse: takes no disk
    TensorFiles.open(model)


def config(value: object) -> Callable[[Path, pytest.MonkeyPatch], object]:
    def named(model: Path, _: pytest.MonkeyPatch) -> None:
        if value is not ...:
            (model / "config.json").write_text(json.dumps(value))
        read_config(model)

    return named


def packed(model: Path, _: pytest.MonkeyPatch) -> None:
    require_growable(TensorInfo("t", "I32", (2,), model / SINGLE, 0, 8))


NAMED: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "cut while open": (cut_while_open, "it was cut"),
    "a disk that fails": (disk_that_fails, "Input/output error"),
    "a folder that may not be read": (folder_that_may_not_be_read, "Permission denied"),
    "an index of 1 TB": (huge_index, r"index.json: 1.0 TB, and at most 100.0 MB of JSON is read"),
    "packed": (packed, "holds no floating-point weights"),
    "no config": (config(...), "has no config.json"),
    "a config that is a list": (config([]), "config.json: holds a JSON list"),
    "a quantised config": (config({"quantization_config": {"quant_method": "x"}}), "config.json: .* quantised"),
    "a config with code": (config({"auto_map": {"AutoModel": "m.M"}}), "config.json: auto_map asks for code"),
    "a config with kernels": (config({"attn_implementation": "some/kernel"}), "config.json: attn_implementation = "),
    "no folder": (lambda model, _: read_config(model / "gone"), "gone: does not exist"),
    "a name too long": (lambda model, _: read_config(model / ("x" * 300)), "does not exist"),
    "a name too long, for weights": (lambda model, _: TensorFiles.open(model / ("x" * 300)), "is no folder"),
}


def named(model: Path, case: str) -> set[Line]:
    """Run a case of `NAMED`; where it was refused."""
    clear(model)
    act, reason = NAMED[case]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SourceError, match=reason) as caught:
        act(model, patch)
    assert str(model) in str(caught.value)
    return lines(caught.value)


def test_thousands_of_folders_with_one_field_changed(model: Path, watch: Watch) -> None:
    """Each is refused or right; at least half get past the JSON parser; and no refusal in the code goes unused."""
    lowest = os.dup(1)
    os.close(lowest)
    reached: Counter[Line] = Counter()
    count: Counter[str] = Counter()
    for field, text, refused in fuzz(model, watch, CASES, SEED):
        count["cases"] += 1
        count["JSON"] += is_json(text)
        count["accepted"] += refused is None
        count["index" if field.startswith("index") else "header or file"] += 1
        reached.update(refused or ())
    by_fuzz = {line for line in refusals() if reached[line]}
    for case in NAMED:
        reached.update(named(model, case))
    unused = {line: text for line, text in refusals().items() if not reached[line]}
    print(f"\n{dict(count)}; refusals: {len(by_fuzz)} of {len(refusals())} reached by them, others by named cases")
    for line, refusal in refusals().items():
        print(f"  {reached[line]:6} {'  ' if line in by_fuzz else 'n:'} {line[0]}:{line[1]} {refusal[:100]}")
    assert not unused, "no case reaches these refusals"
    assert count["cases"] >= 10_000 and count["JSON"] >= 0.5 * count["cases"] and count["accepted"] >= 100
    assert len(by_fuzz) >= 0.7 * len(refusals()), "most are reached without a case made for them"
    free = os.dup(1)
    os.close(free)
    assert free == lowest, "a file was left open"


def test_pickled_weights_with_a_config_that_leads_out(model: Path, watch: Watch) -> None:
    """The message names the config's class, but not at the price of a file elsewhere."""
    outside = model.parent / OUTSIDE / "config.json"
    outside.write_text('{"architectures": ["Secret"]}')
    (model / "pytorch_model.bin").touch()
    (model / "config.json").symlink_to(outside)
    with watch.stays(model), pytest.raises(SourceError, match="pickled weights") as caught:
        TensorFiles.open(model)
    assert "Secret" not in str(caught.value)


# Controls: the oracle sees a reader that lacks a check.


def without(function: Check, nth: int, patch: pytest.MonkeyPatch) -> str:
    """Put a copy of a function, its n-th refusal taken out, in its place everywhere; returns that refusal."""
    module = sys.modules[function.__module__]
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    gone = [node for node in ast.walk(tree) if is_refusal(node)][nth]
    for node in ast.walk(tree):
        for block in ("body", "orelse"):
            body = getattr(node, block, None)
            if isinstance(body, list) and gone in body:
                body[body.index(gone)] = ast.copy_location(ast.Pass(), gone)
    made: dict[str, Any] = {}
    exec(compile(tree, "control", "exec"), module.__dict__, made)
    for user in READING:
        if getattr(user, function.__name__, None) is function:
            patch.setattr(user, function.__name__, made[function.__name__])
    return ast.unparse(gone)


DOUBLED = (
    "too short for",  # the bytes that are missing are missed when they are read
    "dims, at most",  # against the time that a long product takes; the sizes are compared next
    "of JSON is read",  # against the memory that a large file takes
    "_no_safetensors",  # a better word for an index that is not there
)
"""Refusals without which another one answers for this fuzzer's small files."""


def checks() -> list[Any]:
    """Every other refusal on the way from a folder to its tensors."""
    functions: list[Check] = [
        headers.read_header,
        headers._entry,
        folders.inside,
        folders.parse_json,
        folders.read_json,
    ]
    functions += [files._read_index, files._compare, files._open]
    found = []
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        texts = [ast.unparse(node) for node in ast.walk(tree) if is_refusal(node)]
        found += [(function, i) for i, text in enumerate(texts) if not any(part in text for part in DOUBLED)]
    return found


@pytest.mark.parametrize(("function", "nth"), checks())
def test_a_reader_that_lacks_a_check_is_found_out(
    model: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, function: Check, nth: int
) -> None:
    gone = without(function, nth, monkeypatch)
    try:
        for _ in fuzz(model, watch, 3000, SEED):
            pass
    except Broken as error:
        print(f"without {gone[:90]}: {str(error)[:300]}")
    else:
        pytest.fail(f"nothing found without {gone}")
