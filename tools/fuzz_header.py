"""Fuzz the safetensors header parser with feedback: `python tools/fuzz_header.py [libFuzzer options] [CORPUS]`.

Needs atheris, which nothing else here does (`pip install atheris`). Any exception other than SourceError, and any
file that is accepted and that the safetensors library refuses, ends the run. For two minutes: -max_total_time=120.
"""

import json
import os
import sys

import atheris

with atheris.instrument_imports(include=["growformer.checkpoint", "json"]):
    from growformer.checkpoint import _header
    from growformer.errors import SourceError

from pathlib import Path

from safetensors import deserialize

PATH = Path("fuzzed")
FILE = os.memfd_create("fuzzed")
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SEEDS: tuple[dict[str, object], ...] = (
    {},
    {"w": ENTRY},
    {"__metadata__": {"format": "pt"}, "w": ENTRY, "v": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}},
    {"a": {"dtype": "F4", "shape": [2, 0], "data_offsets": [0, 0]}},
)


def one_input(data: bytes) -> None:
    """Read `data` as a file; its first byte says whether the length of the header is to be put right."""
    data, honest = data[1:], data[:1] < b"\xf0"
    if honest:
        text, _, rest = data.partition(b"\n")
        data = len(text).to_bytes(8, "little") + text + rest
    os.ftruncate(FILE, 0)
    os.pwrite(FILE, data, 0)
    try:
        infos, _ = _header.read_header(PATH, FILE)
    except SourceError as error:
        if not str(error).startswith(str(PATH)):
            raise AssertionError(f"names no file: {error}") from error
        return
    theirs = {name: (found["dtype"], tuple(found["shape"])) for name, found in deserialize(data)}
    if theirs != {name: (info.dtype, info.shape) for name, info in infos.items()}:
        raise AssertionError(f"the library has {theirs}, the reader {infos}")


def main() -> None:
    """Run atheris; without a corpus of its own it starts from the valid headers above."""
    if all(word.startswith("-") for word in sys.argv[1:]):
        import tempfile

        corpus = Path(tempfile.mkdtemp(prefix="fuzz-header-"))
        for i, header in enumerate(SEEDS):
            (corpus / str(i)).write_bytes(b"\0" + json.dumps(header).encode() + b"\n" + bytes(10))
        sys.argv.append(str(corpus))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
