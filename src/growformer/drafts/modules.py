"""What modules compute, measured: norms, rotary positions, linear biases, scaled scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from growformer.drafts.probe import Probe, build, inputs, quiet, untie
from growformer.drafts.trace import Score, Trace, is_norm, watch


@dataclass(frozen=True)
class Measured:
    """What a norm module computes.

    Attributes:
        kind: "rms", "layer", or "" where it is neither.
        gain: "w", "1+w" or None.
        eps: its eps, and the name of the attribute that holds it.
    """

    kind: Literal["rms", "layer", ""]
    gain: Literal["w", "1+w"] | None
    eps: float
    attribute: str


def measure(module: Any, shape: tuple[int, ...]) -> Measured:
    """Run a norm on random numbers, small enough for its eps to matter, and compare."""
    import copy

    twin = copy.deepcopy(module).double()
    x = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        try:
            y = twin(x)
        except Exception:
            return Measured("", None, 0.0, "")
        weight, bias = getattr(twin, "weight", None), getattr(twin, "bias", None)
        shift = bias if bias is not None else 0.0
        tries = {k: float(v) for k, v in vars(module).items() if isinstance(v, float) and 0 < v < 0.1}
        tries |= {f"={v:g}": v for v in (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)}
        for name, eps in tries.items():
            for kind in ("rms", "layer"):
                centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
                unit = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
                options: dict[Any, Any] = {None: unit}
                if weight is not None:
                    options = {"w": unit * weight + shift, "1+w": unit * (1 + weight) + shift}
                for gain, guess in options.items():
                    # Stock norms compute in float32.
                    if y.shape == guess.shape and float((y - guess).abs().max() / guess.abs().max()) < 1e-5:
                        return Measured(kind, gain, eps, name)
    return Measured("", None, 0.0, "")


def eps_fields(base: Probe) -> dict[str, str]:
    """By norm module, the config field that its eps follows (none where it stands in the code)."""
    found: dict[str, str] = {}
    for field, value in base.full.items():
        if not isinstance(value, float) or not 0 < value < 0.5:
            continue
        try:
            with quiet(), torch.device("meta"):
                from growformer.drafts.probe import build_meta

                other = build_meta({**base.raw, field: value * 3})
        except Exception:
            continue
        twins = dict(other.named_modules())
        for name, module in base.model.named_modules():
            if is_norm(name, module) and name in twins:
                for key, old in vars(module).items():
                    new = vars(twins[name]).get(key)
                    if isinstance(old, float) and isinstance(new, float) and old == value and new == value * 3:
                        found[name] = field
    return found


@dataclass(frozen=True)
class Turned:
    """Rotary positions as seen: how many channels of a head turn, of how many, from which on, in what pairs."""

    count: int
    size: int
    start: int
    layout: Literal["half", "interleaved"]


def turning(score: Score, trace: Trace) -> Turned | None:
    """Whether queries turn with the position, given a run in which every token is the same.

    Args:
        score: of that run.
        trace: of that run.
    """
    if score.queries is None or score.queries.dim() < 3:
        return None
    q = score.queries.double().flatten(0, -3)[0]
    moved = ((q - q[:1]).abs().amax(0) > 1e-6 * q.abs().max()).nonzero().flatten().tolist()
    if not moved:
        return None
    order = _stored_order(score, trace, q)
    m, start = len(moved), moved[0]
    if moved != list(range(start, start + m)) or m % 2:
        return None
    for layout, pairs in (
        ("half", [(start + i, start + i + m // 2) for i in range(m // 2)]),
        ("interleaved", [(start + 2 * i, start + 2 * i + 1) for i in range(m // 2)]),
    ):
        norms = torch.stack([q[:, a] ** 2 + q[:, b] ** 2 for a, b in pairs])
        if float((norms - norms[:, :1]).abs().max() / norms.abs().max()) < 1e-5:
            if order is not None:
                a, b = order[pairs[0][0]], order[pairs[0][1]]
                layout = "interleaved" if abs(a - b) == 1 and m > 2 else layout
            return Turned(m, q.shape[1], start, layout)  # type: ignore[arg-type]
    return None  # the stream itself differs with the position


def _stored_order(score: Score, trace: Trace, q: torch.Tensor) -> list[int] | None:
    """By channel of a query head, the row of the weight that wrote it; None where they cannot be matched."""
    for writer in score.query.writers:
        y = trace.outputs.get(writer)
        if y is None or not y.numel():
            continue
        first = y.double().flatten(0, -2)[0] if y.dim() > 1 else y.double()
        found = []
        for value in (q[0] / score.query.scale).tolist():
            near = (first - value).abs()
            if float(near.min()) > 1e-5 * max(1e-3, abs(value)):
                return None
            found.append(int(near.argmin()))
        return found
    return None


def biased(score: Score) -> bool:
    """Whether scores fall linearly with the distance, given a run in which every token is the same (ALiBi)."""
    if score.logits is None or score.logits.dim() < 3:
        return False
    x = score.logits.double().flatten(0, -3)
    last = x[:, -1, :]
    steps = last[:, 1:] - last[:, :-1]
    even = bool(((steps - steps[:, :1]).abs() < 1e-3 * steps.abs().max() + 1e-9).all())
    return even and bool((steps.abs() > 1e-4).all()) and bool(torch.isfinite(last).all())


def same_tokens(raw: Mapping[str, Any]) -> Trace | None:
    """A run in which every token is the same, so that what differs along the sequence is position alone."""
    try:
        with quiet():
            model = build(raw)
            untie(model)
            given = inputs(model, same=True)
            return watch(model, given) if "input_ids" in given else None
    except Exception:
        return None
