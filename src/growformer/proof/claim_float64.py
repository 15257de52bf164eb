"""The claims *algebra* and *stored*, in true float64: with whole models in memory, or module by module from disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.proof.bar import BAR
from growformer.proof.case import Case, stored_dtypes
from growformer.proof.claim_runtime import noise_floor
from growformer.proof.claims import Claim
from growformer.proof.eps import MULTIPLE, EpsEffect, worst_move

if TYPE_CHECKING:
    from growformer.proof.certificate import Tensors
    from growformer.proof.functional import Difference
    from growformer.proof.inputs import Inputs
    from growformer.proof.outputs import Outputs as ByName


ON_DISK = "the files on disk"
"""What the algebra is measured of where they are stored in float64."""


class Outputs:
    """Outputs of one growth's models in true float64, each folder's computed once.

    Args:
        case: the growth.
        inputs: what the models are compared on.
        memory: bytes of weights that may be in memory at once where a module can be run in parts; None: whole models.
    """

    def __init__(self, case: Case, inputs: Inputs, memory: int | None = None) -> None:
        self.case, self.inputs, self.memory = case, inputs, memory
        self._folders: dict[tuple[Path, bool], ByName] = {}
        self.eps: EpsEffect | None = None

    def folder(self, folder: Path) -> ByName:
        """Every output of the checkpoint in a folder."""
        return self._folder(folder, None)

    def expected(self) -> ByName:
        """Every output that the grown model must have: the source's, with what eps does where it is exact up to that.

        What eps did is then in `eps`.
        """
        if not self.case.passings:
            return self.folder(self.case.source)
        if self.eps is None:
            self.eps = EpsEffect(self.case.passings, self.case.family.prefix)
        return self._folder(self.case.source, self.eps)

    def _folder(self, folder: Path, effect: EpsEffect | None) -> ByName:
        from growformer.proof.functional import outputs64
        from growformer.proof.offload import outputs64_offloaded

        key, attach = (folder, effect is not None), None if effect is None else effect.attach
        if key not in self._folders:
            self._folders[key] = (
                outputs64(folder, self.inputs, attach)
                if self.memory is None
                else outputs64_offloaded(folder, self.inputs, self.case.prefix, memory=self.memory, attach=attach)
            )
        return self._folders[key]

    def tensors(self, config: Mapping[str, Any], tensors: Tensors, *, passing: bool = False) -> ByName:
        """The same of tensors that are made when they are read; `passing`: of a source, as `expected` has it."""
        from growformer.proof.float64 import build64_from
        from growformer.proof.functional import outputs64
        from growformer.proof.offload import outputs64_from

        effect = EpsEffect(self.case.passings, self.case.family.prefix) if passing else None
        attach = None if effect is None else effect.attach
        if self.memory is not None:
            return outputs64_from(config, tensors, self.inputs, self.case.prefix, memory=self.memory, attach=attach)
        whole = {name: tensors.read(name) for name in tensors.names}
        return outputs64(lambda: build64_from(config, whole), self.inputs, attach)

    def compare(self, source: ByName, grown: ByName) -> dict[str, Difference]:
        """The difference of every output, at the channels that the receipt says are the source's."""
        from growformer.proof.functional import compare_outputs
        from growformer.proof.outputs import grown_axes

        return compare_outputs(source, grown, grown_axes(self.case.plan.axes))


def eps(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """How far the eps of norms alone moves the source, measured before the grown model is run.

    What it does to any token must be less than what one rounding in bfloat16 would; else eps is no small number beside
    a token's variance, and the growth no small change.
    """
    import torch

    from growformer.proof.functional import compare_outputs, worst

    expected = outputs.expected()
    effect = outputs.eps
    assert effect is not None
    differences = compare_outputs(outputs.folder(outputs.case.source), expected)
    moved, limit = worst_move(effect), torch.finfo(torch.bfloat16).eps / 2
    low, high = min(v for v, _ in effect.variance.values()), max(v for _, v in effect.variance.values())
    difference = worst(differences)
    measured["eps"] = {
        "norms": {
            norm.gain: {
                "eps": norm.eps,
                "kept": norm.kept,
                "passes": norm.after,
                "variance": list(effect.variance[norm.gain]),
                "moved": effect.moved[norm.gain],
            }
            for norm in effect.norms
        },
        "moved": moved,
        "relative": {name: d.relative for name, d in differences.items()},
        "rms": {name: d.rms for name, d in differences.items()},
        "bound": MULTIPLE * difference.relative,
    }
    many = f"{len(effect.norms)} norm{'s' * (len(effect.norms) > 1)}"
    found = f"a token by {moved:.1e} of itself at {many}, variances {low:.2g} to {high:.2g}"
    detail = (
        f"eps is no small number beside the variance {low:.2g} of a token before {max(effect.moved, key=_of(effect))}: "
        f"a new layer behind it changes the function by {difference.relative:.1e}; place it elsewhere"
    )
    return Claim("eps", moved <= limit, found, f"{limit:.1e}, a rounding in bfloat16", detail=detail)


def _of(effect: EpsEffect) -> Callable[[str], float]:
    return lambda name: effect.moved[name]


def algebra(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """The plan, on the source in float64, keeps the source's function.

    Where it does so up to the eps of norms, what that explains is measured on the source alone (`eps`): the difference
    must be within this bound, and the grown model must be to the bar what the source is with its eps so taken.
    """
    from growformer.proof.functional import worst
    from growformer.proof.offload import Planned

    case = outputs.case
    expected = outputs.expected()  # and with it the bound, before anything is known of the grown model
    within = outputs.compare(outputs.folder(case.source), expected) if case.passings else {}
    if stored_dtypes(case.target) == {"F64"}:
        grown, how = outputs.folder(case.target), ON_DISK
    else:
        with case.open() as (source, _):
            grown = outputs.tensors(case.target_config, Planned(case.plan, source))
        how = "the plan on the source upcast to float64"
    differences = outputs.compare(outputs.folder(case.source), grown)
    difference = worst(differences)
    by_output = {name: d.relative for name, d in differences.items()}
    measured["algebra"] = {"relative": difference.relative, "max_abs": difference.max_abs, "of": how}
    measured["algebra"]["outputs"] = by_output
    found = f"{difference.relative:.1e}" + _where(differences)
    if not case.passings:
        return Claim("algebra", difference.relative <= BAR, found, f"{BAR:.0e} (float64)")
    beyond = worst(outputs.compare(expected, grown)).relative
    bounds = {name: MULTIPLE * d.relative for name, d in within.items()}
    bound = bounds[difference.output]
    measured["algebra"] |= {"bound": bound, "bounds": bounds, "beyond": beyond}
    held = all(d.relative <= max(bounds[name], BAR) for name, d in differences.items())
    allowed = f"within eps: {bound:.1e}; beyond it {BAR:.0e} (float64)"
    return Claim("algebra", held and beyond <= BAR, f"{found}; beyond eps {beyond:.1e}", allowed)


def _where(differences: Mapping[str, Difference]) -> str:
    """The output that differs most, where there are several."""
    from growformer.proof.functional import worst

    return f" (the largest of {len(differences)} outputs: {worst(differences).output})" if len(differences) > 1 else ""


def stored(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """The file computes what the source would with the weights that can be read back from it."""
    from growformer.proof.functional import combine, worst
    from growformer.proof.pullback import PulledBack

    case = outputs.case
    with case.open() as (source, target):
        back = PulledBack(**case.told(source, target))
        pulled = outputs.tensors(case.source_full, back, passing=bool(case.passings))
    grown = outputs.folder(case.target)
    differences = outputs.compare(pulled, grown)
    difference, to_source = worst(differences), worst(outputs.compare(outputs.folder(case.source), grown))
    measured["stored"] = {"relative": difference.relative, "rms": difference.rms, "to_source": to_source.relative}
    of = "its pull-back, eps as in it" if case.passings else "its pull-back"
    found = f"{difference.relative:.1e} from {of} ({to_source.relative:.1e} from the source)"
    if not _redundant(case):
        return Claim("stored", difference.relative <= BAR, found, f"{BAR:.0e} (float64)")
    if outputs.memory is not None:
        why = "means and copies with a factor round on their own; judging that takes the source in memory"
        return Claim("stored", None, found, required=False, detail=why)
    floors = noise_floor(case, outputs.inputs, measured)
    rounding = {name: combine(floor.a, floor.b) for name, floor in floors.items()}
    # What agrees to the bar needs no floor: an output that no permutation can move has none.
    ratios = {
        name: 0.0 if d.relative <= BAR else _floors(d.rms, rounding[name.partition(",")[0]])
        for name, d in differences.items()
    }
    last = max(ratios, key=lambda name: ratios[name])
    measured["stored"]["ratio"] = ratios[last]
    allowed = f"rms {2 * rounding[last.partition(',')[0]]:.1e}: means round too"
    return Claim("stored", ratios[last] <= 2, f"{found}, rms {differences[last].rms:.1e}", allowed)


def _floors(rms: float, floor: float) -> float:
    """A root mean square in noise floors."""
    return rms / floor if floor else (math.inf if rms else 0.0)


def _redundant(case: Case) -> bool:
    """Whether the file stores one thing twice (means, copies with a factor), so that rounding can tear them apart."""
    return any(
        any(block.mean) or (block.back is None and block.factor.exponent is None)
        for tensor in case.plan.tensors
        for block in tensor.blocks()
        if block.source is not None
    ) and stored_dtypes(case.target) != {"F64"}
