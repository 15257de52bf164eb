"""Prove: every claim of design section 6 about two folders, in order, from the files on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from growformer.checkpoint import size_text
from growformer.planning.newness import new_entries
from growformer.proof.case import Case, stored_bytes
from growformer.proof.claim_alive import alive
from growformer.proof.claim_float64 import Outputs, algebra, eps, stored
from growformer.proof.claim_runtime import runtime
from growformer.proof.claims import Claim, Proof

if TYPE_CHECKING:
    from growformer.proof.certificate import Certificate

__all__ = ["LEVELS", "Case", "new_entries", "prove"]

LEVELS = ("auto", "structure", "full")
"""How much is checked: the certificate alone, everything, or everything where both models fit in memory."""


def prove(
    case: Case,
    level: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    *,
    memory: int | None = None,
    certificate: Certificate | None = None,
) -> Proof:
    """Check every claim of a growth.

    Args:
        case: the growth.
        level: one of `LEVELS`. With "full", models that do not fit are run from disk, module by module, in float64;
            what needs them whole (runtime, alive) is left out and says so.
        say: told what is being checked.
        memory: bytes that models may take; None is half of what is free.
        certificate: the structural one, where it is there already.

    Returns:
        The proof; ask `raise_if_changed` or `exit_code`.
    """
    measured: dict[str, Any] = {}
    if case.plan.changes:
        return _changed(case, level, memory, measured)
    say("structure")
    structure, distinct = _structure(case, certificate, measured)
    room = memory if memory is not None else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    why = _too_large(case, room)
    if not structure.passed:
        return _only(case, [structure], "the structure is not the source's", measured)
    if level == "structure":
        return _only(case, [structure, *distinct], "not asked for", measured)
    if level == "auto" and why:
        return _only(case, [structure, *distinct], f"{why}; --prove full checks algebra and stored from disk", measured)

    from growformer.proof.inputs import probe_inputs
    from growformer.proof.offload import BLOCK

    probe = probe_inputs(case.source, batch=4, length=128, seed=0)
    measured["probe"] = {"kind": probe.kind, "reason": probe.reason, "inputs": probe.shapes}
    measured["from_disk"] = bool(why)
    outputs = Outputs(case, probe.batches, max(1, min(BLOCK, room // 4)) if why else None)
    checks: dict[str, Callable[[], Claim]] = {
        "loads": lambda: _loads(case, room, measured),
        **({"eps": lambda: eps(outputs, measured)} if case.passings else {}),
        "algebra": lambda: algebra(outputs, measured),
        "stored": lambda: stored(outputs, measured),
        "runtime": lambda: _left_out("runtime", why) if why else runtime(case, probe.batches, measured),
        "alive": lambda: _left_out("alive", why) if why else alive(case, measured),
    }
    claims = [structure, *distinct]
    for name, check in checks.items():
        say(name + (f", within eps: {measured['eps']['bound']:.1e}" if name == "algebra" and case.passings else ""))
        claims.append(check())
    return Proof(tuple(claims), measured)


def _changed(case: Case, level: str, memory: int | None, measured: dict[str, Any]) -> Proof:
    """What there is to say of a growth that makes another function: that the model loads, and what it lost."""
    from growformer.proof.claim_changed import changed

    room = memory if memory is not None else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    why = _too_large(case, room) or ("not asked for" if level == "structure" else "")
    loads = _loads(case, room, measured)
    return Proof((_left_out("changed", why) if why else changed(case, measured), loads), measured)


def _left_out(name: str, reason: str) -> Claim:
    return Claim(name, None, "-", required=False, detail=reason)


def _only(case: Case, first: Sequence[Claim], reason: str, measured: dict[str, Any]) -> Proof:
    others = ("loads", *(["eps"] if case.passings else []), "algebra", "stored", "runtime", "alive")
    return Proof((*first, *(_left_out(name, reason) for name in others)), measured)


def _too_large(case: Case, room: int) -> str:
    """Why the models do not fit in memory in float64, with gradients and the source's variants; empty if they do."""
    old, new = case.plan.parameters
    need = 8 * (old + 3 * new)
    return f"both models in float64 take {size_text(need)}, and {size_text(room)} may be used" if need > room else ""


def _structure(case: Case, certificate: Certificate | None, measured: dict[str, Any]) -> tuple[Claim, list[Claim]]:
    """The certificate; and, where there are copies, whether anything tells them apart."""
    from growformer.proof.certificate import certify

    if certificate is None:
        with case.open() as (source, target):
            certificate = certify(**case.told(source, target))
    measured["structure"] = {"tensors": certificate.tensors, **certificate.counts}
    counts = certificate.counts
    found = (
        f"{certificate.tensors} tensors: {counts['identical']} identical, {counts['scaled']} scaled, "
        f"{counts['rounded']} rounded once, {counts['new']} new"
    )
    total = len(case.plan.tensors)
    failures = certificate.failures
    detail = "; ".join(failures[:3]) + (f" (and {len(failures) - 3} more)" if len(failures) > 3 else "")
    claim = Claim(
        "structure", certificate.ok, found if certificate.ok else detail, f"{total} of {total}", detail=detail
    )
    return claim, _distinct(certificate, measured) if certificate.copied else []


def _distinct(certificate: Certificate, measured: dict[str, Any]) -> list[Claim]:
    """Whether copies can part: those that all tensors write and read alike get equal gradients."""
    alike = certificate.inseparable
    measured["distinct"] = {axis: list(counts) for axis, counts in alike.items()}
    if not alike:
        return [Claim("distinct", True, "something tells every copy from its original", "all", required=False)]
    said = ", ".join(f"{count} of {total} {axis}" for axis, (count, total) in alike.items())
    why = (
        "such copies get equal gradients, and in exact arithmetic stay copies unless an optimizer's memory tells them "
        "apart; methods that split unequally, or with noise, do"
    )
    return [Claim("distinct", None, f"copies for ever: {said}", required=False, detail=why, told=True)]


def _loads(case: Case, room: int, measured: dict[str, Any]) -> Claim:
    from growformer.proof.functional import load_report
    from growformer.proof.offload import key_report

    whole = max(stored_bytes(case.source), stored_bytes(case.target)) <= room
    before, report = (
        load_report(folder) if whole else key_report(folder, case.prefix) for folder in (case.source, case.target)
    )
    measured["loads"] = report
    wrong = {
        k: report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if report.get(k)
    }
    same_tie = report["tied"] == before["tied"]
    tie = {True: "embeddings tied", False: "embeddings not tied", None: "no head"}[report["tied"]]
    found = f"{wrong or 'no'} missing or unexpected key, {tie}" + ("" if whole else " (by names and shapes)")
    return Claim("loads", not wrong and same_tie, found, "none, tied as the source")
