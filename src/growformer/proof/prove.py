"""Prove: every claim of design section 6 about two folders, in order, from the files on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.algebra import Atom, Family, TensorPattern
from growformer.checkpoint import TensorFiles
from growformer.checkpoint.stock import full_config
from growformer.errors import SourceError
from growformer.planning import Plan, apply, pull_back
from growformer.planning.build import idle_rows
from growformer.planning.sizes import size_of
from growformer.proof.bar import BAR
from growformer.proof.claims import Claim, Proof

if TYPE_CHECKING:
    import torch

LEVELS = ("auto", "structure", "full")
"""How much is checked: the certificate alone, everything, or everything where both models fit in memory."""

TOKENS = 4096
"""Tokens that aliveness is judged on at most (each row of an embedding stands for the others; rows unseen are not
counted, and the claim says how many were seen)."""


@dataclass(frozen=True)
class Case:
    """One growth to prove.

    Attributes:
        family: the model family.
        plan: as made, or as the receipt holds it.
        source, target: the two folders.
        source_full: the source's config with the class's defaults filled in.
        target_config: what the target's config.json holds.
    """

    family: Family
    plan: Plan
    source: Path
    target: Path
    source_full: Mapping[str, Any]
    target_config: Mapping[str, Any]

    @cached_property
    def prefix(self) -> str:
        """What patterns have before names that a bare backbone's checkpoint leaves out."""
        with TensorFiles.open(self.source) as files:
            bare = self.family.prefix and not any(name.startswith(self.family.prefix) for name in files)
        return self.family.prefix if bare else ""

    def pattern(self, name: str) -> TensorPattern:
        """The pattern of a tensor on disk."""
        head = self.family.tied is not None and name == self.family.tied.head
        return self.family.find(name if head else self.prefix + name)[1]


def prove(case: Case, level: str = "auto", say: Callable[[str], None] = lambda text: None) -> Proof:
    """Check every claim of a growth.

    Args:
        case: the growth.
        level: one of `LEVELS`.
        say: told what is being checked.

    Returns:
        The proof; ask `raise_if_changed` or `exit_code`.
    """
    measured: dict[str, Any] = {}
    say("structure")
    claims = [_structure(case, measured)]
    fits, why = _fits(case)
    functional = level == "full" or (level == "auto" and fits)
    if functional and claims[0].passed:
        from growformer.proof.probe import probe_tokens

        probe = probe_tokens(case.source, batch=4, length=128, seed=0)
        measured["probe"] = {"kind": probe.kind, "tokens": list(probe.tokens.shape)}
        checks = (_loads, _algebra, _stored, _runtime, _alive)
        for check in checks:
            say(check.__name__[1:])
            claims.append(check(case, probe.tokens, measured))
    else:
        reason = f"{why}; --prove full checks it" if level == "auto" and not fits else "not asked for"
        if not claims[0].passed:
            reason = "the structure is not the source's"
        claims += [
            Claim(name, None, "-", required=False, detail=reason)
            for name in ("loads", "algebra", "stored", "runtime", "alive")
        ]
    return Proof(tuple(claims), measured)


def _fits(case: Case) -> tuple[bool, str]:
    """Whether both models fit in memory in float64, with room for gradients and the source's variants."""
    import os

    old, new = case.plan.parameters
    need = 8 * (old + 3 * new)
    have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have // 2:
        return False, f"both models in float64 take {need / 1e9:.1f} GB of {have / 1e9:.1f} GB free"
    return True, ""


def _structure(case: Case, measured: dict[str, Any]) -> Claim:
    from growformer.proof.certificate import FileTensors, certify

    with TensorFiles.open(case.source) as source, TensorFiles.open(case.target) as target:
        certificate = certify(
            case.family,
            case.plan.axes,
            case.plan.layers,
            FileTensors(source),
            FileTensors(target),
            case.plan.source_config,
            case.target_config,
            source_full=case.source_full,
        )
    measured["structure"] = {"tensors": certificate.tensors, **certificate.counts}
    counts = certificate.counts
    found = (
        f"{certificate.tensors} tensors: {counts['identical']} identical, {counts['scaled']} scaled, "
        f"{counts['rounded']} rounded once, {counts['new']} new"
    )
    total = len(case.plan.tensors)
    failures = certificate.failures
    detail = "; ".join(failures[:3]) + (f" (and {len(failures) - 3} more)" if len(failures) > 3 else "")
    return Claim("structure", certificate.ok, found if certificate.ok else detail, f"{total} of {total}", detail=detail)


def _loads(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Claim:
    from growformer.proof.functional import load_report

    report, before = load_report(case.target), load_report(case.source)
    measured["loads"] = report
    wrong = {
        k: report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if report.get(k)
    }
    same_tie = report["tied"] == before["tied"]
    tie = {True: "embeddings tied", False: "embeddings not tied", None: "no head"}[report["tied"]]
    found = f"{wrong or 'no'} missing or unexpected key, {tie}"
    return Claim("loads", not wrong and same_tie, found, "none, tied as the source")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles.open(folder) as files:
        return {name: files.read(name) for name in files.names}


def _algebra(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Claim:
    import torch

    from growformer.proof.float64 import build64_from
    from growformer.proof.functional import functional

    dtypes = _dtypes(case.target)
    if dtypes == {"F64"}:
        difference = functional(case.source, case.target, tokens)
        how = "the files on disk"
    else:
        source = {name: x.double() for name, x in _tensors(case.source).items()}
        grown = apply(case.plan, source, torch.float64)
        del source
        difference = functional(case.source, lambda: build64_from(case.target_config, grown), tokens)
        how = "the plan on the source upcast to float64"
    measured["algebra"] = {"relative": difference.relative, "max_abs": difference.max_abs, "of": how}
    return Claim("algebra", difference.relative <= BAR, f"{difference.relative:.1e}", f"{BAR:.0e} (float64)")


def _dtypes(folder: Path) -> set[str]:
    with TensorFiles.open(folder) as files:
        return {files[name].dtype for name in files}


def _pulled_back(case: Case) -> dict[str, torch.Tensor]:
    from growformer.proof.certificate import FileTensors, pulled_back

    with TensorFiles.open(case.source) as source, TensorFiles.open(case.target) as target:
        return dict(
            pulled_back(
                case.family,
                case.plan.axes,
                case.plan.layers,
                FileTensors(source),
                FileTensors(target),
                case.plan.source_config,
                case.target_config,
                source_full=case.source_full,
            )
        )


def _redundant(case: Case) -> bool:
    """Whether the file stores one thing twice (means, copies with a factor), so that rounding can tear them apart."""
    return any(
        any(block.mean) or (block.back is None and block.factor.exponent is None)
        for tensor in case.plan.tensors
        for block in tensor.blocks()
        if block.source is not None
    ) and _dtypes(case.target) != {"F64"}


def _stored(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Claim:
    from growformer.proof.float64 import build64_from
    from growformer.proof.functional import functional

    pulled = _pulled_back(case)
    difference = functional(lambda: build64_from(case.source_full, pulled), case.target, tokens)
    to_source = functional(case.source, case.target, tokens)
    measured["stored"] = {"relative": difference.relative, "rms": difference.rms, "to_source": to_source.relative}
    found = f"{difference.relative:.1e} from its pull-back ({to_source.relative:.1e} from the source)"
    if not _redundant(case):
        return Claim("stored", difference.relative <= BAR, found, f"{BAR:.0e} (float64)")
    floor = _floor(case, tokens, measured)
    return Claim("stored", difference.rms <= 2 * floor.floor, found, f"rms {2 * floor.floor:.1e}: means round too")


def _floor(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Any:
    from growformer.proof.floor import movable, orders, permuted
    from growformer.proof.functional import NoiseFloor, noise

    if "floor" in measured:
        return NoiseFloor(**measured["floor"])
    import torch

    source = {name: x for name, x in _tensors(case.source).items() if name not in case.plan.dropped}
    (dtype,) = {x.dtype for x in _tensors(case.target).values()} or {torch.float32}
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


def _runtime(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Claim:
    from growformer.proof.functional import FLOOR_MULTIPLE, runtime

    floor = _floor(case, tokens, measured)
    result = runtime(case.source, case.target, tokens, floor)
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


def new_entries(plan: Plan) -> dict[str, torch.Tensor]:
    """For every target tensor, which entries are new: drawn, zero, means, or copies that nobody reads yet."""
    import torch

    out = {}
    for tensor in plan.tensors:
        mask = torch.ones(tensor.shape, dtype=torch.bool)
        for block in tensor.blocks():
            if block.source is not None and block.back is not None and not any(block.mean):
                mask[tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))] = False
        out[tensor.name] = mask
    return out


def _trainable_new_entries(case: Case) -> tuple[dict[str, torch.Tensor], int]:
    """`new_entries` without those that have no gradient in any model of the family, and how many those are."""
    full = full_config(case.target_config)[0]

    def size(atom: Atom) -> int:
        return atom.axis if isinstance(atom.axis, int) else size_of(case.family.axes[atom.axis], full)

    masks, idle = new_entries(case.plan), 0
    for name, mask in masks.items():
        for start, stop in idle_rows(case.family, case.pattern(name), size):
            idle += int(mask[start:stop].sum())
            mask[start:stop] = False
    return masks, idle


def _alive(case: Case, tokens: torch.Tensor, measured: dict[str, Any]) -> Claim:
    from growformer.proof.alive import covering_tokens, dead_entries, parameter_masks
    from growformer.proof.float64 import build64

    model = build64(case.target)
    if model.get_output_embeddings() is None:
        return Claim("alive", None, "-", required=False, detail="the checkpoint has no head, so nothing to train by")
    vocab = int(case.source_full["vocab_size"])
    learned = "positions" in case.family.axes
    positions = size_of(case.family.axes["positions"], case.source_full) if learned else 128
    data = covering_tokens(vocab, positions, seed=0)
    data = data[: max(2, TOKENS // positions)]
    new, idle = _trainable_new_entries(case)
    unseen = _unseen(vocab, data)
    pad = case.source_full.get("pad_token_id")
    if isinstance(pad, int) and -vocab <= pad < vocab:
        unseen[pad] = True  # torch never gives the row of a padding token a gradient, in any model
    for name, mask in new.items():
        for dim, part in enumerate(case.pattern(name).dims):
            if part.atom is not None and part.atom.axis == "vocab" and part.atom.stand == "read":
                mask[(slice(None),) * dim + (unseen,)] = False
    masks = parameter_masks(case.target_config, new)
    dead = dead_entries(model, masks, data)
    total = sum(int(mask.sum()) for mask in masks.values())
    named = {name: n for name, n in dead.items() if n}
    measured["alive"] = {"new_entries": total, "dead": named, "idle": idle, "tokens": int((~unseen).sum())}
    found = f"{total - sum(named.values()):,} of {total:,} new entries within two passes"
    if idle:
        found += f" ({idle:,} key biases aside, which softmax sees in no model)"
    if bool(unseen.any()):
        found += f" (embeddings: {int((~unseen).sum()):,} tokens of {vocab:,})"
    excused = {axis for axis, entry in case.plan.axes.items() if entry["dead"]}
    undeclared = [name for name in named if not case.pattern(name).axes() & excused]
    allowed = "all" if not excused else f"all but those the plan names dead ({', '.join(sorted(excused))})"
    detail = "dead: " + ", ".join(f"{name} ({named[name]})" for name in undeclared[:4])
    return Claim("alive", not undeclared, found, allowed, detail=detail)


def _unseen(vocab: int, data: torch.Tensor) -> torch.Tensor:
    """[vocab], true at the ids that `data` does not hold."""
    import torch

    unseen = torch.ones(vocab, dtype=torch.bool)
    unseen[data.flatten()] = False
    return unseen
