"""Results: one JSON file a run, written once, whole, and never edited."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.bench.suite import Arm, Suite
from growformer.checkpoint.folder import target_errors
from growformer.errors import SourceError

if TYPE_CHECKING:
    from growformer.bench.course import Course

FORMAT = 1
"""Version of a result file."""

POINTS = 200
"""Points of a training curve, each the mean of the steps around it."""


def result_name(arm: str, rate: float, seed: int) -> str:
    """The name of a run, and of its result file without .json."""
    return f"{arm}--lr{rate:g}--seed{seed}"


def make_result(
    suite: Suite,
    course: Course,
    rate: float,
    seed: int,
    *,
    recipe: Mapping[str, Any],
    data: Path,
    log: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any] | None,
    failure: str | None = None,
) -> dict[str, Any]:
    """What a run has found, with every setting that it takes to repeat it.

    Args:
        suite: it.
        course: of the arm.
        rate: the learning rate.
        seed: of the run.
        recipe: what was trained, paths relative to the folder of the text.
        data: that folder.
        log: of the run, its trunk's lines included.
        measured: `valid` and `test` in bits per byte at the end, and `weights`, a hash; None: it did not get there.
        failure: what stopped it.
    """
    steps = [line for line in log if line["kind"] == "step"]
    growths = [line for line in log if line["kind"] in ("growth", "rank")]
    last = steps[-1] if steps else {"step": 0, "tokens": 0, "flops": 0.0}
    per_byte = _tokens_per_byte(log) / math.log(2)
    before = growths[-1] if growths else {"tokens": 0, "flops": 0.0}
    return {
        "format": FORMAT,
        "suite": {"name": suite.name, "hash": suite_hash(suite), **suite.model_dump(mode="json")},
        "arm": course.arm.name,
        "rate": rate,
        "seed": seed,
        "tuning": seed == suite.tune_seed,
        "bits_per_byte": dict(measured) if measured else None,
        "failure": failure,
        "steps": last["step"],
        "tokens": last["tokens"],
        "flops": {"total": last["flops"], "budget": course.budget, "before_last_growth": before["flops"]},
        "tokens_before_last_growth": before["tokens"],
        "shared_steps": course.trunk,
        "grows": list(course.grows),
        "parameters": [size.parameters for size in course.sizes],
        "flops_per_token": [size.flops_per_token for size in course.sizes],
        "curve": _curve(steps, per_byte),
        "evaluations": [
            [e["step"], e["tokens"], e["flops"], e["bits_per_byte"]] for e in log if e["kind"] == "evaluation"
        ],
        "growths": [{key: g[key] for key in g if key not in ("kind", "plan", "at")} for g in growths],
        "seconds": round(_seconds(steps), 3),
        "recipe": dict(recipe),
        "data": {name: file_print(data / name) for name in (suite.data.train, suite.data.valid, suite.data.test)},
        "source": source_hash(),
        "versions": versions(),
    }


def write_once(path: Path, result: Mapping[str, Any]) -> bool:
    """Write a result, unless there is one.

    Returns:
        Whether it was written; False: another process has been quicker, and its file stays.

    Raises:
        TargetError: it cannot be written.
    """
    with target_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        finally:
            partial.unlink()
    return True


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """All results of a suite, by name; of the folder of the suite's run, or of its results.

    Raises:
        SourceError: there are none, one is damaged, or they are of different suites.
    """
    inner = folder / "results" if (folder / "results").is_dir() else folder
    out: dict[str, dict[str, Any]] = {}
    arms: dict[str, Arm] = {}
    for path in sorted(inner.glob("*.json")):
        found = read_result(path)
        first = next(iter(out.values()), found)
        if found["suite"]["hash"] != first["suite"]["hash"]:
            raise SourceError(f"{path}: is of another suite than {first['arm']}; each suite has a folder of its own")
        for arm in map(Arm.model_validate, found["suite"]["arms"]):  # with the keys that have come since
            if arms.setdefault(arm.name, arm) != arm:
                raise SourceError(f"{path}: arm {arm.name} is another one there than in other results")
        out[path.stem] = found
    if not out:
        raise SourceError(f"{inner}: holds no results yet; growformer bench SUITE.yaml --out {folder} makes them")
    return out


def read_result(path: Path) -> dict[str, Any]:
    """One result.

    Raises:
        SourceError: it is damaged, or of another version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, _ = found["format"], found["suite"]["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: is no result of a run: {error}") from error
    if version != FORMAT:
        raise SourceError(f"{path}: has format {version!r}; this version reads format {FORMAT}")
    return dict(found)


def suite_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The suite of results, with the arms of all of them: a suite may be given more arms after its first run."""
    suites = sorted((r["suite"] for r in results.values()), key=lambda suite: -len(suite["arms"]))
    arms = {arm["name"]: Arm.model_validate(arm) for suite in suites for arm in suite["arms"]}
    return {**suites[0], "arms": [arm.model_dump(mode="json") for arm in arms.values()]}


def added_arms(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Arms that the suite did not have when some result was written."""
    known = [{arm["name"] for arm in r["suite"]["arms"]} for r in results.values()]
    return [arm["name"] for arm in suite_of(results)["arms"] if not all(arm["name"] in names for names in known)]


def suite_hash(suite: Suite) -> str:
    """A hash of all that a suite says of every arm: not of the arms themselves, nor of where the text is."""
    said = suite.model_dump(mode="json", exclude={"arms"})
    said["data"].pop("folder")
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("growformer", "torch", "transformers", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": str(os.cpu_count()),
        **{name: importlib.metadata.version(name) for name in names},
    }


@functools.cache
def source_hash() -> str:
    """A hash of this package's own source."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def file_print(path: Path) -> dict[str, Any]:
    """A file's size and sha256."""
    try:
        with path.open("rb") as file:
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error


def _curve(steps: Sequence[Mapping[str, Any]], per_byte: float) -> list[list[float]]:
    """[step, tokens, FLOPs, training loss in bits per byte], means of neighbouring steps."""
    size = max(1, math.ceil(len(steps) / POINTS))
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [
        [p[-1]["step"], p[-1]["tokens"], p[-1]["flops"], round(sum(s["loss"] for s in p) / len(p) * per_byte, 6)]
        for p in parts
    ]


def _tokens_per_byte(log: Sequence[Mapping[str, Any]]) -> float:
    text = next((line["text"] for line in log if line["kind"] == "start"), {"tokens": 1, "bytes": 1})
    return float(text["tokens"] / text["bytes"])


def _seconds(steps: Sequence[Mapping[str, Any]]) -> float:
    """All of a run's time: it counts from 0 again where a run goes on from a checkpoint."""
    total, last = 0.0, 0.0
    for step in steps:
        total += step["seconds"] - last if step["seconds"] >= last else step["seconds"]
        last = step["seconds"]
    return total


__all__ = [
    "added_arms",
    "make_result",
    "read_result",
    "read_results",
    "result_name",
    "suite_hash",
    "suite_of",
    "write_once",
]
