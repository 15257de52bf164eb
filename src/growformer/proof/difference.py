"""How far two models' outputs are apart: every number of a comparison, and the bar it is held against."""

import dataclasses
import math
from collections.abc import Mapping

import torch

from growformer.errors import ChangedError, UncheckedError
from growformer.proof.outputs import Outputs, Reads, read_back

__all__ = ["Difference", "combine", "compare_logits", "compare_outputs", "require", "worst"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the outputs b are from the outputs a (logits, in most models).

    Attributes:
        max_abs: max|a-b| over all entries.
        relative: max|a-b| / max|a|; infinite where b is not finite, or is masked where a is not.
        rms: root mean square of a-b.
        kl: mean over positions of KL(softmax(a) || softmax(b)), in nats.
        top1_agree: fraction of positions whose largest logit is the same.
        new_logits: columns that b has beyond a's vocabulary; they are not compared.
        greedy: whether the greedy continuations agree, where they were run; reported, never judged.
        output: the output's name, where there are several.
    """

    max_abs: float
    relative: float
    rms: float
    kl: float
    top1_agree: float
    new_logits: int = 0
    greedy: bool | None = None
    output: str = ""


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


def _taken(logits: torch.Tensor, old: int) -> bool:
    """Whether a softmax gives any probability to logits from number `old` on."""
    rows = torch.split(logits.flatten(0, -2), 1024)
    return any(bool((part.softmax(-1)[:, old:] != 0).any()) for part in rows)


def compare_outputs(a: Outputs, b: Outputs, reads: Reads | None = None, closed: bool = False) -> dict[str, Difference]:
    """Compare every output of two models, at the channels that are the source's.

    Args:
        a: the source's outputs.
        b: the other's, by the same names.
        reads: the axes that grew, from the receipt; None where there is none to ask.
        closed: logits beyond the source's must have the probability zero, in the dtype they come in; where one has
            not, the difference is infinite.

    Returns:
        The difference of each output.

    Raises:
        UncheckedError: the models give different outputs, or one cannot be compared.
    """
    if a.keys() != b.keys():
        raise UncheckedError(f"The models give different outputs: {', '.join(a)} and {', '.join(b)}.")
    found = {}
    for name, x in a.items():
        y, new = read_back(name, x.shape[-1], b[name], reads)
        found[name] = dataclasses.replace(compare_logits(x, y), new_logits=new, output=name)
        if closed and new and _taken(b[name], x.shape[-1]):
            found[name] = dataclasses.replace(found[name], relative=math.inf, rms=math.inf)
    return found


def worst(differences: Mapping[str, Difference]) -> Difference:
    """The output with the largest relative difference, with the new logits of all."""
    last = max(differences.values(), key=lambda d: math.inf if math.isnan(d.relative) else d.relative)
    return dataclasses.replace(last, new_logits=max(d.new_logits for d in differences.values()))


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
