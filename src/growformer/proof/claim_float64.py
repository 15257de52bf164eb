"""The claims *algebra* and *stored*, in true float64: with whole models in memory, or module by module from disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.proof.bar import BAR
from growformer.proof.case import Case, stored_dtypes
from growformer.proof.claim_runtime import noise_floor
from growformer.proof.claims import Claim

if TYPE_CHECKING:
    from growformer.proof.certificate import Tensors
    from growformer.proof.functional import Difference
    from growformer.proof.inputs import Inputs
    from growformer.proof.outputs import Outputs as ByName


class Outputs:
    """Outputs of one growth's models in true float64, each folder's computed once.

    Args:
        case: the growth.
        inputs: what the models are compared on.
        memory: bytes of weights that may be in memory at once where a module can be run in parts; None: whole models.
    """

    def __init__(self, case: Case, inputs: Inputs, memory: int | None = None) -> None:
        self.case, self.inputs, self.memory = case, inputs, memory
        self._folders: dict[Path, ByName] = {}

    def folder(self, folder: Path) -> ByName:
        """Every output of the checkpoint in a folder."""
        from growformer.proof.functional import outputs64
        from growformer.proof.offload import outputs64_offloaded

        if folder not in self._folders:
            self._folders[folder] = (
                outputs64(folder, self.inputs)
                if self.memory is None
                else outputs64_offloaded(folder, self.inputs, self.case.prefix, memory=self.memory)
            )
        return self._folders[folder]

    def tensors(self, config: Mapping[str, Any], tensors: Tensors) -> ByName:
        """The same of tensors that are made when they are read."""
        from growformer.proof.float64 import build64_from
        from growformer.proof.functional import outputs64
        from growformer.proof.offload import outputs64_from

        if self.memory is not None:
            return outputs64_from(config, tensors, self.inputs, self.case.prefix, memory=self.memory)
        whole = {name: tensors.read(name) for name in tensors.names}
        return outputs64(lambda: build64_from(config, whole), self.inputs)

    def compare(self, source: ByName, grown: ByName) -> dict[str, Difference]:
        """The difference of every output, at the channels that the receipt says are the source's."""
        from growformer.proof.functional import compare_outputs
        from growformer.proof.outputs import closed_tokens, grown_axes

        axes = self.case.plan.axes
        return compare_outputs(source, grown, grown_axes(axes), closed_tokens(axes))


def algebra(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """The plan, on the source in float64, keeps the source's function."""
    from growformer.proof.functional import worst
    from growformer.proof.offload import Planned

    case = outputs.case
    if stored_dtypes(case.target) == {"F64"}:
        grown, how = outputs.folder(case.target), "the files on disk"
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
    return Claim("algebra", difference.relative <= BAR, found, f"{BAR:.0e} (float64)")


def _where(differences: Mapping[str, Difference]) -> str:
    """The output that differs most, where there are several."""
    from growformer.proof.functional import worst

    return f" (the largest of {len(differences)} outputs: {worst(differences).output})" if len(differences) > 1 else ""


def stored(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """The file computes what the source would with the weights that can be read back from it."""
    from growformer.proof.functional import worst
    from growformer.proof.pullback import PulledBack

    case = outputs.case
    with case.open() as (source, target):
        back = PulledBack(**case.told(source, target))
        pulled = outputs.tensors(case.source_full, back)
    grown = outputs.folder(case.target)
    differences = outputs.compare(pulled, grown)
    difference, to_source = worst(differences), worst(outputs.compare(outputs.folder(case.source), grown))
    measured["stored"] = {"relative": difference.relative, "rms": difference.rms, "to_source": to_source.relative}
    found = f"{difference.relative:.1e} from its pull-back ({to_source.relative:.1e} from the source)"
    if not _redundant(case):
        return Claim("stored", difference.relative <= BAR, found, f"{BAR:.0e} (float64)")
    if outputs.memory is not None:
        why = "means and copies with a factor round on their own; judging that takes the source in memory"
        return Claim("stored", None, found, required=False, detail=why)
    floors = noise_floor(case, outputs.inputs, measured)
    # What agrees to the bar needs no floor: an output that no permutation can move has none.
    ratios = {
        name: 0.0 if d.relative <= BAR else _floors(d.rms, floors[name.partition(",")[0]].floor)
        for name, d in differences.items()
    }
    last = max(ratios, key=lambda name: ratios[name])
    measured["stored"]["ratio"] = ratios[last]
    allowed = f"rms {2 * floors[last.partition(',')[0]].floor:.1e}: means round too"
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
