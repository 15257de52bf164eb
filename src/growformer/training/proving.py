"""Proof of a growth in mid-run: both models are written down, and the checks of growths on disk are run on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from growformer.algebra import Family
from growformer.checkpoint import read_config
from growformer.checkpoint.folder import target_errors
from growformer.checkpoint.stock import full_config
from growformer.planning import Plan
from growformer.proof.case import Case
from growformer.proof.claim_alive import alive
from growformer.proof.claim_float64 import Outputs, algebra, stored
from growformer.proof.claims import Proof
from growformer.proof.inputs import Batch
from growformer.proof.prove import prove

if TYPE_CHECKING:
    import transformers


class Witness:
    """Keeps the model as it is before a growth, and proves the growth afterwards.

    Args:
        folder: where both models are written; it is removed again.
        model: the model before.
    """

    def __init__(self, folder: Path, model: transformers.PreTrainedModel) -> None:
        self.folder = folder
        with target_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder / "source")

    def prove(
        self,
        family: Callable[[dict[str, Any]], Family],
        plan: Plan,
        model: transformers.PreTrainedModel,
        tokens: torch.Tensor,
    ) -> Proof:
        """The claims structure, algebra and stored (in true float64 on the given text), and alive.

        Args:
            family: the family of a config.json.
            plan: the growth.
            model: the model as it is now.
            tokens: int64 [sequence, token], held-out text.
        """
        source, grown = self.folder / "source", self.folder / "grown"
        with target_errors(self.folder):
            model.save_pretrained(grown)
        raw = read_config(source)
        case = Case(
            family(raw), replace(plan, source_config=raw), source, grown, full_config(raw)[0], read_config(grown)
        )
        structure = prove(case, "structure")
        measured = dict(structure.measured)
        claims = [claim for claim in structure.claims if claim.name == "structure"]  # the others were not asked for
        if claims[0].passed:
            outputs = Outputs(case, (Batch("held-out text", {"input_ids": tokens}),))
            claims += [algebra(outputs, measured), stored(outputs, measured), alive(case, measured)]
        shutil.rmtree(self.folder, ignore_errors=True)
        return Proof(tuple(claims), measured)
