"""Checks every family and writes the results that the package ships and docs/families.md: `make families`.

`make test` runs a part of this, and fails where the results are of other sources than those at hand.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "growformer"
RESULTS = SOURCES / "families" / "results.json"
PAGE = ROOT / "docs" / "families.md"
PARTS = ("algebra", "families", "models", "planning", "proof", "checkpoint", "api")
ALWAYS = ("llama", "gpt2")
SOME = 6


def sources_hash(sources: Path = SOURCES) -> str:
    """A hash of every Python file that a check's result may depend on, by name and contents."""
    found = hashlib.sha256()
    for part in PARTS:
        for path in sorted((sources / part).rglob("*.py")):
            found.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def rotating(names: Iterable[str], key: str) -> list[str]:
    """Those families that `make test` checks: two always, and some that change with the sources."""
    others = sorted(set(names) - set(ALWAYS))
    start = int(key, 16) % len(others)
    return [*ALWAYS, *((others * 2)[start : start + SOME])]


_opened = ExitStack()
_verifier: Any = None


def check(name: str) -> tuple[str, dict[str, Any]]:
    """One family in this process, proved by one other that this process keeps."""
    global _verifier
    from growformer.api.checking import FamilyReport, check_family
    from growformer.api.checks.verifying import start_worker, verifier

    if _verifier is None:
        start_worker()
        # A process that ends waits for its children, and that one waits for work: it goes before queues close (10).
        Finalize(None, _opened.close, exitpriority=100)
        _verifier = _opened.enter_context(verifier())
    try:
        return name, check_family(name, within=_verifier).to_json()
    except Exception as error:  # the other families are to be heard of as well
        said = f"the check broke down: {type(error).__name__}: {error}"
        _opened.close()
        _verifier = None
        return name, FamilyReport(name, problems=(said,)).to_json()


def main() -> int:
    """Run every family, or those named, and write what was found."""
    from growformer.families import FAMILIES
    from growformer.report import families as report

    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("names", nargs="*", help="only these; nothing is written then")
    words.add_argument("--jobs", type=int, default=2, help="families at a time; each takes two processes")
    given = words.parse_args()
    names, start, key = given.names or list(FAMILIES), time.monotonic(), sources_hash()
    found: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(max(1, given.jobs), mp_context=get_context("spawn")) as pool:
        for name, told in pool.map(check, names):
            found[name] = told
            print(f"{name}: {'holds' if told['ok'] else 'FAILS'} ({told['seconds']:.0f} s)", flush=True)
            for text in told["failures"]:
                print(f"  {text[:400]}", flush=True)
    bad = [name for name, told in found.items() if not told["ok"]]
    print(f"{len(found) - len(bad)} of {len(found)} families hold; {time.monotonic() - start:.0f} s")
    if not given.names:
        if sources_hash() != key:
            print("the sources changed meanwhile, so the results are stale as soon as written", file=sys.stderr)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        results = {"sources": key, "versions": versions, "families": {n: report.slim(t) for n, t in found.items()}}
        RESULTS.write_text(report.dumps(results), encoding="utf-8")
        PAGE.parent.mkdir(exist_ok=True)
        # From the file, as everybody else makes it: JSON orders its keys.
        PAGE.write_text(report.markdown(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
