"""The claim *runtime*: what shows in the storage dtype is no more than its noise floor, measured on the source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.checkpoint import TensorFiles
from growformer.errors import SourceError
from growformer.planning import apply, pull_back
from growformer.planning.sizes import size_of
from growformer.proof.case import Case
from growformer.proof.claims import Claim

if TYPE_CHECKING:
    import torch

    from growformer.proof.functional import NoiseFloor


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles.open(folder) as files:
        return {name: files.read(name) for name in files.names}


def noise_floor(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> NoiseFloor:
    """What the storage dtype does to the source's logits, measured once a proof."""
    from growformer.proof.floor import movable, orders, permuted
    from growformer.proof.functional import NoiseFloor, noise

    if "floor" in measured:
        return NoiseFloor(**measured["floor"])
    import torch

    source = {name: x for name, x in _read_all(case.source).items() if name not in case.plan.dropped}
    (dtype,) = {x.dtype for x in _read_all(case.target).values()} or {torch.float32}
    if len({x.dtype for x in source.values()}) != 1:
        raise SourceError("the source stores several dtypes; the runtime claim is measured for one")
    there = pull_back(case.plan, apply(case.plan, source, dtype))
    rounded = {name: x.to(source[name].dtype) for name, x in there.items()}
    draws = orders({axis: size_of(case.family.axes[axis], case.source_full) for axis in movable(case.family)})
    headless = measured["loads"]["tied"] is None

    def restore(output: torch.Tensor, draw: int) -> torch.Tensor:
        return output[..., draws[draw][case.family.stream].argsort()] if headless else output

    floor = noise(case.source, tokens, permuted(case.pattern, source, draws), rounded, restore)
    measured["floor"] = {"a": floor.a, "b": floor.b, "floor": floor.floor}
    return floor


def runtime(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Claim:
    """Both stock models in their storage dtype, against the noise floor."""
    from growformer.proof.functional import FLOOR_MULTIPLE
    from growformer.proof.functional import runtime as compare_runtime

    floor = noise_floor(case, tokens, measured)
    result = compare_runtime(case.source, case.target, tokens, floor)
    d = result.difference
    measured["runtime"] = {
        "rms": d.rms,
        "max_abs": d.max_abs,
        "kl": d.kl,
        "top1_agree": d.top1_agree,
        "ratio": result.ratio,
    }
    found = f"{result.ratio:.2f} x the noise floor (rms {d.rms:.1e}, top-1 {d.top1_agree:.1%})"
    return Claim("runtime", result.passed, found, f"{FLOOR_MULTIPLE:g} x")
