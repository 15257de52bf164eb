"""What was fused: the plan of two folders, the checks of what came of it, and how far that is from both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.api.folders import Progress
from growformer.api.planned import family_of, require_equal, require_sizes
from growformer.checkpoint import Receipt, TensorFiles, read_config, require_growable, sha256, size_text
from growformer.checkpoint.hub import located
from growformer.checkpoint.stock import fields_read, full_config
from growformer.errors import SourceError
from growformer.methods.copied import DEEPFUSION
from growformer.planning.fuse import Fusion, Half, fuse_plan
from growformer.proof.claims import Claim, Proof

if TYPE_CHECKING:
    import torch
    import transformers

    from growformer.proof.fused import Measured, Told

METHOD = "fuse"
"""What a fused folder's receipt names as its method."""


def half_of(label: str, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Half:
    """One of two models, as planning sees it."""
    return Half(label, family_of(raw), raw, *full_config(raw), shapes, fields_read(raw))


def planned(folders: Sequence[Path], files: Sequence[TensorFiles], ignored: Sequence[str]) -> Fusion:
    """The plan of the fusion of two folders.

    Raises:
        RequestError, PatternError: see `fuse_plan`.
        SourceError: a folder cannot be read.
    """

    def half(folder: Path, held: TensorFiles) -> Half:
        for info in held.values():
            require_growable(info)
        return half_of(str(folder), read_config(folder), {name: info.shape for name, info in held.items()})

    one, other = map(half, folders, files)
    fusion = fuse_plan(one, other, DEEPFUSION, ignored)
    require_fused_sizes(fusion)
    tied = one.family.tied
    for folder, plan in zip(folders, (fusion.one, fusion.other), strict=True):
        if tied is not None and tied.head in plan.dropped:
            require_equal(folder, tied, next(str(t.source) for t in plan.tensors if t.pattern == tied.embedding))
    return fusion


def require_fused_sizes(fusion: Fusion) -> None:
    """Refuse a config.json that transformers reads as other sizes than both models have together."""
    family, config = family_of(fusion.target_config), fusion.target_config
    require_sizes(family, config, fusion.one, "the fused config.json", "is what both models have together")


def _told(fusion: Fusion, folders: Sequence[Path]) -> Told:
    from growformer.proof.fused import Told

    plans = (fusion.one, fusion.other)
    family = family_of(fusion.one.source_config)
    bare = family.prefix and not any(t.name.startswith(family.prefix) for t in fusion.one.tensors)
    factors = {t.name: t.factors for t in fusion.one.tensors}
    odd = next((name for name, found in factors.items() if len(found) != 1), None)
    if odd is not None:
        raise SourceError(f"{folders[0]}: {odd} has blocks of several factors ({', '.join(map(str, factors[odd]))})")
    return Told(
        family=family,
        prefix=family.prefix if bare else "",
        sizes=tuple({a: int(entry["old"]) for a, entry in plan.axes.items()} for plan in plans),  # type: ignore[arg-type]
        factors={name: found[0] for name, found in factors.items()},
        averaged=fusion.averaged,
        alike=fusion.alike,
        sources=tuple({t.name: str(t.source) for t in plan.tensors} for plan in plans),  # type: ignore[arg-type]
        wide={axis for axis, entry in fusion.one.axes.items() if entry["old"] != entry["new"]},
    )


def prove_fused(
    folders: Sequence[Path], files: Sequence[TensorFiles], out: Path, fusion: Fusion, level: str, progress: Progress
) -> Proof:
    """Blocks, loading and config, which must hold; and what the fused model computes, which is told."""
    from growformer.proof.functional import load_report, outputs64
    from growformer.proof.fused import blocks
    from growformer.proof.fused import measure as compare
    from growformer.proof.inputs import probe_inputs

    progress("blocks", 0, 0)
    with TensorFiles.open(out) as fused:
        claims = [blocks(_told(fusion, folders), files[0].read, files[1].read, fused.read)]
    report = load_report(out)
    wrong = {k: report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if report[k]}
    tied = {True: "embeddings tied", False: "embeddings not tied", None: "no head"}[report["tied"]]
    same = report["tied"] == load_report(folders[0])["tied"]
    said = f"{wrong or 'no'} missing or unexpected key, {tied}"
    claims.append(Claim("loads", not wrong and same, said, "none, tied as both"))
    config, wanted = read_config(out), fusion.target_config
    odd = sorted(k for k in config.keys() | wanted.keys() if config.get(k) != wanted.get(k) and "dtype" not in k)
    found = f"other than planned: {', '.join(odd)}" if odd else "sizes added up, all else as in both"
    claims.append(Claim("config", not odd, found, "nothing else"))
    measured: dict[str, Any] = {"loads": report}
    need, room = 8 * sum(fusion.parameters), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    why = "not asked for" if level == "structure" else ""
    if not why and level == "auto" and need > room:
        why = f"the models in float64 take {size_text(need)}, and {size_text(room)} may be used"
    if why:
        claims.append(Claim("fused", None, "-", required=False, detail=why))
        return Proof(tuple(claims), measured)
    progress("fused", 0, 0)
    probe = probe_inputs(folders[0], batch=4, length=128, seed=0)
    batch = probe.batches[:1]
    a, b, c = (outputs64(folder, batch) for folder in (*folders, out))
    told = compare(a, b, c, batch[0].inputs)
    measured |= {"probe": {"kind": probe.kind, "reason": probe.reason, "inputs": probe.shapes}}
    measured |= {"fused": told.to_json()}
    detail = "; ".join(fusion.one.changes)
    claims.append(Claim("fused", None, told.text, required=False, detail=detail, told=True))
    return Proof(tuple(claims), measured)


def verify_fused(
    out: Path,
    one: str | Path | None = None,
    other: str | Path | None = None,
    *,
    level: str = "full",
    progress: Progress = lambda what, done, total: None,
) -> Proof:
    """Check from three folders that the one is the two others, fused; that it computes what they do is not claimed.

    Args:
        out: the fused folder.
        one, other: the two it was made of; None: those that its receipt names.
        level: see `fuse_checkpoint`.
        progress: told what is being checked.

    Raises:
        SourceError: a folder or the receipt cannot be read, or OUT was not fused.
    """
    read_config(out)  # whether it is a model's folder at all comes first
    receipt = Receipt.read(out)
    if receipt.method != METHOD:
        raise SourceError(
            f"{out}: its growformer.json says method {receipt.method!r}: it was not fused of two; verify SRC OUT"
        )
    recorded = (receipt.source, receipt.plan["other_source"])
    named = zip((one, other), recorded, strict=True)
    folders = tuple(located(_there(out, told["path"]) if given is None else given) for given, told in named)
    changed = [
        f"{name} in {folder}"
        for folder, told in zip(folders, recorded, strict=True)
        for name, found in told["files"].items()
        if not (folder / name).is_file() or sha256(folder / name) != found
    ]
    changed += [f"{name} in the fused folder" for name in receipt.check_files(out, "target") if name != "README.md"]
    said = f"other than in the receipt: {', '.join(changed)}" if changed else "every hash as in the receipt"
    claim = Claim("files", not changed, said, "none changed")
    with ExitStack() as opened:
        files = [opened.enter_context(TensorFiles.open(folder)) for folder in folders]
        fusion = planned(folders, files, receipt.request.get("ignore_fields", ()))
        proof = prove_fused(folders, files, out, fusion, level, progress)
    return Proof((claim, *proof.claims), proof.measured)


def _there(out: Path, path: str) -> Path:
    if not Path(path).is_dir():
        raise SourceError(
            f"{out}: its growformer.json names {path!r} as one of its two models, and there is no such folder; say "
            f"where they are: growformer verify ONE OTHER {out}"
        )
    return Path(path)


def measure(
    one: transformers.PreTrainedModel,
    other: transformers.PreTrainedModel,
    fused: transformers.PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
) -> Measured:
    """How far a fused model is from the mean of both that are in it, and what a token costs each, in their own dtype.

    Args:
        one, other, fused: in eval mode.
        inputs: token ids [sequence, position], or a forward pass's keywords.
    """
    from growformer.proof.fused import measure as compare
    from growformer.proof.inputs import as_batches
    from growformer.proof.outputs import outputs

    batch = as_batches(inputs)
    a, b, c = (outputs(model, batch) for model in (one, other, fused))
    return compare(a, b, c, batch[0].inputs)
