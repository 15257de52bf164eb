"""Runs every program on the folders of models.py, inside the environment that run.py made; writes results.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
import programs
import torch
import transformers
import uses

from growformer.proof.difference import Difference, combine, compare_logits
from growformer.proof.functional import FLOOR_MULTIPLE

Logits = Callable[[Path, programs.Prompts], torch.Tensor]

DRAWS = {"transformers": 8, "llama.cpp": 8, "onnxruntime": 3, "lm-eval": 8}
"""Orders of the source's channels drawn for each program's noise floor (an export takes a while)."""

IN_ONNX = ("hidden", "head_dim, twice", "all together")
USED = ("hidden", "head_dim, twice", "all together")
"""Growths that ONNX Runtime, and that PEFT and lm-eval, are tried on."""


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """How far logits are from the source's, over the source's vocabulary."""
    return compare_logits(a, b[:, : a.shape[1]])


class Judge:
    """One program's logits, held against its own noise floor.

    Args:
        logits: of a folder, for prompts.
        prompts: token ids.
        src: the original's folder.
        draws: the original with its channels in other orders.
    """

    def __init__(self, logits: Logits, prompts: programs.Prompts, src: Path, draws: Sequence[Path]) -> None:
        self._logits, self._prompts = logits, prompts
        self.base = logits(src, prompts)
        self.draws = [difference(self.base, logits(folder, prompts)) for folder in draws]
        self.permuted = math.sqrt(sum(draw.rms**2 for draw in self.draws) / len(self.draws))

    def __call__(self, folder: Path, rounded: Path | None) -> dict[str, Any]:
        """A folder's difference from the original, in noise floors."""
        found = difference(self.base, self._logits(folder, self._prompts))
        once = difference(self.base, self._logits(rounded, self._prompts)) if rounded is not None else None
        floor = combine(self.permuted, once.rms if once is not None else 0.0)
        most = max(one.max_abs for one in [*self.draws, *([once] if once is not None else [])])
        told = {"max": found.max_abs, "rms": found.rms, "kl": found.kl, "top1": found.top1_agree}
        return {**told, "floor": floor, "floor_max": most, "ratio": found.rms / floor}


def judged(
    judge: Judge, grown: Mapping[str, models.Grown], names: Sequence[str], broken: Mapping[str, Path]
) -> dict[str, Any]:
    """One program's verdicts: of growths, and of controls that must exceed the floor."""
    return {
        "positions": len(judge.base),
        "largest": float(judge.base.abs().max()),
        "floor": {"rms": judge.permuted, "max": max(d.max_abs for d in judge.draws), "draws": len(judge.draws)},
        "growths": {name: judge(grown[name].folder, grown[name].rounded) for name in names},
        "controls": {name: judge(path, grown[models.CONTROLS[name][0]].rounded) for name, path in broken.items()},
    }


def in_llama(
    told: dict[str, Any], given: programs.Prompts, src: Path, grown: Mapping[str, models.Grown], converter: Path
) -> None:
    """Add greedy continuations in llama.cpp: reported, not judged."""
    vocab = json.loads((src / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    base = programs.greedy_in_llama(src, given, converter, vocab)
    for name, one in told["growths"].items():
        found = programs.greedy_in_llama(grown[name].folder, given, converter, vocab)
        one["greedy"] = sum(a == b for a, b in zip(base, found, strict=True))
    told["continued"] = len(given)


def versions() -> dict[str, str]:
    """Of what took part; llama.cpp's is in the name of its library."""
    import llama_cpp

    names = (
        "transformers",
        "torch",
        "llama-cpp-python",
        "gguf",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "peft",
        "lm-eval",
    )
    found = {name: importlib.metadata.version(name) for name in names}
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libllama.so.*.*"), None)
    return found | ({} if library is None else {"llama.cpp": library.name.partition(".so.")[2]})


def main() -> int:
    """Measure everything, or only some programs."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    told = json.loads(sys.argv[1])
    src, work, converter = Path(told["source"]), Path(told["work"]), Path(told["converter"])
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True)

    root = work / "models"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    # A copy, for programs leave files of theirs beside the weights.
    src = Path(shutil.copytree(src, root / "source"))
    given = programs.prompts(src)
    say("the original in other orders")
    draws = models.draws(src, root, max(DRAWS.values()))
    grown = models.grow(src, root, say)
    broken = models.broken(src, grown, root)
    wanted = told["only"] or ["llama.cpp", "onnxruntime", "peft", "lm-eval"]
    results: dict[str, Any] = {
        "versions": versions(),
        "allowed": FLOOR_MULTIPLE,
        "prompts": [len(ids) for ids in given],
        "greedy_tokens": programs.GREEDY,
        "requests": {name: dict(one.request) for name, one in grown.items()},
        "parameters": {name: one.parameters for name, one in grown.items()},
        "logits": {},
    }

    def measure(name: str, logits: Logits, names: Sequence[str], controls: Mapping[str, Path]) -> dict[str, Any]:
        say(name)
        found = judged(Judge(logits, given, src, draws[: DRAWS[name]]), grown, names, controls)
        results["logits"][name] = found
        for label, one in {**found["growths"], **found["controls"]}.items():
            say(f"  {label}: max {one['max']:.1e}, {one['ratio']:.2f} noise floors")
        return found

    measure("transformers", programs.in_transformers, list(grown), broken)
    if "llama.cpp" in wanted:
        results["tokens missing"] = programs.loads(root / "tokens-missing", converter)
        found = measure("llama.cpp", partial(programs.in_llama, converter=converter), list(grown), broken)
        in_llama(found, given, src, grown, converter)
        own = programs.in_llama(src, given, converter)
        results["apart"] = difference(programs.in_transformers(src, given), own).max_abs
        results["float16 cache"] = difference(own, programs.in_llama(src, given, converter, "F16")).max_abs
    if "onnxruntime" in wanted:
        measure("onnxruntime", programs.in_onnx, IN_ONNX, {})
    used = {"original": src, **{name: grown[name].folder for name in USED}}
    if "peft" in wanted:
        say("peft")
        results["peft"] = {name: uses.lora(folder, given, work) for name, folder in used.items()}
    if "lm-eval" in wanted:
        say("lm-eval")
        evaluate = uses.Evaluator(work)
        judge = Judge(lambda folder, _: evaluate(folder), given, src, draws[: DRAWS["lm-eval"]])
        found = judged(judge, grown, USED, broken)
        accuracy = {name: evaluate.accuracy[folder] for name, folder in used.items()}
        results["lm-eval"] = found | {"accuracy": accuracy, "choices": judge.base.numel()}
    (work / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
