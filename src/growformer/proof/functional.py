"""Do two checkpoints compute the same function? Measured on logits, in true float64 and in the storage dtype.

Three claims, never mixed (design, section 6): the algebra in true float64 against one fixed bar; the stored file
against its pull-back, in true float64 as well; and what the runtime shows in the storage dtype, against a noise floor
measured on the source alone.
"""

import dataclasses
import inspect
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
from growformer.errors import ChangedError, UncheckedError
from growformer.proof.float64 import build64, stock_model, true_float64

__all__ = [
    "FLOOR_MULTIPLE",
    "Difference",
    "Inputs",
    "NoiseFloor",
    "Runtime",
    "combine",
    "compare_logits",
    "compare_old",
    "fresh_process",
    "functional",
    "greedy",
    "load_report",
    "logits",
    "logits64",
    "noise",
    "require",
    "runtime",
]

Inputs = torch.Tensor | Mapping[str, torch.Tensor]
"""Token ids [sequence, position], or a forward pass's keywords with the batch first (pixel_values, say)."""

FLOOR_MULTIPLE = 2.0
"""A growth's runtime difference may be this many noise floors (design, section 6: 24 growths gave 0.64 to 1.10)."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the logits b are from the logits a.

    Attributes:
        max_abs: max|a-b| over all logits.
        relative: max|a-b| / max|a|; infinite where b is not finite, or is masked where a is not.
        rms: root mean square of a-b.
        kl: mean over positions of KL(softmax(a) || softmax(b)), in nats.
        top1_agree: fraction of positions whose largest logit is the same.
        new_logits: columns that b has beyond a's vocabulary; they are not compared.
        greedy: whether the greedy continuations agree, where they were run; reported, never judged.
    """

    max_abs: float
    relative: float
    rms: float
    kl: float
    top1_agree: float
    new_logits: int = 0
    greedy: bool | None = None


@dataclasses.dataclass(frozen=True)
class NoiseFloor:
    """What the storage dtype alone does to the source's logits, as root-mean-square differences.

    Attributes:
        a: the source with its channels permuted (root mean square over the draws).
        b: the source with every tensor that the growth rounds rounded once.
        floor: sqrt(a^2 + b^2).
    """

    a: float
    b: float
    floor: float


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Both models in their storage dtype, against the noise floor.

    Attributes:
        difference: of the two models' logits.
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


def combine(a: float, b: float) -> float:
    """Two independent sources of noise as one: sqrt(a^2 + b^2)."""
    return math.hypot(a, b)


def _masked(x: torch.Tensor) -> torch.Tensor:
    """Logits that a model masks out: minus infinity, or the lowest number of their dtype.

    Counted as logits they would make max|a| so large that any change looked small.
    """
    return (x == torch.finfo(x.dtype).min) | (x == -math.inf)


def compare_logits(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare two models' logits, in float64 whatever their dtype.

    Args:
        a: the source's logits [batch, position, vocab] (any dims before the last), in the dtype the model gave.
        b: the other's, of the same shape.

    Returns:
        The differences; infinite or NaN logits of b never count as equal to a number.

    Raises:
        UncheckedError: the shapes differ, or a is not finite or all zero, so that no comparison means anything.
    """
    if a.shape != b.shape or a.dim() < 2:
        raise UncheckedError(f"Logits of shapes {list(a.shape)} and {list(b.shape)} cannot be compared entry by entry.")
    largest = max_abs = squares = kl = 0.0
    agree = compared = positions = 0
    same_mask = True
    # A few rows at a time: real vocabularies make each float64 temporary large.
    rows = min(1024, max(1, (1 << 20) // max(1, a.shape[-1])))
    for a_row, b_row in zip(*(torch.split(x.flatten(0, -2), rows) for x in (a, b)), strict=True):
        open_ = ~_masked(a_row)
        same_mask &= bool((open_ == ~_masked(b_row)).all())
        x, y = a_row.double(), b_row.double()
        if not bool(x[open_].isfinite().all()):
            raise UncheckedError("The source's own logits are not finite, so nothing can be compared with them.")
        difference = (x - y)[open_]
        compared += difference.numel()
        positions += len(x)
        # torch.max propagates NaN, Python's max may not.
        max_abs = float(torch.stack([difference.abs().max(), x.new_tensor(max_abs)]).max()) if len(difference) else 0.0
        largest = max(largest, float(x[open_].abs().max()) if len(difference) else 0.0)
        squares += float(difference.square().sum())
        p, q = x.log_softmax(-1), y.log_softmax(-1)
        kl += float(torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum())
        agree += int((x.argmax(-1) == y.argmax(-1)).sum())
    if largest == 0:
        raise UncheckedError("The source's logits are all zero (or there are none): every change of scale would pass.")
    relative = max_abs / largest if same_mask and math.isfinite(max_abs) else math.inf
    return Difference(max_abs, relative, math.sqrt(squares / compared), kl / positions, agree / positions)


@torch.no_grad()
def logits(
    model: transformers.PreTrainedModel, tokens: Inputs, batch: int = 8, device: torch.device | None = None
) -> torch.Tensor:
    """A model's output, on the CPU, in the dtype in which the model gives it.

    Args:
        model: in eval mode.
        tokens: [sequence, position] token ids (an encoder-decoder gets them on both sides), or other inputs by keyword;
            those that are floating point are cast to the model's dtype.
        batch: sequences per forward pass.
        device: where the inputs go; None is where the model's first parameter is.

    Returns:
        [sequence, position, vocab] logits; the last hidden states of a model without a head.

    Raises:
        UncheckedError: the model gives neither.
    """
    inputs = {"input_ids": tokens} if isinstance(tokens, torch.Tensor) else dict(tokens)
    if model.config.is_encoder_decoder and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    device = device or model.device
    inputs = {k: x.to(device, model.dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
    # No cache, for it saves nothing in one pass; encoders do not take the keyword.
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    parts = []
    for chunk in zip(*(torch.split(x, batch) for x in inputs.values()), strict=True):
        output = model(**dict(zip(inputs, chunk, strict=True)), **options)
        values = output.get("logits", output.get("last_hidden_state"))
        if values is None:
            raise UncheckedError(f"{type(model).__name__} gives neither logits nor hidden states to compare.")
        parts.append(values.cpu())
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def logits64(source: Path | Callable[[], transformers.PreTrainedModel], tokens: Inputs) -> torch.Tensor:
    """The output, in true float64, of a folder's stock model, or of one that a function builds."""
    # The model lives in this frame only, so it is gone before the next one is built.
    model = build64(source) if isinstance(source, Path) else source()
    if not isinstance(tokens, torch.Tensor):
        tokens = {name: x.double() if x.is_floating_point() else x for name, x in tokens.items()}
    with true_float64():
        return logits(model, tokens)


def compare_old(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare over a's vocabulary: a grown vocabulary promises that the old logits stay, and says how many it adds."""
    new = b.shape[-1] - a.shape[-1]
    if new <= 0:
        return compare_logits(a, b)
    return dataclasses.replace(compare_logits(a, b[..., : a.shape[-1]]), new_logits=new)


def functional(
    src: Path | Callable[[], transformers.PreTrainedModel],
    out: Path | Callable[[], transformers.PreTrainedModel],
    tokens: Inputs,
) -> Difference:
    """Compare two checkpoints' logits in true float64 (the claims *algebra* and *stored*).

    Never holds both models at once.

    Args:
        src: the source's folder, or a function that builds its model (`build64_from` on weights pulled back, say).
        out: the grown model's folder, or a function that builds it.
        tokens: token ids, all in the source's vocabulary, or other inputs by keyword.

    Returns:
        The difference, over the source's vocabulary where the other's is larger.

    Raises:
        UncheckedError: anything narrower than float64 took part, or the outputs cannot be compared.
    """
    return compare_old(logits64(src, tokens), logits64(out, tokens))


def require(difference: Difference, bar: float, claim: str) -> None:
    """Raise unless the relative difference is at or below the bar.

    Raises:
        ChangedError: naming the claim, the number found and the bar. NaN never passes.
    """
    if not difference.relative <= bar:
        raise ChangedError(
            f"{claim}: relative difference {difference.relative:.3g} (max|a-b| {difference.max_abs:.3g}), "
            f"at most {bar:g} is allowed; top-1 agrees at {difference.top1_agree:.1%} of positions."
        )


def _stored_logits(folder: Path, tokens: Inputs, tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
    if tensors is None:
        model, _ = stock_model(folder)
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model, report = stock_model(config=config, tensors=tensors)
        if report["missing_keys"] or report["unexpected_keys"]:
            raise UncheckedError(f"A variant of {folder} for the noise floor lacks tensors or has others: {report}.")
    return logits(model, tokens)


def runtime(src: Path, out: Path, tokens: Inputs, floor: NoiseFloor) -> Runtime:
    """Compare two checkpoints as a user runs them: storage dtype, stock loading, default kernels.

    Args:
        src: the source's folder.
        out: the grown model's folder.
        tokens: [sequence, position] token ids; real text where there is a tokenizer.
        floor: from `noise`.

    Returns:
        The difference and its ratio to the floor; ask `.passed`.
    """
    return Runtime(compare_old(_stored_logits(src, tokens), _stored_logits(out, tokens)), floor)


def noise(
    src: Path,
    tokens: Inputs,
    permuted: Iterable[Mapping[str, torch.Tensor]],
    rounded: Mapping[str, torch.Tensor],
    restore: Callable[[torch.Tensor, int], torch.Tensor] = lambda output, draw: output,
) -> NoiseFloor:
    """Measure what the storage dtype does to the source's logits when nothing about its function changes.

    Args:
        src: the source's folder.
        tokens: [sequence, position] token ids, the same as for `runtime`.
        permuted: whole checkpoints (on-disk names, storage dtype, the source's shapes) that differ from the source by
            the order of residual and MLP channels; consumed one at a time.
        rounded: the source with each tensor that the growth rounds multiplied by its factor, rounded, divided back.
        restore: puts the output of a draw back in order: a model without a head gives its permuted channels.

    Returns:
        a (root mean square over the draws), b, and their combination.

    Raises:
        UncheckedError: no draws, or a variant does not hold exactly the source's tensors.
    """
    base = _stored_logits(src, tokens)
    draws = [compare_logits(base, restore(_stored_logits(src, tokens, draw), i)).rms for i, draw in enumerate(permuted)]
    if not draws:
        raise UncheckedError("A noise floor needs at least one permuted draw of the source; none was given.")
    a = math.sqrt(sum(draw * draw for draw in draws) / len(draws))
    b = compare_logits(base, _stored_logits(src, tokens, rounded)).rms
    return NoiseFloor(a, b, combine(a, b))


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
    tied = None if head is None else head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
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
