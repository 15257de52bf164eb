"""verify: a proof from the two folders, or from two models in memory."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from growformer.api.folders import Progress
from growformer.api.planned import family_of
from growformer.checkpoint import Receipt, read_config
from growformer.checkpoint.stock import full_config
from growformer.errors import RequestError
from growformer.planning import Plan
from growformer.proof.claims import Claim, Proof
from growformer.proof.prove import LEVELS, Case, prove

if TYPE_CHECKING:
    import transformers


def verify(
    source: str | Path | transformers.PreTrainedModel,
    target: str | Path | transformers.PreTrainedModel,
    *,
    level: str = "full",
    progress: Progress = lambda what, done, total: None,
) -> Proof:
    """Prove that a grown model computes its source's function.

    Nothing in the receipt is believed: hashes, lifts and plan are all checked against the two folders.

    Args:
        source: the source's folder, or the model that `expand` was given.
        target: the grown folder, with its growformer.json, or the model that `expand` returned.
        level: "structure", "full", or "auto".
        progress: told what is being checked.

    Returns:
        The proof; `proof.raise_if_changed()` raises unless every claim holds.

    Raises:
        SourceError: a folder or the receipt cannot be read.
    """
    if level not in LEVELS:
        raise RequestError(f"prove={level!r} is unknown; there are {', '.join(LEVELS)}")
    if not isinstance(source, (str, Path)) or not isinstance(target, (str, Path)):
        return _verify_models(source, target, level, progress)
    src, out = Path(source), Path(target)
    raw, config = read_config(src), read_config(out)
    receipt = Receipt.read(out)
    made = replace(Plan.from_json(receipt.plan), axes=receipt.axes, layers=tuple(receipt.layers), source_config=raw)
    family = family_of(raw)
    changed = [f"{n} in the source" for n in _changed(receipt, src, "source")]
    changed += [f"{n} in the grown folder" for n in _changed(receipt, out, "target")]
    files = Claim(
        "files",
        not changed,
        "every hash as in the receipt" if not changed else f"other than in the receipt: {', '.join(changed)}",
        "none changed",
    )
    proof = prove(Case(family, made, src, out, full_config(raw)[0], config), level, lambda what: progress(what, 0, 0))
    return Proof((files, *proof.claims), proof.measured)


def _changed(receipt: Receipt, folder: Path, which: Literal["source", "target"]) -> list[str]:
    # A card is for people, and people may edit it.
    return [name for name in receipt.check_files(folder, which) if name != "README.md"]


def _verify_models(source: Any, target: Any, level: str, progress: Progress) -> Proof:
    """Two models in memory, written down so that the same checks see what stock loading makes of them."""
    made = getattr(target, "growformer_plan", None)
    if isinstance(source, (str, Path)) or not isinstance(made, Plan):
        raise RequestError("verify takes two folders, or a model and what `expand` made of it")
    with tempfile.TemporaryDirectory() as folder:
        src, out = Path(folder, "source"), Path(folder, "grown")
        source.save_pretrained(src)
        target.save_pretrained(out)
        raw = read_config(src)
        case = Case(family_of(raw), replace(made, source_config=raw), src, out, full_config(raw)[0], read_config(out))
        return prove(case, level, lambda what: progress(what, 0, 0))
