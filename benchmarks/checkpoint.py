"""Growing checkpoints on disk: seconds, bytes per second and memory of whole processes, beside cp and mergekit.

Random Llama checkpoints (bfloat16, head not tied) are grown by `growformer expand --prove structure`, one axis at a
time and all at once, in turn with a copy of the same bytes that is forced to the same disk, and, where layers alone
grow, with mergekit's passthrough (new layers are copies whose o_proj and down_proj are scaled by 0).

    python benchmarks/checkpoint.py --sizes 1,4 --axes all,hidden,layers --repeat 3 --json checkpoint.json
    python benchmarks/checkpoint.py --mergekit-venv mergekit-venv --axes layers

Times are of whole processes, imports included, until the bytes are on disk. Peak memory is what the system says of
each child (resident, mapped files included) beside the largest anonymous memory seen in samples.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llamas

# Only the standard library up here: a child's peak starts at what its parent held when it was made.

VOCAB = 32_000
BASES = {  # GB: hidden, mlp, heads, kv_heads, head_dim; the size is reached by the number of layers
    0: (512, 1408, 8, 4, 64),
    1: (1536, 4096, 12, 4, 128),
    4: (2560, 6912, 20, 4, 128),
    16: (4096, 11008, 32, 8, 128),
}
GROWTHS: dict[str, dict[str, tuple[int, int]]] = {
    "hidden": {"hidden_size": (5, 4)},
    "mlp": {"intermediate_size": (5, 4)},
    "heads": {"num_attention_heads": (2, 1)},
    "kv_heads": {"num_attention_heads": (2, 1), "num_key_value_heads": (2, 1)},
    "head_dim": {"head_dim": (5, 4)},
    "layers": {"num_hidden_layers": (5, 4)},
}
GROWTHS["all"] = {field: (5, 4) for growth in GROWTHS.values() for field in growth}
MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")
SHARD = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class Run:
    """One run to the last byte on disk: wall clock, user and system seconds, peak resident and anonymous bytes."""

    seconds: float
    cpu: float
    rss: int
    anonymous: int
    output: str


def run(*commands: Sequence[str | Path]) -> Run:
    """Run commands one after another; their times add up, and the largest memory counts."""
    seconds, cpu, rss, anonymous, output = 0.0, 0.0, 0, 0, ""
    for command in commands:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            started = time.perf_counter()
            child = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err)
            pid = 0
            while not pid:
                anonymous = max(anonymous, _anonymous(child.pid))
                time.sleep(0.01)
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            seconds += time.perf_counter() - started
            child.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            output += out.read()
            if child.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))}: exit {child.returncode}\n{err.read()[-3000:]}")
        cpu += usage.ru_utime + usage.ru_stime
        rss = max(rss, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return Run(seconds, cpu, rss, anonymous, output)


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def drop_caches() -> bool:
    """Write everything out and drop the page cache; says whether the system let us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def config_of(gigabytes: float) -> dict[str, Any]:
    """The config of a Llama of about that many GB in bfloat16."""
    hidden, mlp, heads, kv, head = BASES[max(size for size in BASES if size <= gigabytes)]
    layer = 2 * hidden * head * (heads + kv) + 3 * hidden * mlp
    layers = max(4, round((gigabytes * 5e8 - 2 * VOCAB * hidden) / layer))
    return llamas.config_of(VOCAB, hidden, mlp, heads, kv, head, layers)


def request_of(config: dict[str, Any], axes: str) -> list[str]:
    """The KEY=VALUE words that grow these axes."""
    return [f"{field}={config[field] * a // b}" for field, (a, b) in GROWTHS[axes].items()]


def make_source(folder: Path, config: dict[str, Any]) -> None:
    """Write a random checkpoint in shards of 2 GB: one random buffer, read from another place for each piece."""
    import torch

    from growformer.checkpoint import TensorSpec, write_config, write_folder

    buffer = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    begins = iter(range(0, 1 << 62, 999_983))

    def produce(spec: TensorSpec) -> Iterator[torch.Tensor]:
        width = math.prod(spec.shape[1:])
        step = max(1, (1 << 23) // width)
        for start in range(0, spec.shape[0], step):
            shape = (min(step, spec.shape[0] - start), *spec.shape[1:])
            begin = next(begins) % (1 << 23)
            piece = buffer[begin : begin + math.prod(shape)].reshape(shape)
            yield piece + 1 if len(shape) == 1 else piece

    write_folder(folder, llamas.specs_of(config), produce, SHARD)
    write_config(folder, config)


def phases(source: Path, out: Path, words: Sequence[str], flags: dict[str, Any]) -> dict[str, float]:
    """Seconds that `expand_checkpoint` plans, writes, and finishes, told apart by what it reports.

    Each tensor is checked and hashed as soon as it is written; what is left for the end is to collect what was found.
    """
    from growformer import api

    marks = {"start": time.perf_counter()}

    def told(what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if what == "write":
            marks.setdefault("planned", now)
        else:
            # Between the last bytes and the first claim the files are forced to disk.
            marks.setdefault("written", now)

    request: dict[str, Any] = {key: int(value) for key, value in (word.split("=") for word in words)}
    api.expand_checkpoint(source, out, prove_level="structure", max_shard_size=SHARD, progress=told, **request, **flags)
    end = time.perf_counter()
    at = [marks["start"], marks["planned"], marks["written"], end]
    return {what: b - a for what, a, b in zip(("plan", "write, check and hash", "finish"), at, at[1:], strict=False)}


def mergekit_yaml(source: Path, old: int, new: int) -> str:
    """Passthrough with identity layers spread evenly (JSON is YAML)."""
    at = {round((k + 1) * old / (new - old)) - 1 for k in range(new - old)}
    slices: list[dict[str, Any]] = []
    for i in range(old):
        here: dict[str, Any] = {"model": str(source), "layer_range": [i, i + 1]}
        slices.append({"sources": [here]})
        if i in at:
            zero = [{"filter": name, "value": 0.0} for name in ("o_proj", "down_proj")]
            slices.append({"sources": [here | {"parameters": {"scale": [*zero, {"value": 1.0}]}}]})
    return json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})


def mergekit_installed(venv: Path) -> Path:
    """mergekit-yaml in an environment of its own, made where there is none."""
    program = venv / "bin" / "mergekit-yaml"
    if not program.exists():
        print(f"installing {' '.join(MERGEKIT)} into {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "python", "-m", "pip", "install", "--quiet", *MERGEKIT], check=True)
    return program


def bytes_of(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def to_disk(folder: Path) -> list[str | Path]:
    """The command that forces a folder's files to disk."""
    return ["find", folder, "-type", "f", "-exec", "sync", "{}", "+"]


class Bench:
    """The commands that are compared, in folders that are removed after each round."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        self.root, self.arguments = root, arguments
        self.growformer = Path(sys.executable).parent / "growformer"
        told = run([self.growformer, "expand", "--help"]).output
        self.flags: list[str] = []
        for flag, value in (("--memory", arguments.memory), ("--threads", arguments.threads)):
            if value is not None:
                if flag not in told:
                    raise SystemExit(f"this growformer expand has no {flag}")
                self.flags += [flag, value]
        self.cold = not arguments.warm and drop_caches()

    def measure(self, gigabytes: float, source: Path, axes: str) -> dict[str, Any]:
        """All runs of one growth, in turn."""
        out, copy, merged = self.root / "out", self.root / "copy", self.root / "merged"
        config = json.loads((source / "config.json").read_text())
        words = request_of(config, axes)
        common = ["--prove", "structure", "--max-shard-size", str(SHARD), *self.flags, "--json"]
        made: dict[str, Callable[[], Run]] = {
            "growformer": lambda: run([self.growformer, "expand", source, out, *words, *common]),
            "cp": lambda: run(["cp", "-r", "--reflink=never", out, copy], to_disk(copy)),
        }
        if self.arguments.mergekit_venv is not None and axes == "layers":
            program = mergekit_installed(self.arguments.mergekit_venv)
            old = config["num_hidden_layers"]
            recipe = self.root / "mergekit.yml"
            recipe.write_text(mergekit_yaml(source, old, int(words[0].split("=")[1])))
            # Its shards are counted in parameters; these have two bytes.
            options = ["--out-shard-size", "1B", "--quiet"]
            made["mergekit"] = lambda: run([program, recipe, merged, *options], to_disk(merged))
        runs: dict[str, list[Run]] = {name: [] for name in made}
        sizes: dict[str, int] = {}
        for _ in range(self.arguments.repeat):
            for name, start in made.items():
                if self.cold:
                    drop_caches()
                runs[name].append(start())
                folder = {"growformer": out, "cp": copy, "mergekit": merged}[name]
                sizes[name] = bytes_of(folder)
                if name != "growformer":
                    shutil.rmtree(folder)
            shutil.rmtree(out)
        if "mergekit" in sizes and abs(sizes["mergekit"] / sizes["growformer"] - 1) > 0.01:
            raise RuntimeError(f"mergekit wrote {sizes['mergekit']} bytes, growformer {sizes['growformer']}")
        if self.cold:
            drop_caches()
        me: list[str | Path] = [sys.executable, __file__, *self.flags, "--phases", source, out, *words]
        parts = json.loads(run(me).output)
        shutil.rmtree(out)
        numbers = {name: [dataclasses.asdict(r) for r in each] for name, each in runs.items()}
        for each in numbers.values():
            for number in each:
                del number["output"]
        told = {"gigabytes": gigabytes, "axes": axes, "request": words, "source_bytes": bytes_of(source)}
        return told | {"target_bytes": sizes["growformer"], "phases": parts, "runs": numbers}


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The table's rows of one growth: medians over its runs, and the median ratio of pairs."""
    rows = []
    ours, size = result["runs"]["growformer"], result["target_bytes"]
    for name, runs in result["runs"].items():
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, runs, strict=True))
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in result["phases"].items())
        row = [f"{result['source_bytes'] / 1e9:.1f} to {size / 1e9:.1f} GB", result["axes"], name]
        row += [f"{middle['seconds']:.1f}", f"{middle['cpu']:.1f}", f"{size / 1e9 / middle['seconds']:.2f}"]
        row += [f"{middle['rss'] / 1e6:.0f}", f"{middle['anonymous'] / 1e6:.0f}"]
        rows.append(row + (["", parts] if name == "growformer" else [f"{ratio:.2f}", ""]))
    return rows


HEAD = ["checkpoint", "grown", "program", "s", "CPU s", "GB/s", "peak MB", "anon. MB", "growformer/it", "parts, s"]


def main() -> None:
    """Run the benchmark, or one of the children that it makes of itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,4,16", help="GB of the sources")
    parser.add_argument("--axes", default=",".join(["all", *(a for a in GROWTHS if a != "all")]))
    parser.add_argument("--repeat", type=int, default=3, help="rounds, each of all programs in turn")
    parser.add_argument("--dir", type=Path, help="where folders are made (and removed)")
    parser.add_argument("--room", type=float, default=30, help="GB that may be in use at a time")
    parser.add_argument("--warm", action="store_true", help="leave the page cache (imports from a cold disk take long)")
    parser.add_argument("--json", type=Path, help="file for every number")
    parser.add_argument("--memory", help="passed on to growformer expand")
    parser.add_argument("--threads", help="passed on to growformer expand")
    parser.add_argument("--mergekit-venv", type=Path, help="environment of mergekit, made where there is none")
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "GB"), help=argparse.SUPPRESS)
    parser.add_argument("--phases", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        return make_source(Path(asked.make[0]), config_of(float(asked.make[1])))
    if asked.phases:
        source, out, *words = asked.phases
        flags = {"memory": asked.memory, "threads": asked.threads and int(asked.threads)}
        flags = {key: value for key, value in flags.items() if value is not None}
        return print(json.dumps(phases(Path(source), Path(out), words, flags)))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="growformer-benchmark-", dir=asked.dir) as name:
        bench, source = Bench(Path(name), asked), Path(name) / "source"
        for gigabytes in map(float, asked.sizes.split(",")):
            # The source, the grown folder and its copy; growing everything by 5/4 makes about 2.2 of it.
            need, free = 5.5 * gigabytes, shutil.disk_usage(name).free / 1e9
            if need > min(asked.room, free):
                print(f"{gigabytes:g} GB left out: takes {need:.0f} GB; free {free:.0f}, --room {asked.room:g}")
                continue
            source.mkdir()
            run([sys.executable, __file__, "--make", source, str(gigabytes)])
            for axes in asked.axes.split(","):
                results.append(bench.measure(gigabytes, source, axes))
                print(f"{gigabytes:g} GB, {axes}: done", file=sys.stderr)
            shutil.rmtree(source)
    cache = "dropped before each run" if bench.cold else "warm"
    about = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; page cache {cache}"
    print(f"{about}; {asked.repeat} rounds; medians.\n")
    for row in (HEAD, ["---"] * len(HEAD), *(row for result in results for row in rows_of(result))):
        print("| " + " | ".join(row) + " |")
    if asked.json:
        asked.json.write_text(json.dumps({"machine": about, "flags": bench.flags, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
