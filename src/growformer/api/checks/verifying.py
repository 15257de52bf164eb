"""Proofs in a process of its own, which made none of the folders that it is given."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from growformer.algebra import Family
from growformer.api.checks.samples import serving
from growformer.errors import UncheckedError

if TYPE_CHECKING:
    from growformer.proof.case import Case
    from growformer.proof.claims import Claim

LENGTH = 16
"""Positions of the sequences that single growths are compared on; the samples have room for twice as many."""


class Verifier:
    """One fresh process; what it is given is answered in order."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def prove(self, family: Family, src: Path, out: Path, *, full: bool, alive: bool = True) -> Future[dict[str, Any]]:
        """See `prove_folder`."""
        return self._pool.submit(prove_folder, family, str(src), str(out), full, alive)

    def judge(self, family: Family, src: Path, out: Path) -> Future[dict[str, Any]]:
        """See `judge_folder`."""
        return self._pool.submit(judge_folder, family, str(src), str(out))

    def decode(self, family: Family, src: Path, out: Path, broken: Sequence[Path]) -> Future[dict[str, Any]]:
        """See `decode_folder`."""
        return self._pool.submit(decode_folder, family, str(src), str(out), [str(folder) for folder in broken])


@contextmanager
def verifier() -> Iterator[Verifier]:
    """A verifier, gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        yield Verifier(pool)


def start_worker() -> None:
    """What a process of checks begins with: one thread, no downloads, and an end when its parent ends."""
    parent = parent_process()
    if parent is not None:
        # A parent that is killed says no goodbye, and its children would wait for work for ever.
        Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What libraries say of their own insides is not this process' to repeat.
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401  while the first folder is made


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def prove_folder(family: Family, src: str, out: str, full: bool, alive: bool) -> dict[str, Any]:
    """Verify a grown folder.

    Args:
        family: serves its model type.
        src, out: the two folders.
        full: every claim; else the files, the structure, and the outputs in true float64.
        alive: also whether the new entries learn (`full` has it anyway).

    Returns:
        claims: by name, whether it holds (None: not checked); detail: what does not; algebra, bound, beyond, ratio: as
        measured; new_entries, dead.
    """
    try:
        with serving(family), contextlib.redirect_stdout(sys.stderr):
            return (_full if full else _short)(Path(src), Path(out), alive)
    except Exception as error:  # any failure of a check is a finding
        return {"claims": {"check": False}, "detail": f"{type(error).__name__}: {error}"}


def _full(src: Path, out: Path, alive: bool) -> dict[str, Any]:
    from growformer.api.verified import verify

    proof = verify(src, out)
    failed = [f"{c.name}: {c.detail or f'{c.found}, allowed {c.allowed}'}" for c in proof.claims if c.passed is False]
    failed += [f"{c.name} not checked: {c.detail}" for c in proof.claims if c.passed is None and c.required]
    return {
        "claims": {claim.name: claim.passed for claim in proof.claims if claim.required or claim.passed is False},
        "detail": "; ".join(failed),
        **_algebra(proof.measured),
        "ratio": proof.measured.get("runtime", {}).get("ratio"),
        **_counts(proof.measured),
    }


def _short(src: Path, out: Path, alive: bool) -> dict[str, Any]:
    from growformer.api.verified import verify
    from growformer.proof import claim_alive

    proof = verify(src, out, level="structure")
    claims = {claim.name: claim.passed for claim in proof.claims if claim.required or claim.passed is False}
    said = [f"{claim.name}: {claim.detail or claim.found}" for claim in proof.claims if claim.passed is False]
    case, measured = _case(src, out), dict[str, Any]()
    for claim in _outputs(case, measured):
        claims[claim.name] = claim.passed
        if not claim.passed:
            said.append(f"{claim.name}: {claim.detail or f'{claim.found}, allowed {claim.allowed}'}")
    if alive:
        claim = claim_alive.alive(case, measured)
        claims["alive"] = claim.passed
        if claim.passed is not True:
            said.append(f"alive: {claim.detail}")
    return {"claims": claims, "detail": "; ".join(said), **_algebra(measured), **_counts(measured)}


def _counts(measured: Mapping[str, Any]) -> dict[str, Any]:
    found = measured.get("alive", {})
    return {"new_entries": int(found.get("new_entries", 0)), "dead": sum(found.get("dead", {}).values())}


def _algebra(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The relative difference in float64; where the growth is exact up to eps, also its bound, and what is beyond."""
    found = measured.get("algebra", {})
    return {"algebra": found.get("relative"), "bound": found.get("bound"), "beyond": found.get("beyond")}


def _case(src: Path, out: Path) -> Case:
    from growformer.api.verified import recorded
    from growformer.checkpoint import Receipt

    return recorded(src, out, Receipt.read(out))


def _outputs(case: Case, measured: dict[str, Any]) -> list[Claim]:
    """What the two folders' outputs in true float64 say."""
    from growformer.proof.claim_float64 import ON_DISK, Outputs, algebra, eps
    from growformer.proof.inputs import probe_inputs

    outputs = Outputs(case, probe_inputs(case.source, batch=3, length=LENGTH, seed=0).batches)
    claims = [check(outputs, measured) for check in ([eps, algebra] if case.passings else [algebra])]
    if measured["algebra"]["of"] != ON_DISK:
        raise UncheckedError(f"{case.target} is not stored in float64, so its own outputs were not compared")
    return claims


def judge_folder(family: Family, src: str, out: str) -> dict[str, Any]:
    """What the two independent checks say of a folder that was broken.

    Returns:
        structure, outputs: whether each finds it other than the source; detail: what they say.
    """
    from growformer.api.verified import verify

    def structure() -> tuple[bool, str]:
        claims = {claim.name: claim for claim in verify(Path(src), Path(out), level="structure").claims}
        if claims["files"].passed is not True:
            return False, f"the control is no good: {claims['files'].found}"
        return claims["structure"].passed is False, claims["structure"].detail

    def outputs() -> tuple[bool, str]:
        claim = _outputs(_case(Path(src), Path(out)), {})[-1]
        return claim.passed is False, claim.found

    with serving(family), contextlib.redirect_stdout(sys.stderr):
        seen = {"structure": _tried(structure), "outputs": _tried(outputs)}
    said = "; ".join(f"{name}: {text}" for name, (_, text) in seen.items())
    return {"caught": {name: caught for name, (caught, _) in seen.items()}, "detail": said}


def decode_folder(family: Family, src: str, out: str, broken: Sequence[str]) -> dict[str, Any]:
    """What a causal language model gives where its code takes another path, before and after growth.

    Args:
        family: serves its model type.
        src, out: the two folders.
        broken: copies of `out` that are wrong.

    Returns:
        paths: by the name of a check of `growformer.proof.decoding`, the relative difference (None: the class has no
        such path) and a note; broken: for each of those folders, whether each check that has a path notices; detail:
        why nothing could be compared.
    """
    from growformer.checkpoint import Receipt
    from growformer.proof.bar import BAR
    from growformer.proof.decoding import Decoding
    from growformer.proof.outputs import grown_axes

    try:
        with serving(family), contextlib.redirect_stdout(sys.stderr):
            source, reads = Decoding(Path(src), length=LENGTH), grown_axes(Receipt.read(Path(out)).axes)
            found = [source.to(Path(folder), reads) for folder in (out, *broken)]
    except Exception as error:  # any failure of a check is a finding
        return {"paths": {}, "broken": [{} for _ in broken], "detail": f"{type(error).__name__}: {error}"}
    relative = [{n: d.difference.relative for n, d in each.items() if d.difference is not None} for each in found]
    return {
        "paths": {name: (relative[0].get(name), d.note) for name, d in found[0].items()},
        "broken": [{name: not value <= BAR for name, value in each.items()} for each in relative[1:]],
        "detail": "",
    }


def _tried(check: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    try:
        return check()
    except Exception as error:  # a check that breaks down has noticed nothing
        return False, f"{type(error).__name__}: {error}"
