"""Do two checkpoints compute the same function? Measured on their outputs, in true float64 and in the storage dtype.

Three claims, never mixed (design, section 6): the algebra in true float64 against one fixed bar; the stored file
against its pull-back, in true float64 as well; and what the runtime shows in the storage dtype, against a noise floor
measured on the source alone.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from growformer import errors
from growformer.errors import UncheckedError
from growformer.proof.difference import (
    Difference,
    combine,
    compare_logits,
    compare_outputs,
    require,
    worst,
)
from growformer.proof.float64 import build64, stock_model, true_float64
from growformer.proof.inputs import Batch, Inputs, as_batches
from growformer.proof.outputs import Outputs, Reads, outputs

__all__ = [
    "FLOOR_MULTIPLE",
    "Difference",
    "Inputs",
    "NoiseFloor",
    "Runtime",
    "combine",
    "compare_logits",
    "compare_outputs",
    "fresh_process",
    "functional",
    "greedy",
    "judged",
    "load_report",
    "noise",
    "outputs",
    "outputs64",
    "redrawn",
    "require",
    "runtime",
    "worst",
]

Attach = Callable[[transformers.PreTrainedModel], None]
"""What is done to a model before it runs (hooks)."""

FLOOR_MULTIPLE = 2.0
"""A growth's runtime difference may be this many noise floors (design, section 6: 24 growths gave 0.64 to 1.10)."""


@dataclasses.dataclass(frozen=True)
class NoiseFloor:
    """What the storage dtype alone does to one of the source's outputs, as root-mean-square differences.

    Attributes:
        a: the source with its channels permuted (root mean square over the draws).
        b: the source with every tensor that the growth rounds rounded once.
        floor: sqrt(a^2 + b^2 + c^2).
        c: the source with the eps of its norms taken as in the grown model, and what passes more norms rounded once
            more; none where the growth is exact. Where a dense source became a mixture of experts, the mixture with
            what is new drawn anew: several experts' outputs, each rounded, are added up where the source has one.
    """

    a: float
    b: float
    floor: float
    c: float = 0.0

    def with_routing(self, c: float) -> "NoiseFloor":
        """The same with what routing adds to `c`."""
        return NoiseFloor(self.a, self.b, combine(self.floor, c), combine(self.c, c))


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One output of both models in their storage dtype, against the noise floor.

    Attributes:
        difference: of the two models' outputs.
        floor: the noise floor it is judged by.
    """

    difference: Difference
    floor: NoiseFloor

    @property
    def ratio(self) -> float:
        """The RMS difference in noise floors: 0 if there is none, infinite if there is one and the floor is 0."""
        if self.floor.floor == 0:
            return math.inf if self.difference.rms else 0.0
        return self.difference.rms / self.floor.floor

    @property
    def passed(self) -> bool:
        """Whether the difference is finite and at most `FLOOR_MULTIPLE` noise floors."""
        return math.isfinite(self.difference.relative) and self.ratio <= FLOOR_MULTIPLE


def outputs64(
    source: Path | Callable[[], transformers.PreTrainedModel],
    inputs: Inputs,
    attach: Attach | None = None,
) -> dict[str, torch.Tensor]:
    """Every output, in true float64, of a folder's stock model, or of one that a function builds."""
    # The model lives in this frame only, so it is gone before the next one is built.
    model = build64(source) if isinstance(source, Path) else source()
    if attach is not None:
        attach(model)
    inputs = wide(inputs)
    with true_float64():
        return outputs(model, inputs)


def wide(inputs: Inputs) -> Inputs:
    """The inputs with numbers in float64, made outside `true_float64`, where a narrow one is no leak."""
    return [
        Batch(b.name, {name: x.double() if x.is_floating_point() else x for name, x in b.inputs.items()})
        for b in as_batches(inputs)
    ]


def functional(
    src: Path | Callable[[], transformers.PreTrainedModel],
    out: Path | Callable[[], transformers.PreTrainedModel],
    inputs: Inputs,
    reads: Reads | None = None,
    closed: bool = False,
) -> Difference:
    """Compare two checkpoints' outputs in true float64 (the claims *algebra* and *stored*).

    Never holds both models at once.

    Args:
        src: the source's folder, or a function that builds its model (`build64_from` on weights pulled back, say).
        out: the grown model's folder, or a function that builds it.
        inputs: token ids, all in the source's vocabulary, or other inputs by keyword, or batches.
        reads: the axes that grew, from the receipt, for outputs that live on one; without them an output that is wider
            in the grown model is compared on its first channels.
        closed: see `compare_outputs`.

    Returns:
        The difference of the output that differs most, over the source's vocabulary where the other's is larger.

    Raises:
        UncheckedError: anything narrower than float64 took part, or the outputs cannot be compared.
    """
    return worst(compare_outputs(outputs64(src, inputs), outputs64(out, inputs), reads, closed))


def _stored(
    folder: Path, inputs: Inputs, tensors: Mapping[str, torch.Tensor] | None = None, attach: Attach | None = None
) -> dict[str, Any]:
    """The outputs in the storage dtype; those of all batches under one name, for more numbers make a steadier floor."""
    if tensors is None:
        model, _ = stock_model(folder)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model, report = stock_model(config=config, tensors=tensors)
        if report["missing_keys"] or report["unexpected_keys"]:
            raise UncheckedError(f"A variant of {folder} for the noise floor lacks tensors or has others: {report}.")
    if attach is not None:
        attach(model)
    try:
        found = outputs(model, inputs)
    except RuntimeError:
        # The fast kernels for experts refuse widths that do not fill 16 bytes; the plain ones take any.
        model.set_experts_implementation("eager")
        found = outputs(model, inputs)
    joined: dict[str, list[torch.Tensor]] = {}
    for name, value in found.items():
        joined.setdefault(name.partition(",")[0], []).append(value.flatten(0, -2))
    return {name: torch.cat(values) for name, values in joined.items()}


def runtime(
    src: Path,
    out: Path,
    inputs: Inputs,
    floor: NoiseFloor | Mapping[str, NoiseFloor],
    reads: Reads | None = None,
    closed: bool = False,
) -> dict[str, Runtime]:
    """Compare two checkpoints as a user runs them: storage dtype, stock loading, default kernels.

    Args:
        src: the source's folder.
        out: the grown model's folder.
        inputs: real text where there is a tokenizer; see `Inputs`.
        floor: from `noise`, by output; or one for all.
        reads: see `functional`.
        closed: see `compare_outputs`.

    Returns:
        Each output's difference and its ratio to the floor; ask `judged(...).passed`.
    """
    found = compare_outputs(_stored(src, inputs), _stored(out, inputs), reads, closed)
    return {name: Runtime(d, floor if isinstance(floor, NoiseFloor) else floor[name]) for name, d in found.items()}


def judged(results: Mapping[str, Runtime]) -> Runtime:
    """The output that decides: one that fails where any does, else the one with the largest ratio."""
    return max(results.values(), key=lambda result: (not result.passed, result.ratio))


def noise(
    src: Path,
    inputs: Inputs,
    permuted: Iterable[Mapping[str, torch.Tensor]],
    rounded: Mapping[str, torch.Tensor],
    restore: Callable[[Outputs, Outputs, int], Outputs] = lambda base, found, draw: found,
    attach: Attach | None = None,
) -> dict[str, NoiseFloor]:
    """Measure what the storage dtype does to the source's outputs when nothing about its function changes.

    Args:
        src: the source's folder.
        inputs: the same as for `runtime`.
        permuted: whole checkpoints (on-disk names, storage dtype, the source's shapes) that differ from the source by
            the order of residual and MLP channels; consumed one at a time.
        rounded: the source with each tensor that the growth rounds multiplied by its factor, rounded, divided back.
        restore: given the source's outputs, those of a draw and its number, puts these back in order: hidden states
            come out with their channels permuted.
        attach: has a model take the eps of its norms as the grown one does; None: there is no difference.

    Returns:
        For each output a (root mean square over the draws), b, c, and their combination.

    Raises:
        UncheckedError: no draws, or a variant does not hold exactly the source's tensors.
    """
    base = _stored(src, inputs)
    draws = [compare_outputs(base, restore(base, _stored(src, inputs, draw), i)) for i, draw in enumerate(permuted)]
    if not draws:
        raise UncheckedError("A noise floor needs at least one permuted draw of the source; none was given.")
    once = compare_outputs(base, _stored(src, inputs, rounded))
    passed = None if attach is None else compare_outputs(base, _stored(src, inputs, attach=attach))
    floors = {}
    for name in base:
        a, b = math.sqrt(sum(draw[name].rms ** 2 for draw in draws) / len(draws)), once[name].rms
        c = 0.0 if passed is None else passed[name].rms
        floors[name] = NoiseFloor(a, b, combine(combine(a, b), c), c)
    return floors


def redrawn(folder: Path, inputs: Inputs, variants: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """How far the outputs of variants of a checkpoint are from those of the first, in the storage dtype.

    Args:
        folder: whose config.json the variants have.
        inputs: the same as for `runtime`.
        variants: whole checkpoints that should compute the same; consumed one at a time.

    Returns:
        By output, the root mean square over the variants.
    """
    first, *others = (_stored(folder, inputs, variant) for variant in variants)
    found = [compare_outputs(first, other) for other in others]
    return {name: math.sqrt(sum(one[name].rms ** 2 for one in found) / len(found)) for name in first}


def greedy(folder: Path, prompt: str | list[int], n: int) -> list[int]:
    """Continue a prompt greedily, in the storage dtype, with the key-value cache. Reported, never judged.

    Args:
        folder: a Hugging Face folder; its tokenizer is needed for a text prompt.
        prompt: text or token ids.
        n: tokens to generate; fewer come back if the model ends its text.

    Returns:
        The new token ids.
    """
    if isinstance(prompt, str):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        prompt = list(tokenizer(prompt)["input_ids"])
    model, _ = stock_model(folder)
    ids = torch.tensor([prompt], device=model.device)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, num_beams=1)
    return [int(token) for token in new[0, len(prompt) :]]


def load_report(folder: Path) -> dict[str, Any]:
    """What stock `from_pretrained` says of a folder, and what it made of the embeddings.

    Returns:
        missing_keys, unexpected_keys, mismatched_keys, error_msgs (sorted lists of text); `tied`: whether input and
        output embeddings share memory (None without output embeddings); `dtype` of the model; `parameters`.
    """
    model, report = stock_model(folder)
    result: dict[str, Any] = {kind: sorted(map(str, keys)) for kind, keys in report.items()}
    head = model.get_output_embeddings()
    tied = None
    if head is not None and getattr(head, "weight", None) is not None:
        tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    return {**result, "tied": tied, "dtype": str(model.dtype), "parameters": model.num_parameters()}


def fresh_process(command: str, **arguments: Any) -> dict[str, Any]:
    """Run one check in a new Python process, so that nothing but the files on disk can make it pass.

    Args:
        command: "functional", "runtime", "greedy" or "load_report"; see `growformer.proof.worker`.
        arguments: that command's arguments, as JSON values; paths and tensors are converted.

    Returns:
        The worker's answer.

    Raises:
        GrowformerError: the error the worker raised, of the same class.
        UncheckedError: the process died.
    """
    # The child must run this very copy of the package, installed or not.
    package_root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-m", "growformer.proof.worker"],
        input=json.dumps({"command": command, **arguments}, default=_to_json),
        env={**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(process.stdout)
    except json.JSONDecodeError:
        end = process.stderr.strip()[-2000:]
        raise UncheckedError(f"The process for the {command} check died (code {process.returncode}): {end}") from None
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return dict(answer)


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
