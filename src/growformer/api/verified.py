"""verify: a proof from the two folders, or from two models in memory."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from growformer.api.becoming import case_of
from growformer.api.folders import Progress
from growformer.api.fused import METHOD, verify_fused
from growformer.api.planned import family_of
from growformer.checkpoint import Receipt, parse_size, read_config
from growformer.checkpoint.adapters import is_adapter
from growformer.checkpoint.hub import located
from growformer.errors import RequestError, SourceError
from growformer.planning import Plan
from growformer.proof.claims import Claim, Proof
from growformer.proof.prove import LEVELS, prove

if TYPE_CHECKING:
    import transformers

    from growformer.proof.case import Case


def verify(
    source: str | Path | transformers.PreTrainedModel | None,
    target: str | Path | transformers.PreTrainedModel,
    *,
    level: str = "full",
    memory: int | str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Proof:
    """Prove that a grown model computes its source's function.

    Nothing in the receipt is believed: hashes, lifts and plan are all checked against the two folders.

    Args:
        source: the source's folder or Hub id, or the model that `expand` was given; None: the folder that the
            receipt of `target` names.
        target: the grown folder, with its growformer.json, or the model that `expand` returned.
        level: "structure", "full", or "auto".
        memory: bytes that models may take, such as "8GB"; None is half of what is free. With "full", larger ones are
            run from disk, module by module.
        progress: told what is being checked.

    Returns:
        The proof; `proof.raise_if_changed()` raises unless every claim holds.

    Raises:
        SourceError: a folder or the receipt cannot be read.
    """
    if level not in LEVELS:
        raise RequestError(f"prove={level!r} is unknown; there are {', '.join(LEVELS)}")
    room = None if memory is None else parse_size(memory)
    if not isinstance(target, (str, Path)) or not isinstance(source, (str, Path, type(None))):
        return _verify_models(source, target, level, room, progress)
    out = Path(target)
    src = source_of(out) if source is None else located(source)
    if is_adapter(out):
        from growformer.api.adapters import verify_adapter

        return verify_adapter(src, out, level)
    read_config(out)  # whether it is a model's folder at all comes first
    receipt = Receipt.read(out)
    if receipt.method == METHOD:
        if memory is not None:
            raise RequestError(f"memory={memory}: a fused model and the two in it are run whole; prove=auto may not")
        return verify_fused(out, src, level=level, progress=progress)
    case = recorded(src, out, receipt)
    changed = [f"{n} in the source" for n in _changed(receipt, src, "source")]
    changed += [f"{n} in the grown folder" for n in _changed(receipt, out, "target")]
    files = Claim(
        "files",
        not changed,
        "every hash as in the receipt" if not changed else f"other than in the receipt: {', '.join(changed)}",
        "none changed",
    )
    proof = prove(case, level, lambda what: progress(what, 0, 0), memory=room)
    return Proof((files, *proof.claims), proof.measured)


def source_of(target: str | Path) -> Path:
    """The source's folder, as the receipt of a grown folder names it (a relative one counts from the current folder).

    Raises:
        SourceError: no receipt, none named in it, or no such folder.
    """
    out = Path(target)
    if not is_adapter(out):
        read_config(out)  # whether it is a model's folder at all comes first
    path = Receipt.read(out).source["path"]
    say = f"say where it is: growformer verify SRC {out}"
    if path is None:
        raise SourceError(f"{out}: its growformer.json does not name the source's folder; {say}")
    if not Path(path).is_dir():
        seen = "" if Path(path).is_absolute() else f" seen from {Path.cwd()}"
        raise SourceError(
            f"{out}: its growformer.json names {path!r} as the source, and there is no such folder{seen}; {say}"
        )
    return Path(path)


def recorded(src: Path, out: Path, receipt: Receipt) -> Case:
    """The growth that a receipt speaks of, as the proofs see it.

    Raises:
        RequestError, SourceError: see `family_of` and `case_of`.
    """
    raw = read_config(src)
    made = replace(Plan.from_json(receipt.plan), axes=receipt.axes, layers=receipt.layers, source_config=raw)
    made = replace(made, family=receipt.family, source_family=receipt.source_family)
    return case_of(family_of(raw), made, src, out, raw, read_config(out))


def _changed(receipt: Receipt, folder: Path, which: Literal["source", "target"]) -> list[str]:
    # A card is for people, and people may edit it.
    return [name for name in receipt.check_files(folder, which) if name != "README.md"]


def _verify_models(source: Any, target: Any, level: str, room: int | None, progress: Progress) -> Proof:
    """Two models in memory, written down so that the same checks see what stock loading makes of them."""
    made = getattr(target, "growformer_plan", None)
    if source is None or isinstance(source, (str, Path)) or not isinstance(made, Plan):
        raise RequestError("verify takes two folders, or a model and what `expand` made of it")
    with tempfile.TemporaryDirectory() as folder:
        src, out = Path(folder, "source"), Path(folder, "grown")
        source.save_pretrained(src)
        target.save_pretrained(out)
        raw = read_config(src)
        case = case_of(family_of(raw), replace(made, source_config=raw), src, out, raw, read_config(out))
        return prove(case, level, lambda what: progress(what, 0, 0), memory=room)
