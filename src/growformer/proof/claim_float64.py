"""The claims *algebra* and *stored*, in true float64: with whole models in memory, or module by module from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.proof.bar import BAR
from growformer.proof.case import Case, stored_dtypes
from growformer.proof.claim_runtime import noise_floor
from growformer.proof.claims import Claim

if TYPE_CHECKING:
    import torch

    from growformer.proof.certificate import Tensors


class Outputs:
    """Outputs of one growth's models in true float64, each folder's computed once.

    Args:
        case: the growth.
        tokens: [sequence, position] token ids.
        memory: bytes of weights that may be in memory at once where a module can be run in parts; None: whole models.
    """

    def __init__(self, case: Case, tokens: torch.Tensor, memory: int | None = None) -> None:
        self.case, self.tokens, self.memory = case, tokens, memory
        self._folders: dict[Path, torch.Tensor] = {}

    def folder(self, folder: Path) -> torch.Tensor:
        """[sequence, position, vocab] of the checkpoint in a folder."""
        from growformer.proof.functional import logits64
        from growformer.proof.offload import logits64_offloaded

        if folder not in self._folders:
            self._folders[folder] = (
                logits64(folder, self.tokens)
                if self.memory is None
                else logits64_offloaded(folder, self.tokens, self.case.prefix, memory=self.memory)
            )
        return self._folders[folder]

    def tensors(self, config: Mapping[str, Any], tensors: Tensors) -> torch.Tensor:
        """The same of tensors that are made when they are read."""
        from growformer.proof.float64 import build64_from
        from growformer.proof.functional import logits64
        from growformer.proof.offload import logits64_from

        if self.memory is not None:
            return logits64_from(config, tensors, self.tokens, self.case.prefix, memory=self.memory)
        whole = {name: tensors.read(name) for name in tensors.names}
        return logits64(lambda: build64_from(config, whole), self.tokens)


def algebra(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """The plan, on the source in float64, keeps the source's function."""
    from growformer.proof.functional import compare_old
    from growformer.proof.offload import Planned

    case = outputs.case
    if stored_dtypes(case.target) == {"F64"}:
        grown, how = outputs.folder(case.target), "the files on disk"
    else:
        with case.open() as (source, _):
            grown = outputs.tensors(case.target_config, Planned(case.plan, source))
        how = "the plan on the source upcast to float64"
    difference = compare_old(outputs.folder(case.source), grown)
    measured["algebra"] = {"relative": difference.relative, "max_abs": difference.max_abs, "of": how}
    return Claim("algebra", difference.relative <= BAR, f"{difference.relative:.1e}", f"{BAR:.0e} (float64)")


def stored(outputs: Outputs, measured: dict[str, Any]) -> Claim:
    """The file computes what the source would with the weights that can be read back from it."""
    from growformer.proof.functional import compare_old
    from growformer.proof.pullback import PulledBack

    case = outputs.case
    with case.open() as (source, target):
        back = PulledBack(**case.told(source, target))
        pulled = outputs.tensors(case.source_full, back)
    grown = outputs.folder(case.target)
    difference, to_source = compare_old(pulled, grown), compare_old(outputs.folder(case.source), grown)
    measured["stored"] = {"relative": difference.relative, "rms": difference.rms, "to_source": to_source.relative}
    found = f"{difference.relative:.1e} from its pull-back ({to_source.relative:.1e} from the source)"
    if not _redundant(case):
        return Claim("stored", difference.relative <= BAR, found, f"{BAR:.0e} (float64)")
    if outputs.memory is not None:
        why = "means and copies with a factor round on their own; judging that takes the source in memory"
        return Claim("stored", None, found, required=False, detail=why)
    floor = noise_floor(case, outputs.tokens, measured)
    return Claim("stored", difference.rms <= 2 * floor.floor, found, f"rms {2 * floor.floor:.1e}: means round too")


def _redundant(case: Case) -> bool:
    """Whether the file stores one thing twice (means, copies with a factor), so that rounding can tear them apart."""
    return any(
        any(block.mean) or (block.back is None and block.factor.exponent is None)
        for tensor in case.plan.tensors
        for block in tensor.blocks()
        if block.source is not None
    ) and stored_dtypes(case.target) != {"F64"}
