"""Grown checkpoints outside transformers: llama.cpp, ONNX Runtime, PEFT and lm-eval; docs/serving.md is its output.

    python tools/serving/run.py

makes a virtual environment of its own (llama.cpp is compiled: that takes minutes, a C++ compiler and cmake), grows
stories260K in several ways, runs the original and the grown models in each of these programs, writes what was measured
to build/serving/results.json and the page made of it, and exits with 1 where a verdict is not as expected. No part of
`make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LLAMA = "llama-cpp-python"
NEEDED = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
"""What of llama.cpp, inside that source distribution, converts a Hugging Face folder."""


def pip(python: Path, *words: str | Path) -> None:
    """Run pip in the environment.

    Raises:
        CalledProcessError: it fails.
    """
    # One compiler at a time, and none that is tuned to this machine alone.
    options = {"CMAKE_BUILD_PARALLEL_LEVEL": "1", "CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"}
    command = [python, "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run([str(word) for word in command], check=True, env={**options, **os.environ})


def environment(folder: Path) -> Path:
    """The Python of an environment with what requirements.txt says and growformer needs; made where there is none."""
    python, wanted = folder / "bin" / "python", (HERE / "requirements.txt").read_text(encoding="utf-8")
    stamp = folder / "installed.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        venv.create(folder, with_pip=True)
    first = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    pip(python, "install", "--quiet", first)
    # What growformer needs comes with it; the sources at hand go before this copy of them, on PYTHONPATH.
    pip(python, "install", "--quiet", "-r", HERE / "requirements.txt", ROOT)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def converter(python: Path, folder: Path) -> Path:
    """llama.cpp's converter, of the release that the environment runs; unpacked where it is not there yet."""
    script = next(folder.glob(f"*/vendor/llama.cpp/{NEEDED[0]}"), None)
    if script is not None:
        return script
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = next(line for line in lines if line.startswith(LLAMA + "=="))
    words = ("--quiet", "--no-deps", "--no-binary", LLAMA, "--dest", folder, wanted)
    if not list(folder.glob("*.tar.gz")):
        pip(python, "download", *words)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files:
            inside = member.name.partition("vendor/llama.cpp/")[2]
            if inside.partition("/")[0] in NEEDED:
                files.extract(member, folder, filter="data")
    return next(folder.glob(f"*/vendor/llama.cpp/{NEEDED[0]}"))


def source(given: Path | None) -> Path:
    """The folder of stories260K: the one given, or that of the data beside the project."""
    beside = Path(os.environ.get("GROWFORMER_DATA", ROOT.parent / "shared" / "data")) / "stories260K"
    folder = given or beside
    if not (folder / "config.json").is_file():
        sys.exit(f"no checkpoint at {folder}: give --source, the folder of stories260K")
    return folder.resolve()


def main() -> int:
    """Make the environment, measure in it, write the page."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--source", type=Path, help="the folder of stories260K (default: the data beside the project)")
    words.add_argument("--work", type=Path, default=ROOT / "build" / "serving", help="where everything is kept")
    words.add_argument("--venv", type=Path, help="the environment to make or to use (default: WORK/venv)")
    words.add_argument("--page", type=Path, default=ROOT / "docs" / "serving.md", help="the page to write")
    words.add_argument("--only", nargs="*", metavar="PROGRAM", help="llama.cpp, onnxruntime, peft, lm-eval; no page")
    given = words.parse_args()
    src, work = source(given.source), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = environment((given.venv or work / "venv").absolute())
    script = converter(python, work / "sdist")
    told = {"source": str(src), "work": str(work), "converter": str(script), "only": given.only}
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    alone = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, HERE / "measure.py", json.dumps(told)], env={**os.environ, **alone})
    if done.returncode or given.only:
        return done.returncode
    from page import failures, page

    results = json.loads((work / "results.json").read_text(encoding="utf-8"))
    given.page.write_text(page(results), encoding="utf-8")
    wrong = failures(results)
    print(*wrong or ["every verdict is as expected"], sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
